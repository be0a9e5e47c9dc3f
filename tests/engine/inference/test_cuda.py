"""The backends and devices for GPUs, on a CPU in a GPU's place; nothing here has run on hardware."""

import functools
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from cellseg_batch.engine import machine
from cellseg_batch.engine.errors import BackendError
from cellseg_batch.engine.inference.backends import cuda
from cellseg_batch.engine.inference.backends.cuda import Device, GraphedHalf, is_out_of_memory
from cellseg_batch.engine.inference.backends.registry import candidates, make_backend, why_not
from cellseg_batch.engine.models import build_torch_network
from cellseg_batch.engine.scheduling import dask_pools as clusters
from cellseg_batch.engine.settings import ClusterSettings, Settings
from cellseg_batch.engine.storage.cache import Artefacts

SHAPE = (2, 3, 64, 96)


@pytest.fixture
def gpu_on_the_cpu(monkeypatch):
    """A machine where every GPU is the CPU, and torch.compile only traces."""
    monkeypatch.setattr(cuda, "available", lambda: True)
    monkeypatch.setattr(cuda, "Device", lambda name: Device("cpu"))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


@pytest.mark.usefixtures("gpu_on_the_cpu")
@pytest.mark.parametrize("name", ["torch-cuda", "torch-compile"])
def test_torch_on_a_gpu_agrees_with_the_plain_network(tiny_bundle, name):
    batch = np.random.default_rng(0).random(SHAPE, np.float32)
    backend = make_backend(tiny_bundle, name, "fp16", 1, Artefacts(), "cuda:1")
    assert (backend.name, backend.precision) == (name, "fp16")
    model = backend.compile(SHAPE)
    logits = model(batch).copy()
    with torch.inference_mode():
        expected = build_torch_network(tiny_bundle)(torch.from_numpy(batch)).numpy()
    np.testing.assert_allclose(logits, expected, atol=np.abs(expected).max() * 1e-2)
    model.pixels.copy_(torch.from_numpy(batch[::-1].copy()))
    model.enqueue()
    np.testing.assert_array_equal(model.logits.float().flip(0), logits)
    model.repeat()
    np.testing.assert_array_equal(model.logits.float().flip(0), logits)


@pytest.mark.usefixtures("gpu_on_the_cpu")
def test_a_folder_of_images_may_have_any_number_of_shapes(tiny_bundle):
    backend = make_backend(tiny_bundle, "torch-compile", "fp16", 1, Artefacts())
    stride = tiny_bundle.card.total_stride
    with ThreadPoolExecutor(1) as worker:  # torch's settings belong to a thread, and runs compile in worker threads
        for columns in range(1, 12):  # torch gives up at the ninth unless told otherwise
            shape = (1, 3, stride, columns * stride)
            assert worker.submit(backend.compile, shape).result().logits.shape[3] == columns * stride


@pytest.mark.usefixtures("gpu_on_the_cpu")
def test_a_dropped_model_leaves_at_once(tiny_bundle):
    model = make_backend(tiny_bundle, "torch-cuda", "fp16", 1, Artefacts()).compile(SHAPE)
    left = weakref.ref(model)
    del model
    assert left() is None


def test_without_a_gpu_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(cuda, "available", lambda: False)
    for name in ("torch-cuda", "torch-compile"):
        assert why_not(name, "fp16").count("install the CUDA build of torch") == 1
        assert "offers fp16" in why_not(name, "fp32")


def test_candidates_are_those_of_the_device_that_was_asked_for():
    everything = candidates("safetensors", "auto", "auto")
    on_cpu, on_gpu = (
        candidates("safetensors", "auto", "auto", "cpu"),
        candidates("safetensors", "auto", "auto", "cuda:1"),
    )
    assert {name for name, _ in on_gpu} == {"torch-cuda", "torch-compile", "tensorrt"}
    assert sorted(on_cpu + on_gpu) == sorted(everything)
    assert candidates("safetensors", "openvino", "auto", "cuda:0") == []


