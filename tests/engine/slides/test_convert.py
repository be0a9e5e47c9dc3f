"""Images of every format become the same pixels in OME-Zarr 0.5, with averages below them, and survive kill -9."""

import signal
import subprocess
import sys
import time

import numpy as np
import ome_zarr_models
import pytest
import tifffile
import zarr
from PIL import Image

from cellseg_batch.engine.slides.convert import convert
from cellseg_batch.engine.slides.convert_layout import channel_groups, halve, lay_out_image
from cellseg_batch.engine.slides.discover import find_images
from cellseg_batch.engine.slides.slide import Slide
from cellseg_batch.engine.storage.journal import Journal
from cellseg_batch.engine.storage.lock import Locks
from tests.support.images import blobs, write_ome_zarr


def pixels_of(store, level=0, path=""):
    return zarr.open_array(str(store / path / str(level)), mode="r")[...]


def only(path):
    (slide,) = find_images(path)
    assert isinstance(slide, Slide), slide
    return slide


def write_ome_tiff(path, shape=(2, 1100, 700)):
    pixels = np.random.default_rng(0).integers(0, 60000, shape, dtype=np.uint16)
    metadata = {"axes": "CYX", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25, "Channel": {"Name": ["DAPI", "GFP"]}}
    tifffile.imwrite(path, pixels, tile=(128, 128), metadata=metadata, compression="zlib", ome=True)
    return pixels


def test_an_ome_tiff_keeps_pixels_size_and_channel_names(tmp_path, command):
    pixels = write_ome_tiff(tmp_path / "a.ome.tif")
    code, said = command("convert", tmp_path / "a.ome.tif", tmp_path / "b.zarr")
    assert code == 0, said
    slide = only(tmp_path / "b.zarr")
    assert (slide.zarr_format, slide.axes, slide.dtype) == (3, "cyx", "uint16")
    assert slide.channels == ("DAPI", "GFP")
    assert [slide.pixel_size_um(level) for level in range(3)] == [0.25, 0.5, 1.0]
    np.testing.assert_array_equal(pixels_of(tmp_path / "b.zarr"), pixels)
    model = ome_zarr_models.open_ome_zarr(zarr.open_group(str(tmp_path / "b.zarr"), mode="r"))
    assert type(model).__name__ == "Image"
    assert zarr.open_array(str(tmp_path / "b.zarr" / "0"), mode="r").shards is not None


def test_names_that_are_no_utf8_can_be_written(tmp_path):
    write_ome_tiff(tmp_path / "a.ome.tif")
    out = tmp_path / "\udce4.zarr"
    settings = {"axes": None, "workers": 1, "overwrite": False}
    list(convert(tmp_path / "a.ome.tif", out, **settings, found=lambda _: None, advanced=lambda _: None))
    assert zarr.open_group(str(out), mode="r").attrs["ome"]["multiscales"][0]["name"] == r"\udce4"


def test_every_level_is_the_mean_of_the_one_above_and_lies_where_it_should(tmp_path, command):
    write_ome_tiff(tmp_path / "a.ome.tif", (2, 1101, 703))
    command("convert", tmp_path / "a.ome.tif", tmp_path / "b.zarr")
    slide = only(tmp_path / "b.zarr")
    assert [level.shape for level in slide.levels] == [(2, 1101, 703), (2, 550, 351), (2, 275, 175)]
    for level in (1, 2):
        above = pixels_of(tmp_path / "b.zarr", level - 1).astype(float)
        height, width = slide.plane_shape(level)
        corners = [above[:, y : 2 * height : 2, x : 2 * width : 2] for y in (0, 1) for x in (0, 1)]
        np.testing.assert_array_equal(pixels_of(tmp_path / "b.zarr", level), np.rint(np.mean(corners, axis=0)))
    # The centre of the first pixel of level 2 is that of the first 4 x 4 pixels.
    assert slide.levels[2].translation == pytest.approx((0, 1.5 * 0.25, 1.5 * 0.25))


