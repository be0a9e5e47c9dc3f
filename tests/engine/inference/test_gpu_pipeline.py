"""Whole runs on fake GPUs that fail where real ones would, against the same network on the CPU."""

import gc
import importlib.util
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cellseg_batch.engine import settings
from cellseg_batch.engine.geometry import fit_lattice, fit_squares
from cellseg_batch.engine.inference import gpu_probe
from cellseg_batch.engine.inference.backends import cuda
from cellseg_batch.engine.inference.backends.cuda import Device, GraphedHalf
from cellseg_batch.engine.inference.backends.torch_cuda import TorchCudaBackend
from cellseg_batch.engine.inference.gpu_admission import Admission
from cellseg_batch.engine.inference.gpu_batch_queue import BatchQueue
from cellseg_batch.engine.inference.kept_by_use import KeptByUse
from cellseg_batch.engine.inference.model_pool import ModelPool
from cellseg_batch.engine.reports.info import list_images
from cellseg_batch.engine.reports.plan import estimate
from cellseg_batch.engine.settings import Settings
from cellseg_batch.trainer.bundle import save_bundle
from tests.support.fake_gpu import STREAMS, FakeGpus
from tests.support.images import blobs, labels_of, write_ome_zarr

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install 'cellseg-batch[triton]'", allow_module_level=True)

TILE = 80


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, used by all code from now on."""
    made = FakeGpus()
    made.install(monkeypatch)
    return made


@pytest.fixture
def on_gpus(segment):
    """Run on the fake GPUs with many threads."""

    def call(*inputs, **changes):
        usual = {"backend": "torch-cuda", "precision": "auto", "gate": False, "device": "cuda:0,1", "workers": 8}
        return segment(*inputs, **{**usual, "tile": TILE, "block": 64, **changes})

    return call


def folder_of(folder, seed, count):
    """Images of many shapes, each twice, most of them smaller than a tile."""
    random = np.random.default_rng(seed)
    sides = random.integers(20, 70, (count // 2, 2))
    sides[:2] += TILE
    sides = np.resize(sides, (count, 2))
    return [
        write_ome_zarr(folder / f"{number:02}.zarr", blobs(*shape, seed=number), levels=1)
        for number, shape in enumerate(sides.tolist())
    ]


def masks_on_the_cpu(segment, paths, **changes):
    """The masks of the same network in float16, cut and stitched by the host."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "available", lambda: True)
        patch.setattr(cuda, "Device", lambda name: Device("cpu"))
        patch.setattr(gpu_probe, "why_no_kernels", lambda gpu: "these are masks to compare with")
        usual = {"backend": "torch-cuda", "precision": "auto", "gate": False, "tile": TILE, "block": 64}
        report = segment(*paths, name="cpu", **{**usual, **changes})
    return [labels_of(report, number) for number in range(len(paths))]


def assert_same(report, expected):
    assert [(slide.status, slide.reason) for slide in report.slides] == [("done", "")] * len(expected)
    for number, mask in enumerate(expected):
        np.testing.assert_array_equal(labels_of(report, number), mask)
    assert 0.01 < np.mean([mask.mean() for mask in expected]) < 0.99


def test_a_folder_of_many_shapes_on_two_gpus(gpus, segment, on_gpus, tmp_path):
    paths = folder_of(tmp_path, 0, 10)
    expected = masks_on_the_cpu(segment, paths)
    report = on_gpus(*paths, batch=2)
    assert_same(report, expected)
    shapes = {fit_lattice(mask.shape, TILE, 8, 8).tile for mask in expected}
    assert gpus.captures <= 2 * len(shapes), "a network was captured again"


def test_instances_are_those_of_the_host(gpus, segment, on_gpus, tmp_path, monkeypatch):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(150, 170), levels=1)
    (expected,) = masks_on_the_cpu(segment, [path], instances=True)
    monkeypatch.setattr(GraphedHalf, "__call__", lambda *arguments, **keywords: pytest.fail("the host rounds pixels"))
    report = on_gpus(path, instances=True, batch=2)
    assert [slide.status for slide in report.slides] == ["done"]
    np.testing.assert_array_equal(labels_of(report), expected)
    assert expected.max() > 3


@pytest.fixture
def uncompiled(monkeypatch):
    """torch.compile compiles nothing: it cannot trace what the fake enqueues."""
    monkeypatch.setattr(torch, "compile", lambda network, **how: network)


