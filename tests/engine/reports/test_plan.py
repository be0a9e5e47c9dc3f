"""What plan announces is what a run then takes."""

import gc
import json
import weakref
from dataclasses import replace

import numpy as np
import pytest
import zarr
from PIL import Image

from cellseg_batch.engine.geometry import fit_lattice, lay_blocks
from cellseg_batch.engine.inference import model_pool, session
from cellseg_batch.engine.reports import plan
from cellseg_batch.engine.reports.plan import estimate, pixels_read
from cellseg_batch.engine.run import warm_up
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.slides.discover import find_images
from cellseg_batch.trainer.bundle import save_bundle
from tests.support.images import blobs, write_ome_zarr, write_plate


@pytest.fixture
def usual(tiny_model):
    return {"model": str(tiny_model), "backend": "torch", "precision": "fp32", "threads": 1, "tile": 96, "block": 128}


def announced(path, usual, processes=1, **changes):
    return estimate([path], Settings(**{**usual, **changes}), processes, lambda _: None)


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


def test_instances_take_four_bytes_a_pixel_and_cells_as_many(tmp_path, usual, command):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(200, 200), levels=1)
    mask, ids = (announced(path, usual, instances=instances).slides[0] for instances in (False, True))
    assert (mask.bytes_out, ids.bytes_out) == (200 * 200, 4 * 200 * 200)
    assert ids.files > mask.files
    cells = announced(path, usual, expand=3.0).slides[0]
    assert cells.bytes_out == 2 * ids.bytes_out
    assert cells.files > ids.files
    flags = ["--model", usual["model"], "--backend", "torch", "--precision", "fp32", "--tile", 96, "--block", 128]
    code, text = command("plan", path, *flags, "--expand", 3, "--json", tmp_path / "plan.json")
    assert code == 0, text
    assert json.loads((tmp_path / "plan.json").read_text())["slides"][0]["bytes_out"] == cells.bytes_out


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
    assert str(10**12) in said
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
    flags = ["--backend", "torch", "--precision", "fp32", "--threads", 1, "--tile", 288]
    code, said = command("plan", path, "--model", "nuclei", *flags, "--json", tmp_path / "plan.json")
    assert code == 0, said
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["tiles"] >= 9
    assert content["seconds"] > 0


def large_slide(path, side):
    """A slide of which only the middle has been written: the rest is as the array's fill value."""
    group = zarr.open_group(str(path), mode="w")
    array = group.create_array("0", shape=(3, side, side), chunks=(3, 512, 512), dtype="uint8", fill_value=20)
    middle = slice(side // 2 - 512, side // 2 + 512)
    array[:, middle, middle] = blobs(1024, 1024)
    axes = [{"name": "c", "type": "channel"}, *({"name": axis, "type": "space"} for axis in "yx")]
    scale = [{"type": "scale", "scale": [1.0, 0.5, 0.5]}]
    datasets = [{"path": "0", "coordinateTransformations": scale}]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets, "name": "large"}]}
    return path


