"""The bottleneck that a profile names, and what it predicts.

Where a bottleneck is planted, time passes only where a test says so, whatever the machine is doing meanwhile.
"""

import json
import threading
import time

import numcodecs
import numpy as np
import pytest
import zarr
from numcodecs.abc import Codec
from PIL import Image
from skimage.io import imread
from zarrs import ZarrsCodecPipeline

from cellseg_batch.engine.errors import UsageError
from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.inference.backends.torch_cpu import TorchBackend
from cellseg_batch.engine.profiling import gpu_meter as meters
from cellseg_batch.engine.profiling.bottleneck import StageUse, describe_bottleneck, find_bottleneck
from cellseg_batch.engine.profiling.gpu_meter import GpuMeter
from cellseg_batch.engine.profiling.profile import profile_slide
from cellseg_batch.engine.profiling.read_experiment import Storage, copy_slide
from cellseg_batch.engine.profiling.sample import SIDE, take_sample
from cellseg_batch.engine.profiling.timeline import chrome_trace, occupied, predict_seconds, shares
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.slides.discover import find_images
from cellseg_batch.engine.slides.reader import SlideReader
from cellseg_batch.engine.stage_clock import Interval
from cellseg_batch.engine.storage.paths import RemotePath
from tests.support.images import blobs, write_ome_zarr


@pytest.fixture
def profiled(tiny_model, watcher):
    def call(path, **changes):
        usual = {"model": str(tiny_model), "backend": "torch", "precision": "fp32", "threads": 1, "downscale": 1}
        return profile_slide(path, Settings(**{**usual, "tile": 96, "block": 160, "workers": 1, **changes}), watcher)

    return call


class PlantedTime:
    """A clock that moves when it is told to, and by a microsecond when it is looked at."""

    def __init__(self):
        self.now = 0.0
        self.lock = threading.Lock()

    def spend(self, seconds):
        with self.lock:
            self.now += seconds
            return self.now

    def __call__(self):
        return self.spend(1e-6)


@pytest.fixture
def planted(monkeypatch):
    clock = PlantedTime()
    monkeypatch.setattr(time, "perf_counter", clock)
    compile_model = TorchBackend.compile

    def compile_slow(self, shape):
        model = compile_model(self, shape)

        def run(batch, **more):
            clock.spend(0.01)
            return model(batch, **more)

        return run

    monkeypatch.setattr(TorchBackend, "compile", compile_slow)
    return clock


def slow_store(monkeypatch, planted, seconds, below):
    """Every chunk of a store below the folder ``below`` takes a while."""
    read = ZarrsCodecPipeline.read

    async def read_late(self, chunks, out, drop_axes=()):
        chunks = list(chunks)
        if str(self.store.root).startswith(str(below)):
            planted.spend(seconds * len(chunks))
        await read(self, chunks, out, drop_axes)

    monkeypatch.setattr(ZarrsCodecPipeline, "read", read_late)


class SlowCodec(Codec):
    """Takes a while to decode."""

    codec_id = "slow-for-tests"
    clock = None

    def encode(self, buf):
        return buf

    def decode(self, buf, out=None):
        self.clock.spend(0.1)
        return buf


numcodecs.register_codec(SlowCodec)


def test_a_model_that_never_waits_is_the_bottleneck(tmp_path, planted, profiled):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(320, 320, 1), chunk=160)
    # With one worker: the planted clock runs for all threads, so writing beside the model would seem to take long.
    found = profiled(path)
    assert found.bottleneck == "model"
    assert "the model stage is busy 100% of the time and runs at 100% of its speed alone" in found.verdict
    assert found.trial is None
    assert sum(found.shares.values()) == pytest.approx(1)
    assert {use.stage for use in found.stages} == {"read", "gather", "model", "stitch", "write", "pyramid"}
    assert list(tmp_path.iterdir()) == [path], "a profile leaves nothing behind"


def test_a_slow_store_is_named(tmp_path, monkeypatch, planted, profiled):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(320, 320, 1), chunk=160)
    slow_store(monkeypatch, planted, 0.1, path)
    found = profiled(path)
    assert (found.bottleneck, found.trial.cause) == ("read", "store")
    assert "a copy on a local disk would help" in found.verdict