@pytest.mark.usefixtures("uncompiled")
def test_slides_of_many_shapes_share_what_compiles_for_long(gpus, segment, on_gpus, tmp_path, tiny_model):
    paths = folder_of(tmp_path, 0, 8)
    expected = masks_on_the_cpu(segment, paths, backend="torch-compile")
    report = on_gpus(*paths, backend="torch-compile", batch=2)
    assert_same(report, expected)
    shapes = {fit_squares(mask.shape, TILE, 8, 8).tile for mask in expected}
    assert 1 < len(shapes) < len({mask.shape for mask in expected})
    assert gpus.captures <= 2 * len(shapes)
    info = list_images(paths, Settings(model=str(tiny_model), backend="torch-compile", tile=TILE))
    assert {image.cut.tile for image in info.images} == shapes


@pytest.mark.usefixtures("uncompiled", "gpus")
def test_windows_that_show_the_scale_are_not_worth_a_long_compile(on_gpus, tmp_path, tiny_bundle, monkeypatch):
    save_bundle(replace(tiny_bundle, card=replace(tiny_bundle.card, downscale={"2": 9.0})), tmp_path / "model")
    real, compiled = TorchCudaBackend.compile, {"torch-cuda": set(), "torch-compile": set()}

    def compile_model(self, shape):
        compiled[self.name].add(shape)
        return real(self, shape)

    monkeypatch.setattr(TorchCudaBackend, "compile", compile_model)
    paths = [write_ome_zarr(tmp_path / f"{side}.zarr", blobs(side, side), levels=1) for side in (65, 90)]
    report = on_gpus(*paths, backend="torch-compile", model=str(tmp_path / "model"), device="cuda:0", workers=1)
    assert [slide.status for slide in report.slides] == ["done"] * 2
    assert {shape[2:] for shape in compiled["torch-compile"]} <= {(TILE, TILE), (56, 56), (40, 40)}
    assert compiled["torch-cuda"] == {(1, 3, 80, 80), (1, 3, 96, 96)}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_sixty_shapes_by_eight_threads(gpus, segment, on_gpus, tmp_path, seed):
    paths = folder_of(tmp_path, seed, 120)
    expected = masks_on_the_cpu(segment, paths)
    assert_same(on_gpus(*paths, batch=1 + seed % 4, device="cuda:0,1" if seed % 2 else "cuda:0"), expected)


@pytest.mark.parametrize("stitch", ["crop", "blend"])
def test_memory_that_is_full_at_the_third_batch(gpus, segment, on_gpus, tmp_path, stitch, monkeypatch):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(150, 170), levels=1)
    real, replays = gpus.replay, []

    def replay(graph):
        replays.append(graph)
        if len(replays) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        real(graph)

    monkeypatch.setattr(gpus, "replay", replay)
    how = {"probability": True, "stitch": stitch}
    assert_same(on_gpus(path, batch=4, **how), masks_on_the_cpu(segment, [path], **how))
    assert len(set(replays)) > 1, "a smaller batch has a graph of its own"


def test_memory_for_a_few_blocks_only(gpus, segment, on_gpus, tmp_path):
    """Without the admission of fewer blocks, those that find no memory would fail."""
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(250, 270), levels=1)
    expected = masks_on_the_cpu(segment, [path], block=128)
    gpus.memory = 250_000  # a batch of one tile, and two blocks
    assert_same(on_gpus(path, block=128, batch=4, device="cuda:0"), expected)


def test_memory_for_no_block_at_all_is_named(gpus, on_gpus, tmp_path):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(150, 150), levels=1)
    gpus.memory = 60_000
    report = on_gpus(path)
    assert report.slides[0].status == "failed"
    assert "a device whose memory is full (CUDA out of memory. Tried to allocate" in report.slides[0].reason
    gpus.memory = 1 << 40
    assert on_gpus(path).slides[0].status == "done"
    assert gpus.used[0] < 60_000 * 20


def test_a_block_that_fails_leaves_no_work_behind(gpus, on_gpus, tmp_path, monkeypatch):
    """Its memory goes to the next block, while the device would still read it."""
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(150, 170), levels=1)
    real, replays = gpus.replay, []

    def replay(graph):
        replays.append(graph)
        if len(replays) > 2:
            raise RuntimeError("CUDA error: an illegal instruction was encountered")
        real(graph)

    monkeypatch.setattr(gpus, "replay", replay)
    report = on_gpus(path, block=999, device="cuda:0")
    assert "illegal instruction" in report.slides[0].reason
    assert [stream for stream in gpus.streams(0) if stream.done < len(stream.work)] == []