@pytest.mark.parametrize("side", [8192, 32768])
@pytest.mark.parametrize("objects", [[], ["--objects"]])
def test_large_slides_through_the_command_line(tmp_path, command, side, objects):
    path = large_slide(tmp_path / "a.zarr", side)
    flags = [
        "--backend",
        "openvino",
        "--precision",
        "fp32",
        "--no-gate",
        "--tile",
        512,
        "--block",
        2048,
        "--downscale",
        1,
    ]
    code, said = command("plan", path, *flags, *objects, "--json", tmp_path / "plan.json")
    assert code == 0, said
    content = json.loads((tmp_path / "plan.json").read_text())
    (slide,) = content["slides"]
    grid = lay_blocks(fit_lattice((side, side), 512, 96, 16), 2048)
    rows, columns = grid.lattice.grid
    assert (slide["tiles"], slide["blocks"], slide["pixels"]) == (rows * columns, len(grid), side**2)
    assert slide["tiles"] >= (side // (512 - 2 * 96)) ** 2
    assert slide["bytes_in"] == 3 * (pixels_read(grid) + bool(objects) * side**2)
    assert slide["bytes_out"] == (4 if objects else 1) * side**2
    assert slide["seconds"] == pytest.approx(side**2 / 1e6 / content["mpx_per_s"])
    assert (slide["objects"] is not None) == bool(objects)
    assert slide["peak_bytes"] > 100e6


def test_a_plate_with_objects_is_what_the_run_then_writes(tmp_path, command):
    plate = write_plate(tmp_path / "plate.zarr", ["A/01", "A/02", "B/01"], ["0", "1"], side=96)
    flags = ["--backend", "openvino", "--precision", "fp32", "--no-gate", "--objects", "--wells", "A*", "--fields", "0"]
    out = tmp_path / "out"
    code, said = command("plan", plate, *flags, "-o", out, "--json", tmp_path / "plan.json")
    assert code == 0, said
    content = json.loads((tmp_path / "plan.json").read_text())
    assert (content["images"], content["blocks"], content["tiles"]) == (2, 2, 2)
    assert command("run", plate, *flags, "-o", out)[0] == 0
    summary = {"wells", "fields", "heatmap"}
    files = sum(path.stem not in summary for path in out.rglob("*"))
    assert files <= content["files"]


@pytest.fixture
def networks_of_a_gigabyte(monkeypatch):
    """Have each network that is kept take 1 GB, and the rest of the process nothing; keep none that is not in use."""
    networks = []

    def compile_network(*arguments):
        network = session.compile_network(*arguments)
        networks.append(weakref.ref(network))
        return network

    def kept():
        return 10**9 * sum(network() is not None for network in networks)

    def kept_of_this_run():
        gc.collect()
        return kept()

    monkeypatch.setattr(model_pool, "compile_network", compile_network)
    monkeypatch.setattr(model_pool, "_KEPT_AREA", 0)
    monkeypatch.setattr(warm_up, "resident_bytes", kept)  # called every few milliseconds
    monkeypatch.setattr(warm_up, "peak_resident_bytes", kept_of_this_run)
    monkeypatch.setattr(plan, "resident_bytes", kept_of_this_run)


def test_the_networks_of_all_images_in_flight_are_counted(tmp_path, usual, segment, networks_of_a_gigabyte):
    for side in (60, 100, 140, 180):
        write_ome_zarr(tmp_path / f"{side}.zarr", blobs(side, side, 1))
    changes = {"tile": 200, "output": tmp_path.with_suffix(".out")}
    one, three = (announced(tmp_path, usual, workers=workers, **changes).peak_bytes for workers in (1, 3))
    assert 1e9 < one < three - 1.9e9
    assert segment(tmp_path, workers=3, **changes).planned_peak_bytes <= three


def test_a_picture_is_decoded_once_for_a_block(tmp_path, usual, networks_of_a_gigabyte):
    Image.fromarray(blobs(400, 400, 1)[0]).save(tmp_path / "a.png")
    one, two = (announced(tmp_path, usual, tile=500, workers=workers).peak_bytes for workers in (1, 2))
    assert 3 * 400 * 400 < two - one < 6 * 400 * 400


@pytest.mark.parametrize("objects", [[], ["--objects"]])
def test_the_memory_of_downscaled_slides_is_what_the_run_announces(
    tmp_path, command, tiny_bundle, objects, monkeypatch
):
    card = replace(tiny_bundle.card, downscale={"2": 0.1, "4": 10**6})
    save_bundle(replace(tiny_bundle, card=card), tmp_path / "model")
    paths = [write_ome_zarr(tmp_path / f"{side}.zarr", blobs(side, side), chunk=512) for side in (300, 420)]
    flags = ["--model", tmp_path / "model", "--backend", "torch", "--precision", "fp32", "--threads", 1]
    # So many workers that their blocks weigh more than the networks and than what other tests left in this process.
    flags += ["--tile", 320, "--block", 1, "--workers", 4000, *objects]
    run = command("run", *paths, *flags, "-o", tmp_path / "out", "--json", tmp_path / "run.json")
    assert run[0] == 0, run[1]
    announced = json.loads((tmp_path / "run.json").read_text())
    assert {slide["downscale"] for slide in announced["slides"]} == {2}
    for looks in (8, 0):
        monkeypatch.setattr("cellseg_batch.engine.reports.plan._MOST_LOOKS", looks)
        code, said = command("plan", *paths, *flags, "--json", tmp_path / "plan.json")
        assert code == 0, said
        content = json.loads((tmp_path / "plan.json").read_text())
        assert announced["planned_peak_bytes"] <= content["peak_bytes"]
        if looks:
            assert content["peak_bytes"] <= 1.25 * announced["planned_peak_bytes"]
            planned, done = ([slide["tiles"] for slide in report["slides"]] for report in (content, announced))
            assert planned == done
        assert content["unseen"] == (0 if looks else 2)
        assert ("not looked at" in said) == (not looks)