def test_tiny_chunks_are_named_and_the_prediction_holds(tmp_path, monkeypatch, planted, profiled):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(320, 320, 1), chunk=16)
    slow_store(monkeypatch, planted, 0.002, "/")
    found = profiled(path)
    assert (found.bottleneck, found.trial.cause) == ("read", "chunks")
    assert found.trial.predicted == pytest.approx(found.trial.measured, rel=0.25)
    assert found.trial.measured > 1.5
    assert f"chunks of 512 px would help: {found.trial.predicted:.2g}x predicted" in found.verdict


def test_a_slow_codec_is_named(tmp_path, monkeypatch, planted, profiled):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(320, 320, 1), version="0.4", levels=1)
    group = zarr.open_group(str(path), mode="r+")
    pixels = group["0"][...]
    group.create_array(
        "0",
        shape=pixels.shape,
        dtype=pixels.dtype,
        chunks=(1, 160, 160),
        compressors=SlowCodec(),
        chunk_key_encoding={"name": "v2", "separator": "/"},
        overwrite=True,
    )
    group["0"][...] = pixels
    monkeypatch.setattr(SlowCodec, "clock", planted)
    found = profiled(path)
    assert (found.bottleneck, found.trial.cause) == ("read", "codec")


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_copy_of_a_compressed_plain_array_has_its_codecs(tmp_path, zarr_format):
    pixels = blobs(96, 96, 1)[0]
    codec = numcodecs.Zlib(1) if zarr_format == 2 else zarr.codecs.GzipCodec()
    array = zarr.create_array(
        str(tmp_path / "a.zarr"), data=pixels, chunks=(32, 32), compressors=codec, zarr_format=zarr_format
    )
    (slide,) = find_images(tmp_path / "a.zarr", None)
    copy = copy_slide(slide, 0, tmp_path / "copy", Storage(chunk=64))
    assert zarr.open_array(str(tmp_path / "copy/0"), mode="r").compressors == array.compressors
    with SlideReader(copy, 0, (0,)) as reader:
        assert np.array_equal(reader.read(0, Box(0, 0, 96, 96))[0], pixels)


def test_a_profile_does_not_write_to_an_object_store(tmp_path, profiled):
    with pytest.raises(UsageError, match="`output`"):
        profiled(write_ome_zarr(tmp_path / "a.zarr", blobs(96, 96, 1)), output=RemotePath("s3://bucket/there"))


def test_the_command_writes_table_chart_trace_and_json(tmp_path, tiny_model, command):
    Image.fromarray(blobs(100, 120, 1)[0]).save(tmp_path / "a.png")
    chart, trace, report = tmp_path / "p.png", tmp_path / "t.json", tmp_path / "r.json"
    flags = ["--model", tiny_model, "--backend", "torch", "--precision", "fp32", "--tile", 96, "--downscale", 1]
    files = ["--chart", chart, "--trace", trace, "--json", report]
    code, said = command("profile", tmp_path / "a.png", *flags, *files)
    content = json.loads(report.read_text())
    assert code == 0
    assert content["verdict"] in said
    assert content["megapixels"] == pytest.approx(0.012)
    assert imread(chart).shape[1] > 500
    events = json.loads(trace.read_text())["traceEvents"]
    assert {"read", "model", "write"} <= {event["name"] for event in events}
    assert not list(tmp_path.glob("a.cellseg*"))


def test_the_sample_is_bounded_and_a_plate_gives_several_fields(tmp_path):
    large = zarr.create_array(str(tmp_path / "l.zarr"), shape=(3, 9000, 20000), dtype="uint8", chunks=(3, 512, 512))
    assert large.ndim == 3
    (part,) = take_sample(tmp_path / "l.zarr", Settings(), None)
    assert part.plane_shape(0) == (SIDE, SIDE)
    assert part.levels[0].origin == (0, 5632)
    stack = zarr.create_array(
        str(tmp_path / "s.zarr"), shape=(40, 4096, 4096), dtype="uint8", chunks=(1, 4096, 4096), dimension_names="zyx"
    )
    assert take_sample(tmp_path / "s.zarr", Settings(), None)[0].planes(0) == 4 < stack.shape[0]
    for number in range(3):
        write_ome_zarr(tmp_path / "plate" / f"{number}.zarr", np.zeros((1, 64, 64), np.uint8))
    assert len(take_sample(tmp_path / "plate", Settings(), None)) == 3


