"""The way of a block through a GPU, on the CPU in its place: results, batches, streams, memory that runs out.

Kernels run in Triton's interpreter; nothing here has run on hardware.
"""

import importlib.util
import threading
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from cellseg_batch.engine.errors import ComputeError
from cellseg_batch.engine.geometry import fit_lattice, lay_blocks
from cellseg_batch.engine.inference import gpu_batch_queue as batch_queue
from cellseg_batch.engine.inference.backends import cuda
from cellseg_batch.engine.inference.backends.cuda import Device
from cellseg_batch.engine.inference.decoders import DECODERS
from cellseg_batch.engine.inference.gpu_admission import Admission
from cellseg_batch.engine.inference.gpu_batch_queue import BatchQueue
from cellseg_batch.engine.inference.normalise import Bounds
from cellseg_batch.engine.inference.prediction import PredictionRule
from cellseg_batch.engine.objects.classes import ClassRule
from cellseg_batch.engine.objects.seeds import InstanceRule
from cellseg_batch.engine.objects.stars import StarRule
from cellseg_batch.engine.stage_clock import StageClock
from cellseg_batch.trainer.card import Hover, Instances, StarDist
from tests.support.images import blobs, labels_of, write_ome_zarr
from tests.support.networks import predictor_of

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install 'cellseg-batch[triton]'", allow_module_level=True)
# Before triton is first imported: its own functions are decorated then.
with pytest.MonkeyPatch.context() as environment:
    environment.setenv("TRITON_INTERPRET", "1")
    from cellseg_batch.engine.inference import gpu_predictor
    from cellseg_batch.engine.inference.gpu_predictor import GpuPredictor

LATTICE = fit_lattice((100, 120), 56, 8, 8)
BOUNDS = Bounds((10.0,), (240.0,))