@pytest.mark.parametrize(("axes", "shape"), [("yx", (70, 90)), ("zyx", (3, 70, 90)), ("tczyx", (2, 2, 3, 40, 50))])
@pytest.mark.parametrize("dtype", ["uint8", "float32", "int16"])
def test_plain_arrays_of_any_axes(tmp_path, command, axes, shape, dtype):
    pixels = np.random.default_rng(0).integers(0, 120, shape).astype(dtype)
    chunks = (1,) * (len(shape) - 2) + (32, 32)
    array = zarr.create_array(str(tmp_path / "a.zarr"), shape=shape, dtype=dtype, chunks=chunks)
    array[...] = pixels
    code, said = command("convert", tmp_path / "a.zarr", tmp_path / "b.zarr", "--axes", axes)
    assert code == 0, said
    assert only(tmp_path / "b.zarr").axes == axes
    np.testing.assert_array_equal(pixels_of(tmp_path / "b.zarr"), pixels)


def test_the_distance_of_planes_is_kept(tmp_path, command):
    metadata = {"axes": "ZYX", "PhysicalSizeX": 0.25, "PhysicalSizeZ": 1500.0, "PhysicalSizeZUnit": "nm"}
    tifffile.imwrite(tmp_path / "a.ome.tif", np.zeros((3, 600, 700), np.uint8), metadata=metadata, ome=True)
    command("convert", tmp_path / "a.ome.tif", tmp_path / "b.zarr")
    slide = only(tmp_path / "b.zarr")
    assert [level.scale for level in slide.levels] == [(1.5, 0.25, 0.25), (1.5, 0.5, 0.5)]
    assert slide.units == ("micrometer",) * 3


def test_axes_come_in_the_order_of_the_specification(tmp_path, command):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 40, 3, 30, 2), dtype=np.uint8)  # z y t x c
    array = zarr.create_array(str(tmp_path / "a.zarr"), shape=pixels.shape, dtype="uint8", chunks=(1, 16, 1, 16, 2))
    array[...] = pixels
    command("convert", tmp_path / "a.zarr", tmp_path / "b.zarr", "--axes", "zytxc")
    np.testing.assert_array_equal(pixels_of(tmp_path / "b.zarr"), pixels.transpose(2, 4, 0, 1, 3))


def test_a_folder_of_pictures_becomes_one_store_and_the_broken_one_is_named(tmp_path, command, segment):
    folder = tmp_path / "pictures"
    folder.mkdir()
    colour = blobs(90, 120).transpose(1, 2, 0)
    Image.fromarray(np.dstack([colour, np.full(colour.shape[:2], 255, np.uint8)])).save(folder / "colour.png")
    Image.fromarray(colour[..., 0]).save(folder / "grey.png")
    (folder / "torn.png").write_bytes((folder / "grey.png").read_bytes()[:20])
    code, said = command("convert", folder, tmp_path / "b.zarr")
    assert code == 1
    assert "torn.png" in said
    np.testing.assert_array_equal(pixels_of(tmp_path / "b.zarr", path="colour.png"), colour.transpose(2, 0, 1))
    np.testing.assert_array_equal(pixels_of(tmp_path / "b.zarr", path="grey.png"), colour[..., 0])
    slides = find_images(tmp_path / "b.zarr")
    assert [(slide.name, slide.rgb) for slide in slides] == [("b.zarr/colour.png", True), ("b.zarr/grey.png", False)]
    assert segment(tmp_path / "b.zarr").status == "done"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_conversion_that_was_ended_goes_on_and_ends_with_the_same_files(tmp_path, command, number, code):
    pixels = np.random.default_rng(0).integers(0, 255, (12, 600, 600), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, tile=(64, 64), compression="zlib", metadata={"axes": "ZYX"}, ome=True)
    command("convert", tmp_path / "a.tif", tmp_path / "whole.zarr")
    line = [sys.executable, "-m", "cellseg_batch.engine.cli", "convert", tmp_path / "a.tif", tmp_path / "b.zarr"]
    journal = Journal(tmp_path / "b.zarr.cellseg" / "convert")
    process = subprocess.Popen([*map(str, line), "--workers", "1"], stderr=subprocess.PIPE, text=True)
    while len(journal.numbers("blocks")) < 3:
        assert process.poll() is None, "the conversion ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(number)
    said = process.communicate()[1]
    assert (process.returncode, "goes on where this one stopped" in said) == (code, number == signal.SIGTERM)
    assert len(list(tmp_path.rglob("*.lock"))) == (number == signal.SIGKILL)
    assert not journal.is_finished
    assert "expected at least one image" in command("info", tmp_path / "b.zarr")[1], "half an image is none"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "b.zarr.cellseg").rglob("blocks/*/*.json")}
    code, said = command("convert", tmp_path / "a.tif", tmp_path / "b.zarr")
    assert code == 0, said
    assert before == {path: path.stat().st_mtime_ns for path in before}, "a finished shard was written twice"
    for level in (0, 1):
        np.testing.assert_array_equal(pixels_of(tmp_path / "b.zarr", level), pixels_of(tmp_path / "whole.zarr", level))
    assert "skipped" in command("convert", tmp_path / "a.tif", tmp_path / "b.zarr")[1]


