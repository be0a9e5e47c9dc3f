"""What plan announces is what a run then takes."""

import json

import numpy as np
import pytest
import zarr

from cellseg_batch.engine.reports.plan import estimate, pixels_read
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.slides.discover import find_images
from tests.support.images import blobs, write_ome_zarr


@pytest.fixture
def usual(tiny_model):
    return {"model": str(tiny_model), "backend": "torch", "precision": "fp32", "threads": 1, "tile": 96, "block": 128}


def announced(path, usual, processes=1, **changes):
    return estimate([path], Settings(**{**usual, **changes}), processes, lambda: None)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("probability", [False, True])
def test_counts_are_those_of_the_run(tmp_path, segment, usual, watcher, version, probability):
    image = np.stack([blobs(300, 260, 1, seed)[0] for seed in range(2)])
    path = write_ome_zarr(tmp_path / "in" / "a.zarr", image, "zyx", version)
    out = tmp_path / "out"
    found = announced(path, usual, output=out, probability=probability)
    assert not out.exists(), "a plan writes nothing"
    report = segment(path, output=out, probability=probability)
    (one,), (done,) = found.slides, report.slides
    assert (one.blocks, one.tiles, one.pixels) == (done.blocks, done.tiles, 2 * 300 * 260)
    assert one.bytes_in == sum(block.read_box.area for block in watcher.plans[-1].grid)
    assert one.bytes_out == (1 + probability) * 2 * (300 * 260 + 150 * 130)
    files = sum(1 for _ in out.rglob("*"))
    assert 0.8 * one.files <= files <= one.files
    assert one.peak_bytes >= report.planned_peak_bytes * 0.5
    assert one.seconds > 0


def test_instances_take_four_bytes_a_pixel(tmp_path, usual):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(200, 200), levels=1)
    mask, ids = (announced(path, usual, instances=instances).slides[0] for instances in (False, True))
    assert (mask.bytes_out, ids.bytes_out) == (200 * 200, 4 * 200 * 200)
    assert ids.files > mask.files


def test_time_is_shared_by_processes(tmp_path, usual):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(200, 200))
    found = announced(path, usual, processes=4)
    assert found.seconds == pytest.approx(sum(one.seconds for one in found.slides) / 4)
    assert found.mpx_per_s > 0


def test_pixels_read_of_any_grid(tmp_path, usual, segment, watcher):
    segment(write_ome_zarr(tmp_path / "a.zarr", blobs(411, 173)))
    grid = watcher.plans[0].grid
    assert len(grid) > 2
    assert pixels_read(grid) == sum(block.read_box.area for block in grid)


def test_what_cannot_be_is_refused_with_numbers(tmp_path, usual, command):
    write_ome_zarr(tmp_path / "in" / "good.zarr", blobs(100, 100))
    zarr.create_array(str(tmp_path / "in" / "huge.zarr"), shape=(10**12, 10**12), chunks=(512, 512), dtype="uint8")
    flags = [f"--{name}={value}" for name, value in usual.items()]
    code, said = command("plan", tmp_path / "in", *flags, "--json", tmp_path / "plan.json")
    assert code == 1
    assert str(10**24) in said
    content = json.loads((tmp_path / "plan.json").read_text())
    assert (content["images"], content["refused"]) == (2, 1)
    assert content["seconds"] > 0
    assert not list(tmp_path.rglob("labels"))


def test_memory_that_does_not_suffice_is_refused(tmp_path, usual):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(300, 300))
    roomy = announced(path, usual)
    assert not roomy.refused
    # The sample alone does not fit either, and the run says so.
    assert announced(path, usual, max_memory=10**6).refused[0].reason


def test_a_sample_that_cannot_be_read_is_named(tmp_path, usual):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(100, 100), levels=1)
    for chunk in (path / "0" / "c").rglob("*"):
        if chunk.is_file():
            chunk.write_bytes(b"damaged")
    (one,) = announced(path, usual).refused
    assert "sample" in one.reason


def test_the_first_plane(tmp_path):
    (slide,) = find_images(write_ome_zarr(tmp_path / "a.zarr", np.zeros((2, 1, 3, 40, 50), np.uint8), "tczyx"))
    assert [level.shape for level in slide.first_plane().levels] == [(1, 1, 1, 40, 50), (1, 1, 1, 20, 25)]


def test_a_slide_of_many_tiles_and_a_model_that_takes_percentiles(tmp_path, command):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(300, 300))
    flags = ["--backend", "torch", "--precision", "fp32", "--threads", 1, "--tile", 192]
    code, said = command("plan", path, "--model", "nuclei", *flags, "--json", tmp_path / "plan.json")
    assert code == 0, said
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["tiles"] >= 9
    assert content["seconds"] > 0