def test_blocks_of_gpus_hold_several_cores(gpus, segment, on_gpus, tmp_path, monkeypatch, tiny_model):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(250, 250), levels=1)
    monkeypatch.setattr(settings, "_BLOCK", 64)
    monkeypatch.setattr(settings, "_BLOCK_ON_GPU", 128)
    expected = masks_on_the_cpu(segment, [path], block=None)
    report = on_gpus(path, block=None)
    assert_same(report, expected)
    assert report.slides[0].blocks == 4
    how = {"model": str(tiny_model), "backend": "torch-cuda", "gate": False, "tile": TILE, "output": tmp_path / "out"}
    assert estimate([path], Settings(**how), 1, lambda _: None).slides[0].blocks == 4


def test_without_a_compiler_for_kernels_the_host_cuts_and_stitches(gpus, segment, on_gpus, tmp_path, monkeypatch):
    from cellseg_batch.kernels import gather_triton

    def launch(*arguments):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")

    path = write_ome_zarr(tmp_path / "a.zarr", blobs(100, 90), levels=1)
    expected = masks_on_the_cpu(segment, [path])
    monkeypatch.setattr(gather_triton, "gather", launch)
    assert_same(on_gpus(path, device="cuda:0"), expected)
    assert "Failed to find C compiler" in gpu_probe.why_no_kernels("cuda:0")


# The fake itself: each of these would break a real run.


def test_a_copy_that_is_not_waited_for_has_not_happened(gpus):
    device = cuda.Device("cuda:0")
    copying, reading = device.stream(), device.stream()
    with device.on(copying):
        sent, arrived = device.send(np.full(3, 7, np.uint8)), device.event()
        arrived.record(copying)
    for waits, expected in ((False, [111] * 3), (True, [7] * 3)):
        with device.on(reading):
            if waits:
                reading.wait_event(arrived)
            received = device.receive(sent)
        reading.synchronize()
        assert received.tolist() == expected


def test_a_synchronisation_breaks_the_capture_of_another_thread(gpus):
    device, errors = cuda.Device("cuda:0"), []

    def launch(stream):
        if gpus.capture is None:
            return
        thread = threading.Thread(target=settle)
        thread.start()
        thread.join()

    def settle():
        try:
            device._synchronise()
        except RuntimeError as error:
            errors.append(str(error))

    with pytest.raises(RuntimeError, match="previous error during capture: the device is synchronised"):
        device.capture(launch)
    assert "not permitted when stream is capturing" in errors[0]


def test_synchronisations_wait_for_captures(gpus):
    """What the engine calls does not break a capture, whichever thread and GPU it is on."""
    device, settled = cuda.Device("cuda:0"), []
    settling = threading.Thread(target=lambda: (cuda.Device("cuda:1").settle(), settled.append(gpus.captures)))

    def launch(stream):
        if gpus.capture is not None:
            settling.start()
            time.sleep(0.01)

    device.capture(launch)
    settling.join()
    assert settled == [1]


def test_while_a_network_compiles_others_synchronise_and_none_is_captured(gpus):
    """Compilers synchronise too, so a capture that overlaps one would break."""
    device, compiling, synchronised, begun = cuda.Device("cuda:0"), threading.Event(), threading.Event(), []

    def compile_and_launch(stream):
        if not compiling.is_set():
            compiling.set()
            assert synchronised.wait(60)
            time.sleep(0.01)  # in which the other thread does what it must not
            device._synchronise()

    with ThreadPoolExecutor(3) as threads:
        slow = threads.submit(device.capture, compile_and_launch)
        assert compiling.wait(60)
        quick = threads.submit(cuda.Device("cuda:1").capture, lambda stream: begun.append(gpus.captures))
        try:
            threads.submit(device.settle).result(60)
            assert gpus.captures == 0
        finally:
            synchronised.set()
        slow.result()
        quick.result()
    assert begun == [1, 1], "its first launch and its capture both came after the other's"


def test_streams_of_captures_are_never_streams_of_others(gpus):
    device = cuda.Device("cuda:0")
    streams = [device.stream() for _ in range(2 * STREAMS)]
    assert streams[0] is streams[STREAMS], "they come in turn"
    assert device.stream(for_captures=True) not in streams
    with ThreadPoolExecutor(1) as other:

        def work_on(stream):
            return other.submit(stream.enqueue, lambda: None).result()

        with gpus.capturing(streams[0]) as capture:
            with pytest.raises(RuntimeError, match="another thread works on the stream"):
                work_on(streams[STREAMS])
            capture.broken = ""
        device.capture(lambda handle: [work_on(stream) for stream in streams])