@pytest.mark.parametrize(
    ("visible", "how", "expected"),
    [
        ("2,GPU-1b", {}, ["2", "GPU-1b"]),
        ("2,GPU-1b", {"device": "cuda:1"}, ["GPU-1b"]),
        ("2,5,7", {"device": "cuda:0,2"}, ["2", "7"]),
        ("2", {"device": "cpu"}, []),
        ("2", {"backend": "openvino"}, []),
        ("", {}, []),
        ("-1", {"device": "cuda"}, []),
    ],
)
def test_each_process_gets_one_of_the_visible_gpus(monkeypatch, visible, how, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert clusters._devices(Settings(**how)) == expected


def test_a_process_with_a_gpu_has_its_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(clusters, "cores", lambda: 13)
    for visible, threads in (("0,1,2", 4), ("0", 13), ("0,1,2,3,4,5,6,7", 2), ("", 2)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert clusters.threads_per_process(Settings(scheduler="processes")) == threads
    for gres, cores, threads in (("gpu:1", 8, 8), ("gpu:1", None, 2), (None, 8, 2)):
        resources = ClusterSettings(gres=gres, cores=cores)
        assert clusters.threads_per_process(Settings(scheduler="slurm", cluster=resources)) == threads


def test_several_processes_share_a_gpu_that_has_many_cores(monkeypatch):
    for count, visible, expected, share, threads in (
        (16, "0", ["0", "0"], 0.45, 8),
        (64, "5,7", ["5", "7"] * 4, 0.225, 8),
        (256, "0", ["0"] * 4, 0.225, 32),
        (15, "0", ["0"], 1.0, 15),
    ):
        monkeypatch.setattr(clusters, "cores", lambda count=count: count)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        settings = Settings(scheduler="processes")
        assert clusters.threads_per_process(settings) == threads
        slots = clusters._worker_slots("tcp://x", clusters._devices(settings), 3, threads)
        assert [slot.device for slot in slots] == expected
        assert {slot.gpu_share for slot in slots} == {share}
    assert len(clusters._worker_slots("tcp://x", [], 3, 2)) == 3


def test_a_process_takes_no_more_than_its_share_of_a_gpu(monkeypatch):
    """Each sees the free memory of the whole device."""
    shares = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *limit: shares.append(limit))
    Device("cuda:0")
    monkeypatch.setenv(machine.GPU_SHARE, "0.45")
    Device("cuda:1")
    Device("cpu")
    assert shares == [(0.45, torch.device("cuda:1"))]


def test_gpus_are_counted_where_the_drivers_files_are_hidden(nvidia_driver):
    """As in WSL 2 and gVisor."""
    nvidia_driver("NVIDIA H200\nNVIDIA L4", "580.1")
    assert machine.gpus() == ["NVIDIA H200", "NVIDIA L4", "visible: all"]
    assert machine.visible_gpus() == ["0", "1"]


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert Device("cuda:0").is_gpu
    with pytest.raises(BackendError, match=r"device=cuda:1.*1 of them.*CUDA_VISIBLE_DEVICES"):
        Device("cuda:1")


def test_nothing_runs_before_it_is_captured():
    buffers = GraphedHalf((1, 1, 4, 4), (1, 1, 4, 4), Device("cpu"))
    with pytest.raises(RuntimeError, match="before anything was captured"):
        buffers.enqueue()


def test_a_full_device_is_told_in_any_librarys_way():
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert is_out_of_memory(RuntimeError("GET was unable to find an engine to execute this computation"))
    assert is_out_of_memory(RuntimeError("IExecutionContext: Error Code 2: OutOfMemory (Requested size was 128 bytes)"))
    cause = "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB."
    assert is_out_of_memory(BackendError("TensorRT", expected="to load", found=cause, remedy="a smaller --batch"))
    assert not is_out_of_memory(RuntimeError("an illegal memory access"))