def interval(stage, start, end, thread=1):
    return Interval(stage, thread, start, end)


def test_waiting_is_shared_by_what_keeps_the_workers():
    timeline = [
        interval("read", 0, 6),
        interval("model", 6, 7),
        interval("stitch", 7, 8),
        interval("write", 8, 10),
        interval("pyramid", 11, 12),  # after 1 s of nothing
    ]
    one = {"read": 6, "model": 1, "stitch": 1, "write": 2, "pyramid": 1, "scheduler": 1}
    assert shares(timeline, workers=1) == pytest.approx({stage: n / 12 for stage, n in one.items()})
    two = {"read": 3 * 6 / 8, "model": 1, "stitch": 1, "write": 3 * 2 / 8, "pyramid": 1, "scheduler": 1}
    assert shares(timeline, workers=2) == pytest.approx({stage: n / 7 for stage, n in two.items()})
    five = shares(timeline, workers=5)
    assert (five["read"], five["write"]) == (0, 0)
    assert occupied([interval("read", 0, 2), interval("read", 1, 3), interval("read", 5, 6)]) == 4


def test_the_trace_has_microseconds_from_the_first_work_on():
    events = chrome_trace([interval("read", 5, 6), interval("model", 7, 9, thread=4)])["traceEvents"]
    assert events[1] == {"name": "model", "cat": "device", "ph": "X", "ts": 2e6, "dur": 2e6, "pid": 1, "tid": 4}


def test_seconds_of_blocks_that_share_a_device():
    assert predict_seconds(blocks=4, workers=1, read=1, device=2, write=3) == 24
    assert predict_seconds(blocks=10, workers=3, read=1, device=2, write=1) == 1 + 20 + 1
    assert predict_seconds(blocks=6, workers=3, read=6, device=1, write=0) == 6 + 1 + 6 + 3


@pytest.mark.parametrize(
    ("parts", "bottleneck", "words"),
    [
        ({"model": 0.9, "gather": 0.05, "read": 0.05}, "model", "at most 1.05x to gain elsewhere; a faster model"),
        ({"model": 0.2, "gather": 0.7, "read": 0.1}, "gather", "gather-bound: the gather stage is busy 70%"),
        ({"model": 0.4, "write": 0.5, "scheduler": 0.1}, "write", "the model waits 60% of the time, 50% for writing"),
        ({"model": 0.4, "read": 0.1, "scheduler": 0.5}, "scheduler", "larger blocks"),
    ],
)
def test_the_verdict_follows_from_the_shares(parts, bottleneck, words):
    uses = {stage: StageUse(stage, 1, share, share, 10, 10, None) for stage, share in parts.items()}
    uses.pop("scheduler", None)
    assert find_bottleneck(parts) == bottleneck
    assert words in describe_bottleneck(bottleneck, parts, uses, "")


def test_the_meter_reads_utilisation_and_energy_and_does_without_a_gpu(monkeypatch):
    class Nvml:
        NVMLError = RuntimeError
        energy = 1000

        def nvmlInit(self): ...
        def nvmlShutdown(self): ...

        def nvmlDeviceGetCount(self):
            return 1

        def nvmlDeviceGetHandleByIndex(self, index):
            return index

        def nvmlDeviceGetTotalEnergyConsumption(self, handle):
            self.energy += 2500
            return self.energy

        def nvmlDeviceGetUtilizationRates(self, handle):
            return type("Rates", (), {"gpu": 70})

    monkeypatch.setattr(meters.importlib, "import_module", lambda name: Nvml())
    with GpuMeter() as meter:
        pass
    assert meter.figures == {"gpu_utilisation": 70, "gpu_utilisation_peak": 70, "gpu_energy_j": 2.5}

    class Older(Nvml):
        def nvmlDeviceGetUtilizationRates(self, handle):
            raise self.NVMLError

        def nvmlDeviceGetTotalEnergyConsumption(self, handle):
            raise self.NVMLError

    monkeypatch.setattr(meters.importlib, "import_module", lambda name: Older())
    with GpuMeter() as meter:
        pass
    assert meter.figures == {}

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(meters.importlib, "import_module", missing)
    with GpuMeter() as meter:
        pass
    assert meter.figures == {}
