"""A limit of memory holds for images of different sizes, whatever their order."""

import json
import subprocess
import sys
import weakref
from itertools import permutations

import pytest
from PIL import Image

from cellseg_batch.engine.inference import model_pool, session
from cellseg_batch.engine.run import warm_up
from cellseg_batch.engine.run.memory_model import RUN_OVERHEAD_BYTES
from tests.support.images import blobs

# What a network takes in `heavy_networks`, in bytes for each px of its tile.
_WEIGHT = 10_000


def write_picture(path, side):
    Image.fromarray(blobs(side, side).transpose(1, 2, 0)).save(path)
    return path


@pytest.fixture
def heavy_networks(monkeypatch):
    """Have each network weigh 10 kB for each px of its tile, and the rest of the process nothing.

    A call forgets the networks so far, and returns a list for the memory after each compilation from then on.
    """
    networks, peaks = [], []

    def forget():
        networks.clear()
        peaks.clear()
        return peaks

    def resident():
        alive = (network() for network in networks)
        return sum(_WEIGHT * one.shape[2] * one.shape[3] for one in alive if one is not None)

    def compile_network(*arguments):
        network = session.compile_network(*arguments)
        networks.append(weakref.ref(network))
        peaks.append(resident())
        return network

    monkeypatch.setattr(model_pool, "compile_network", compile_network)
    for name in ("resident_bytes", "peak_resident_bytes"):
        monkeypatch.setattr(warm_up, name, resident)
    return forget


@pytest.mark.parametrize("room", [-20_000_000, 20_000_000])
@pytest.mark.parametrize("workers", [1, 3])
def test_networks_of_other_images_take_no_room(tmp_path, segment, heavy_networks, room, workers):
    sides = (200, 304, 250)
    paths = [write_picture(tmp_path / f"{side}.png", side) for side in sides]
    largest = _WEIGHT * (304 + 2 * 8) ** 2  # one tile, with its margins
    limit = largest + RUN_OVERHEAD_BYTES + room
    for number, order in enumerate(permutations(range(len(sides)))):
        peaks = heavy_networks()
        inputs = [paths[index] for index in order]
        report = segment(*inputs, tile=400, workers=workers, max_memory=limit, output=tmp_path / str(number))
        states = {sides[index]: slide.status for index, slide in zip(order, report.slides, strict=True)}
        assert states == {200: "done", 250: "done", 304: "done" if room > 0 else "failed"}, order
        assert max(peaks) == largest, order
        assert report.planned_peak_bytes <= limit


@pytest.mark.slow
def test_announced_and_limited_memory_of_a_real_network(tmp_path):
    """Eager torch gives back what a large tile took; only its peak shows it."""
    small, large = (write_picture(tmp_path / f"{side}.png", side) for side in (256, 1024))
    flags = ["--backend", "torch", "--precision", "fp32", "--no-gate", "--objects", "--downscale", "1"]

    def run(*inputs, limit=None):
        command = [sys.executable, "-m", "cellseg_batch.engine.cli.main", "run", *map(str, inputs), *flags]
        command += ["--overwrite", "-o", str(tmp_path / "out"), "--json", str(tmp_path / "run.json")]
        command += [] if limit is None else ["--max-memory", str(limit)]
        subprocess.run(command, check=False, capture_output=True)
        return json.loads((tmp_path / "run.json").read_text())

    needs = {}
    for inputs in ((small,), (large,), (small, large), (large, small)):
        report = run(*inputs)
        assert report["peak_rss_bytes"] <= report["planned_peak_bytes"]
        needs[inputs] = report["planned_peak_bytes"]
    assert needs[small, large] >= needs[large,]
    too_little = (needs[small,] + needs[large,]) // 2
    for limit, verdict in ((too_little, "failed"), (needs[large,], "done")):
        for inputs in ((large,), (small, large), (large, small)):
            report = run(*inputs, limit=limit)
            states = dict(zip(inputs, (slide["status"] for slide in report["slides"]), strict=True))
            assert states == dict.fromkeys(inputs, "done") | {large: verdict}
            assert report["planned_peak_bytes"] <= limit
            assert verdict == "failed" or report["peak_rss_bytes"] <= limit