def test_memory_that_a_capture_cannot_have(gpus):
    device = cuda.Device("cuda:0")
    with pytest.raises(RuntimeError, match="pinned memory is allocated"):
        device.capture(lambda stream: gpus.capture and device.pinned((1,), torch.half))


def test_tensors_of_another_gpu_are_refused(gpus):
    first, second = cuda.Device("cuda:0"), cuda.Device("cuda:1")
    theirs = second.zeros((2,), torch.half)
    with first.on(first.stream()):
        ours = first.zeros((2,), torch.half)
        with pytest.raises(RuntimeError, match="same device"):
            ours + theirs
        with pytest.raises(RuntimeError, match="same device"):
            ours.copy_(theirs)
        with pytest.raises(RuntimeError, match="host waits"):
            ours.sum().item()
        with pytest.raises(RuntimeError, match="not pinned"):
            torch.from_numpy(np.zeros(2, np.float16)).copy_(ours, non_blocking=True)


# Parts of the pipeline, each alone.


def test_what_is_in_use_is_kept_and_the_rest_as_far_as_it_fits():
    kept, made = KeptByUse(100), []

    def lend(name, area):
        return kept.lend(name, area, lambda: made.append(name) or name)

    with lend("a", 60) as first, lend("b", 60) as second, lend("a", 60) as again:
        assert (first, second, again) == ("a", "b", "a")
    with lend("a", 60):  # last used
        pass
    with lend("c", 40), lend("a", 60):
        assert made == ["a", "b", "c"]
    with lend("d", 60):
        assert not kept.drop_idle(), "both others went, so that it fits"
    assert kept.drop_idle()
    with lend("d", 60):
        assert made == ["a", "b", "c", "d", "d"]


def test_fewer_blocks_are_admitted_only_if_there_were_several():
    admission = Admission()
    with admission.stay() as alone:
        assert not admission.lower(alone)
    with admission.stay() as first, admission.stay() as second, admission.stay() as third:
        assert admission.lower(first)
        assert admission.limit == 2
        assert admission.lower(second), "it began before the limit was lowered"
        assert admission.limit == 2
        assert third.shared
    entered = []

    def enter():
        with admission.stay() as stay:
            entered.append(stay)

    with admission.stay(), admission.stay():
        thread = threading.Thread(target=enter)
        thread.start()
        time.sleep(0.01)
        assert not entered
    thread.join()
    assert len(entered) == 1


def test_a_network_compiles_while_others_run(gpus, tiny_bundle, monkeypatch):
    pool = ModelPool(tiny_bundle, Settings(backend="torch-cuda", precision="fp16", gate=False))
    real, begun, may_go_on = TorchCudaBackend.compile, threading.Event(), threading.Event()

    def compile_model(self, shape):
        if shape == (1, 3, 64, 64):
            begun.set()
            assert may_go_on.wait(10)
        return real(self, shape)

    def launch(side):
        with pool.queue(pool.chosen, 1, (1, 3, side, side)) as queue:
            arrived = queue.device.event()
            queue.run(SimpleNamespace(count=1, arrived=arrived, gather=lambda *tile: None, stitch=lambda *tile: None))

    monkeypatch.setattr(TorchCudaBackend, "compile", compile_model)
    with ThreadPoolExecutor(1) as other:
        compiling = other.submit(launch, 64)
        assert begun.wait(10)
        launch(32)
        assert not compiling.done()
        may_go_on.set()
        compiling.result()
    assert gpus.captures == 2


def test_what_was_made_until_memory_was_full_is_gone_before_the_next_try(gpus):
    """Held by the error's traceback it would make the next, smaller try fail too."""
    device, tried = cuda.Device("cuda:0"), []
    gpus.memory = 10_000

    def compile_model(count):
        tried.append(count)
        return GraphedHalf((count, 1, 16, 16), (count, 1, 16, 16), device)

    queue = BatchQueue(device, compile_model, 16, Admission(), lambda: False)
    for _ in range(3):
        with queue._lock:
            queue._launch()
    assert tried == [16, 8]


def test_a_block_that_finds_memory_full_leaves_the_device_at_once(gpus):
    device = cuda.Device("cuda:0")

    def compile_model(count):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    queue = BatchQueue(device, compile_model, 1, Admission(), lambda: False)
    block = SimpleNamespace(count=1, arrived=device.event())
    block.pixels, gone = device.zeros((1000,), torch.half), []
    weakref.finalize(block.pixels, gone.append, True)
    gc.disable()
    try:
        with pytest.raises(torch.OutOfMemoryError) as caught:
            queue.run(block)
        del caught, block
        assert gone
    finally:
        gc.enable()