@pytest.fixture(autouse=True)
def interpreted_triton(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def network(pixels):
    """Logits of pixels (N, C, H, W) in float16: each pixel against the brightest nearby."""
    brightest = torch.nn.functional.max_pool2d(pixels.float(), 9, 1, 4)
    return (8 * (0.9 * pixels.float() - 0.6 * brightest)).half()


class Model:
    """A compiled model of the device, that remembers; ``failures`` are raised by its first calls."""

    def __init__(self, batch, failures=()):
        self.pixels = torch.zeros(batch, 3, *LATTICE.tile, dtype=torch.half)
        self.logits = torch.zeros(batch, 3, *LATTICE.tile, dtype=torch.half)
        self.failures, self.calls = list(failures), 0

    def enqueue(self):
        self.calls += 1
        if self.failures and (error := self.failures.pop(0)):
            raise error
        self.logits.copy_(network(self.pixels))


def queue_of(batch, failures=(), device=None, drop_idle=lambda: False):
    """A queue, and the models that it compiles; an exception instead of a model is raised."""
    made = []

    def compile_model(count):
        made.append(Model(count, failures if not made else ()))
        return made[-1]

    return BatchQueue(device or Device("cpu"), compile_model, batch, Admission(), drop_idle), made


def rule_of(dtype="uint8", stitch="crop", **changes):
    return PredictionRule(
        LATTICE, (3, 3, *LATTICE.tile), dtype, BOUNDS, 0.4, probability=True, stitch=stitch, **changes
    )


def gpu_predictor_of(queue, stitch="crop", **changes):
    return GpuPredictor(lambda: nullcontext(queue), rule_of(stitch=stitch, **changes), StageClock())


class OnTheCpu:
    """A backend of the CPU with the same network."""

    def __init__(self, network=network):
        self.network = network

    def compile(self, shape):
        return lambda batch, out=None: self.network(torch.from_numpy(batch).half()).float().numpy()

    def compile_bytes(self, shape):
        return None


def expected_of(image, block, stitch="crop", **changes):
    """What the CPU's predictor makes of a block."""
    return predictor_of(OnTheCpu(), rule_of(image.dtype, stitch, **changes)).predict(cut(image, block), block)


def cut(image, block):
    return image[(slice(None), *block.read_box.slices())]


def assert_same(result, expected):
    np.testing.assert_array_equal(result.mask, expected.mask)
    assert np.abs(result.probability.astype(int) - expected.probability).max() <= 1
    assert (result.foreground, result.missing) == (expected.foreground, expected.missing)
    assert 0 < result.foreground < result.mask.size


def image_of(dtype="uint8"):
    image = blobs(*LATTICE.shape).astype(dtype)
    if image.dtype.kind == "f":
        image[0, 40:43, 50:55] = np.nan
    return image


@pytest.mark.parametrize("stitch", ["crop", "blend"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "int32"])
def test_a_block_becomes_what_it_does_on_the_cpu(dtype, stitch):
    image, (queue, _) = image_of(dtype), queue_of(4)
    predictor = gpu_predictor_of(queue, stitch)
    for block in lay_blocks(LATTICE, 90, ring=stitch == "blend"):
        assert_same(predictor.predict(cut(image, block), block), expected_of(image, block, stitch))
    assert predictor.clock.seconds["model"] > 0


@pytest.mark.parametrize(("decoder", "downscale", "codes"), [("mask", 1, 2), ("seeds", 2, 4), ("hover", 1, 4)])
def test_pixel_codes_of_instances_are_those_of_the_cpu(decoder, downscale, codes):
    instances = InstanceRule(Instances(seed_level=0.4, border_level=0.35), downscale, Hover(border_level=-0.05))
    classes = ClassRule(("a", "b"), ("#000000", "#ffffff"), first=1, background=False)
    how = {"decoder": DECODERS[decoder], "instances": instances, "classes": classes}
    image, (queue, _) = image_of(), queue_of(4)
    (block,) = lay_blocks(LATTICE, 999)
    result, expected = gpu_predictor_of(queue, **how).predict(image, block), expected_of(image, block, **how)
    assert_same(result, expected)
    assert len(np.unique(result.mask)) == codes
    np.testing.assert_array_equal(result.classes, expected.classes)
    assert len(np.unique(result.classes)) == 2


def star_network(pixels):
    """Logits of pixels (N, C, H, W) in float16: a probability and three rays."""
    logits = network(pixels)
    return torch.cat([logits[:, :1], 6 + logits], dim=1)


class StarModel(Model):
    """A compiled model of stars."""

    def __init__(self, batch):
        super().__init__(batch)
        self.logits = torch.zeros(batch, 4, *LATTICE.tile, dtype=torch.half)

    def enqueue(self):
        self.logits.copy_(star_network(self.pixels))


def test_candidates_are_those_of_the_cpu():
    how = {"decoder": DECODERS["stardist"], "stars": StarRule(StarDist(), rays=3)}
    image, queue = image_of(), BatchQueue(Device("cpu"), StarModel, 4, Admission(), lambda: False)
    results = [gpu_predictor_of(queue, **how).predict(cut(image, block), block) for block in lay_blocks(LATTICE, 90)]
    there = predictor_of(OnTheCpu(star_network), rule_of(**how))
    for block, result in zip(lay_blocks(LATTICE, 90), results, strict=True):
        expected = there.predict(cut(image, block), block)
        for found, values in zip(result.stars, expected.stars, strict=True):
            np.testing.assert_array_equal(found, values)
        np.testing.assert_array_equal(result.probability, expected.probability)
        assert len(result.stars.y) > 20


def test_channels_that_are_interleaved_go_up_as_they_are():
    image, (queue, _) = np.ascontiguousarray(image_of().transpose(1, 2, 0)).transpose(2, 0, 1), queue_of(2)
    (block,) = lay_blocks(LATTICE, 999)
    assert_same(gpu_predictor_of(queue).predict(image, block), expected_of(image, block))


class Gated(Device):
    """A device that begins nothing until it is let; it notes its events and streams."""

    def __init__(self):
        super().__init__("cpu")
        self.gate, self.waits, self.log = threading.Event(), 0, []

    def event(self):
        device, event = self, super().event()

        class Watched(type(event)):
            stream = None

            def record(self, stream):
                super().record(stream)
                self.stream = stream.name

            def synchronize(self):
                device.waits += 1
                device.gate.wait()

        return Watched()

    def stream(self):
        device, stream = self, super().stream()

        class Watched(type(stream)):
            name = ("incoming", "computing", "outgoing")[len(device.log)]

            def wait_event(self, event):
                device.log.append((self.name, "waits for", event.stream))

        device.log.append("made")
        return Watched()


def run_in_threads(calls):
    """Results of calls that run at once, and the threads, which are still running."""
    results = [None] * len(calls)

    def keep(number, call):
        results[number] = call()

    threads = [threading.Thread(target=keep, args=one) for one in enumerate(calls)]
    for thread in threads:
        thread.start()
    return results, threads


def test_blocks_of_several_slides_fill_one_batch():
    image, device = image_of(), Gated()
    queue, models = queue_of(4, device=device)
    blocks = list(lay_blocks(LATTICE, 1))[:4]
    predictors = [gpu_predictor_of(queue) for _ in blocks]  # of four slides

    def call(number):
        return lambda: predictors[number].predict(cut(image, blocks[number]), blocks[number])

    results, threads = run_in_threads([call(number) for number in range(4)])
    while not models or not models[0].calls:  # the fourth completes the batch and launches it
        assert any(thread.is_alive() for thread in threads)
    device.gate.set()
    for thread in threads:
        thread.join()
    assert [(len(model.pixels), model.calls) for model in models] == [(4, 1)]
    for result, block in zip(results, blocks, strict=True):
        assert_same(result, expected_of(image, block))


@pytest.mark.parametrize(("batch", "launched"), [(2, 5), (4, 3), (9, 1), (20, 1)])
def test_what_does_not_fill_a_batch_is_launched_too(batch, launched):
    image, (queue, models) = image_of(), queue_of(batch)
    (block,) = lay_blocks(LATTICE, 999)
    assert len(block.tiles) == 9
    assert_same(gpu_predictor_of(queue).predict(image, block), expected_of(image, block))
    assert [model.calls for model in models] == [launched]


def test_a_block_of_full_batches_waits_once_and_streams_wait_for_each_other():
    image, device = image_of(), Gated()
    device.gate.set()
    queue, _ = queue_of(3, device=device)
    (block,) = lay_blocks(LATTICE, 999)
    gpu_predictor_of(queue).predict(image, block)
    assert device.waits == 1
    assert device.log[3:] == [("computing", "waits for", "incoming")] * 3 + [("outgoing", "waits for", "computing")]


FULL = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("when", [0, 1, 2])
def test_when_memory_runs_out_the_rest_goes_on_in_smaller_batches(when, monkeypatch):
    said = []
    monkeypatch.setattr(batch_queue._log, "warning", lambda text, *values: said.append(text % values))
    image, (queue, models) = image_of(), queue_of(4, [None] * when + [FULL])
    predictor = gpu_predictor_of(queue)
    (block,) = lay_blocks(LATTICE, 999)
    assert_same(predictor.predict(image, block), expected_of(image, block))
    done = 4 * when
    assert [(len(model.pixels), model.calls) for model in models] == [(4, when + 1), (2, -(-(9 - done) // 2))]
    assert queue.batch == 2
    assert "batches of 2 tiles from now on" in said[0]
    assert_same(predictor.predict(image, block), expected_of(image, block))


def test_memory_that_runs_out_between_two_blocks_of_a_batch_counts_nothing_twice(monkeypatch):
    """The first block's part of the batch is stitched, the second one's fails, and the batch is done again."""
    image, (queue, _) = image_of(), queue_of(18)
    (block,) = lay_blocks(LATTICE, 999)
    real, parts = gpu_predictor._BlockOnDevice.stitch, []

    def stitch(self, first, last, logits):
        parts.append(self)
        if len(parts) == 2:
            raise FULL
        real(self, first, last, logits)

    monkeypatch.setattr(gpu_predictor._BlockOnDevice, "stitch", stitch)
    first, second = (gpu_predictor._BlockOnDevice(queue, rule_of(), StageClock(), image, block) for _ in range(2))
    with queue._lock:
        thread = threading.Thread(target=queue.run, args=(first,))
    thread.start()
    queue.run(second)
    thread.join()
    expected = expected_of(image, block)
    for one in (first, second):
        mask, *_, counts = one.fetch()
        np.testing.assert_array_equal(mask, expected.mask)
        assert counts == (expected.foreground, 0)


def test_memory_that_a_block_cannot_have_makes_smaller_batches(monkeypatch):
    image, (queue, _) = image_of(), queue_of(4)
    (block,) = lay_blocks(LATTICE, 999)
    real, failures = Device.empty, [FULL]

    def empty(self, shape, dtype):
        if failures:
            raise failures.pop()
        return real(self, shape, dtype)

    monkeypatch.setattr(Device, "empty", empty)
    assert_same(gpu_predictor_of(queue).predict(image, block), expected_of(image, block))
    assert queue.batch == 2


def test_a_device_too_small_for_one_tile_is_named_and_the_queue_lives_on():
    image, (queue, _) = image_of(), queue_of(1, [FULL])
    (block,) = lay_blocks(LATTICE, 999)
    with pytest.raises(ComputeError, match=r"memory is full.*smaller `tile` or `block`"):
        gpu_predictor_of(queue).predict(image, block)
    assert_same(gpu_predictor_of(queue).predict(image, block), expected_of(image, block))


def test_an_error_of_the_network_reaches_its_block_and_no_later_one():
    image, (queue, _) = image_of(), queue_of(4, [None, RuntimeError("an illegal memory access")])
    (block,) = lay_blocks(LATTICE, 999)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        gpu_predictor_of(queue).predict(image, block)
    assert_same(gpu_predictor_of(queue).predict(image, block), expected_of(image, block))


def test_nan_is_refused(monkeypatch):
    image, (queue, _) = image_of(), queue_of(4)
    monkeypatch.setattr(Model, "enqueue", lambda self: self.logits.fill_(torch.nan))
    (block,) = lay_blocks(LATTICE, 999)
    with pytest.raises(ComputeError, match=r"12000 NaN.*overflow"):
        gpu_predictor_of(queue).predict(image, block)


@pytest.mark.parametrize("stitch", ["crop", "blend"])
def test_a_run_shares_its_blocks_among_two_gpus(monkeypatch, tmp_path, segment, stitch):
    image = blobs(150, 130)
    slides = [write_ome_zarr(tmp_path / f"{name}.zarr", image) for name in ("cpu", "gpu")]
    expected = labels_of(segment(slides[0], tile=80, block=64, stitch=stitch))
    asked = []

    def device(name):
        asked.append(name)
        return Device("cpu")

    monkeypatch.setattr(cuda, "available", lambda: True)
    monkeypatch.setattr(cuda, "Device", device)
    how = {"backend": "torch-cuda", "precision": "auto", "gate": False, "device": "cuda:0,1", "batch": 2}
    report = segment(slides[1], tile=80, block=64, workers=1, stitch=stitch, **how)
    assert (report.backend, report.precision) == ("torch-cuda", "fp16")
    assert set(asked) == {"cuda:0", "cuda:1"}
    assert report.stages["model"] > 0
    assert (labels_of(report) != expected).mean() < 0.01