def test_two_conversions_into_one_store_never_meet(tmp_path, command):
    write_ome_tiff(tmp_path / "a.ome.tif")
    locks = Locks()
    with locks.hold(tmp_path / "b.zarr.cellseg" / "convert.lock"):
        code, said = command("convert", tmp_path / "a.ome.tif", tmp_path / "b.zarr")
    locks.close()
    assert code == 0
    assert "held" in said
    assert not (tmp_path / "b.zarr").exists()
    assert command("convert", tmp_path / "a.ome.tif", tmp_path / "b.zarr")[0] == 0
    assert not list(tmp_path.rglob("*.lock"))


def test_what_is_in_the_way_is_never_touched(tmp_path, command):
    write_ome_tiff(tmp_path / "a.ome.tif")
    mine = write_ome_zarr(tmp_path / "mine.zarr", blobs(64, 64))
    code, said = command("convert", tmp_path / "a.ome.tif", mine)
    assert code == 1
    assert "--overwrite" in said
    np.testing.assert_array_equal(pixels_of(mine), blobs(64, 64))
    assert command("convert", tmp_path / "a.ome.tif", mine, "--overwrite")[0] == 0
    assert only(mine).dtype == "uint16"
    # The file has changed since: what was made of it is out of date, and says so.
    tifffile.imwrite(tmp_path / "a.ome.tif", np.zeros((2, 1100, 700), np.uint16))
    assert "--overwrite" in command("convert", tmp_path / "a.ome.tif", mine)[1]


@pytest.mark.parametrize(("target", "reason"), [("out", "ends in .zarr"), ("in/b.zarr", "outside the source")])
def test_targets_that_would_do_harm_are_refused(tmp_path, command, target, reason):
    (tmp_path / "in").mkdir()
    write_ome_tiff(tmp_path / "in" / "a.ome.tif")
    code, said = command("convert", tmp_path / "in", tmp_path / target)
    assert code == 2
    assert reason in said


def test_what_is_ome_zarr_already_is_left_alone(tmp_path, command):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(64, 64))
    code, said = command("convert", path, tmp_path / "b.zarr")
    assert code == 1
    assert "already" in said


def test_a_damaged_block_fails_its_image_and_leaves_no_image_behind(tmp_path, command):
    array = zarr.create_array(str(tmp_path / "a.zarr"), shape=(900, 600), dtype="uint8", chunks=(300, 300))
    array[...] = 7
    next((tmp_path / "a.zarr" / "c").rglob("1/1")).write_bytes(b"damaged")
    code, said = command("convert", tmp_path / "a.zarr", tmp_path / "b.zarr")
    assert code == 1
    assert "readable pixels" in said
    assert command("run", tmp_path / "b.zarr")[0] == 2


@pytest.mark.parametrize("channels", [1, 3, 40])
def test_a_task_reads_a_bounded_number_of_bytes(tmp_path, channels):
    shape, chunks = (30000, 20000, channels), (256, 256, channels)
    zarr.create_array(str(tmp_path / "a.zarr"), shape=shape, dtype="uint16", chunks=chunks)
    (slide,) = find_images(tmp_path / "a.zarr", axes="yxc")
    layout = lay_out_image(slide)
    assert len(channel_groups(slide)) == 1
    assert layout.shards[0][0] * layout.shards[0][1] * channels * 2 <= 64 << 20
    assert all(2 * side <= max(layout.shards[0][0], 1024) for shard in layout.shards[1:] for side in shard)
    assert max(layout.shapes[-1][-2:]) <= 512


def test_halving():
    pixels = np.array([[0, 1, 9], [2, 4, 9]], np.uint8)
    np.testing.assert_array_equal(halve(pixels, (1, 1)), [[2]])  # 1.75
    np.testing.assert_array_equal(halve(np.array([[1, 3, 5, 8]], np.float32), (1, 2)), [[2.0, 6.5]])
    assert halve(np.array([[-3, -4]], np.int16), (1, 1)).dtype == np.int16
