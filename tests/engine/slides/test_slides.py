"""What images a path holds, and that a box read from any of them is the right one."""

import ctypes
import json
import warnings
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image
from zarr.core.codec_pipeline import BatchedCodecPipeline

from cellseg_batch.engine.errors import NoImageError, SlideError
from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.inference.normalise import sample_slide, settle_bounds
from cellseg_batch.engine.slides.discover import find_images
from cellseg_batch.engine.slides.level_and_channels import choose_channels, choose_level
from cellseg_batch.engine.slides.plate import FieldChoice
from cellseg_batch.engine.slides.reader import SlideReader
from cellseg_batch.engine.slides.slide import Broken
from cellseg_batch.kernels.gather import gather
from cellseg_batch.trainer.bundle import Normalisation
from tests.support.images import blobs, fill_ome_zarr, write_ome_zarr, write_plate


def coordinates(axes, shape, dtype="uint16"):
    """Pixels whose value says where they are: 1000 * (t or z) + 100 * c + 10 * y + x."""
    weight = {"t": 3000, "z": 1000, "c": 100, "y": 10, "x": 1}
    grids = np.meshgrid(*(np.arange(length) for length in shape), indexing="ij")
    return sum(weight[axis] * grid for axis, grid in zip(axes, grids, strict=True)).astype(dtype)


def read(slide, level, channels, plane, box):
    with SlideReader(slide, level, channels) as reader:
        return reader.read(plane, box)


def only(path, **options):
    (slide,) = find_images(path, **options)
    return slide


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("axes", ["yx", "xy", "cyx", "zyx", "czyx", "tczyx", "tyx", "ztcyx", "zyxt"])
def test_ome_zarr_pixels_are_where_they_belong(tmp_path, version, axes):
    shape = tuple({"t": 2, "c": 3, "z": 2, "y": 7, "x": 9}[axis] for axis in axes)
    path = write_ome_zarr(tmp_path / "a.zarr", coordinates(axes, shape), axes, version, levels=1, chunk=4)
    slide = only(path)
    channel = 1 if "c" in axes else 0
    for plane in range(slide.planes(0)):
        place = dict(zip(slide.plane_axes, np.unravel_index(plane, slide.plane_grid(0) or (1,)), strict=False))
        base = 3000 * place.get("t", 0) + 1000 * place.get("z", 0) + 100 * channel
        y, x = np.mgrid[2:6, 3:9]
        np.testing.assert_array_equal(read(slide, 0, (channel,), plane, Box(2, 3, 6, 9))[0], base + 10 * y + x)
    assert slide.format == f"ome-zarr {version}"


@pytest.mark.parametrize("dtype", [">u2", ">f4", "<f2", "int8", "bool"])
def test_unusual_types_of_number_reach_the_kernels(tmp_path, dtype):
    array = zarr.create_array(str(tmp_path / "a.zarr"), shape=(20, 30), dtype=dtype, zarr_format=2)
    array[...] = coordinates("yx", (20, 30)).astype(dtype)
    got = read(only(tmp_path / "a.zarr"), 0, (0,), 0, Box(0, 0, 20, 30))
    assert got.dtype.isnative
    assert got.dtype.itemsize in (1, 2, 4, 8)
    np.testing.assert_array_equal(got[0], coordinates("yx", (20, 30)).astype(dtype))
    gather(got, np.zeros((1, 4), int), np.zeros((1, 4), int), 0.0, 1.0, np.empty((1, 1, 4, 4), np.float32))


def test_axes_given_for_a_tiff_that_does_not_name_them(tmp_path):
    pixels = coordinates("zyx", (9, 40, 30))
    tifffile.imwrite(tmp_path / "s.tif", pixels)
    assert "`axes=zyx`" in only(tmp_path / "s.tif").reason
    slide = only(tmp_path / "s.tif", axes="zyx")
    np.testing.assert_array_equal(read(slide, 0, (0,), 7, Box(0, 0, 40, 30))[0], pixels[7])


def test_sixteen_bit_rgb_tiffs_are_rgb(tmp_path):
    tifffile.imwrite(tmp_path / "s.tif", coordinates("yxc", (40, 30, 3)), photometric="rgb")
    assert only(tmp_path / "s.tif").rgb


def test_levels_without_transformations_lie_by_their_shapes(tmp_path):
    path = write_ome_zarr(tmp_path / "a.zarr", coordinates("cyx", (1, 64, 64)), levels=3)
    metadata = json.loads((path / "zarr.json").read_text())
    for dataset in metadata["attributes"]["ome"]["multiscales"][0]["datasets"]:
        del dataset["coordinateTransformations"]
    (path / "zarr.json").write_text(json.dumps(metadata))
    assert [level.scale for level in only(path).levels] == [(1, 1, 1), (1, 2, 2), (1, 4, 4)]


@pytest.mark.parametrize("unit", ["micrometer", "µm", "um", "micron"])
def test_spellings_of_micrometre(tmp_path, unit):
    path = write_ome_zarr(tmp_path / "a.zarr", coordinates("cyx", (1, 16, 16)), um=0.25)
    (path / "zarr.json").write_text((path / "zarr.json").read_text().replace("micrometer", unit))
    assert only(path).pixel_size_um(0) == 0.25
    assert only(path).units == (None, "micrometer", "micrometer")


def test_one_dimensional_and_text_arrays_are_no_images(tmp_path):
    group = zarr.open_group(str(tmp_path / "g.zarr"), mode="w")
    group.create_array("table", shape=(9,), dtype="float32")
    group.create_array("image", shape=(9, 9), dtype="uint8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group.create_array("words", shape=(2, 2), dtype=str)
    image, words = find_images(tmp_path / "g.zarr")
    assert image.path == "image"
    assert "boolean pixels" in words.reason


def test_a_folder_that_cannot_be_listed_is_reported(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    Image.fromarray(np.zeros((4, 4), "uint8")).save(tmp_path / "a.png")
    listing = Path.iterdir

    def refuse(path):
        if path.name == "locked":
            raise PermissionError(13, "Permission denied")
        return listing(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    slide, locked = find_images(tmp_path)
    assert (slide.name, locked.reason.split(":")[0]) == (f"{tmp_path.name}/a.png", "the folder cannot be listed")


def test_sharded_and_interleaved_arrays_read_the_same(tmp_path):
    pixels = coordinates("cyx", (3, 64, 64))
    array = zarr.create_array(
        str(tmp_path / "s.zarr"), shape=(64, 64, 3), dtype="uint8", chunks=(16, 16, 3), shards=(32, 32, 3)
    )
    array[...] = np.moveaxis(pixels, 0, -1).astype("uint8")
    slide = only(tmp_path / "s.zarr")
    assert (slide.axes, slide.rgb) == ("yxc", True)
    got = read(slide, 0, (0, 1, 2), 0, Box(5, 9, 50, 41))
    np.testing.assert_array_equal(got, pixels[:, 5:50, 9:41].astype("uint8"))


@pytest.mark.parametrize(
    ("name", "axes", "options", "expected"),
    [
        ("rgb.tif", "yxc", {"photometric": "rgb"}, "yxc"),
        ("c.ome.tif", "cyx", {"metadata": {"axes": "CYX"}}, "cyx"),
        ("z.ome.tif", "zyx", {"metadata": {"axes": "ZYX"}}, "zyx"),
        ("tiled.tif", "yx", {"tile": (16, 16), "compression": "zlib"}, "yx"),
    ],
)
def test_tiff_pixels_are_where_they_belong(tmp_path, name, axes, options, expected):
    shape = tuple({"c": 3, "z": 2, "y": 40, "x": 30}[axis] for axis in axes)
    pixels = coordinates(axes, shape, "uint8" if "rgb" in name else "uint16")
    tifffile.imwrite(tmp_path / name, pixels, **options)
    slide = only(tmp_path / name)
    assert (slide.axes, slide.rgb) == (expected, "rgb" in name)
    plane = slide.planes(0) - 1
    got = read(slide, 0, (0,), plane, Box(3, 4, 20, 25))[0]
    index = {"c": 0, "z": plane, "y": slice(3, 20), "x": slice(4, 25)}
    np.testing.assert_array_equal(got, pixels[tuple(index[axis] for axis in axes)])


def test_tiff_pyramid_and_pixel_size(tmp_path):
    pixels = coordinates("yx", (256, 256), "uint16")
    with tifffile.TiffWriter(tmp_path / "p.ome.tif") as tiff:
        size = {"axes": "YX", "PhysicalSizeX": 0.25, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.25}
        tiff.write(pixels, subifds=1, tile=(64, 64), metadata=size)
        tiff.write(pixels[::2, ::2], subfiletype=1, tile=(64, 64))
    slide = only(tmp_path / "p.ome.tif")
    assert [slide.pixel_size_um(level) for level in (0, 1)] == [0.25, 0.5]
    assert choose_level(slide, None, None, 0.5).level == 1
    np.testing.assert_array_equal(read(slide, 1, (0,), 0, Box(0, 0, 9, 9))[0], pixels[:18:2, :18:2])


@pytest.mark.parametrize(("mode", "axes", "rgb"), [("L", "yx", False), ("RGB", "yxc", True), ("RGBA", "yxc", True)])
def test_pictures(tmp_path, mode, axes, rgb):
    pixels = coordinates("yxc", (20, 30, len(mode)), "uint8")
    Image.fromarray(pixels if len(mode) > 1 else pixels[..., 0]).save(tmp_path / "a.png")
    slide = only(tmp_path / "a.png")
    assert (slide.axes, slide.rgb) == (axes, rgb)
    channels = choose_channels(slide, None).indices
    np.testing.assert_array_equal(
        read(slide, 0, channels, 0, Box(2, 3, 9, 9)), np.moveaxis(pixels, -1, 0)[: len(channels), 2:9, 3:9]
    )


def test_images_in_any_depth_are_found_and_labels_are_not(tmp_path):
    pixels = coordinates("cyx", (1, 16, 16))
    root = zarr.open_group(str(tmp_path / "deep.zarr"), mode="w")
    inner = root.create_group("x").create_group("y")
    fill_ome_zarr(inner, None, pixels)
    labels = inner.create_group("labels")
    labels.attrs["ome"] = {"version": "0.5", "labels": ["nuclei"]}
    nuclei = labels.create_group("nuclei")
    fill_ome_zarr(nuclei, None, pixels[0], "yx")
    nuclei.attrs["ome"] = {**nuclei.attrs["ome"], "image-label": {}}
    root.create_array("plain", shape=(8, 8), dtype="uint8")
    (tmp_path / "sub").mkdir()
    Image.fromarray(np.zeros((4, 4), "uint8")).save(tmp_path / "sub" / "a.png")
    write_ome_zarr(tmp_path / "sub" / "b.cellseg.zarr", pixels)
    (tmp_path / "notes.txt").write_text("not an image")
    names = [slide.name.removeprefix(f"{tmp_path.name}/") for slide in find_images(tmp_path)]
    assert names == ["deep.zarr/plain", "deep.zarr/x/y", "sub/a.png"]


@pytest.mark.parametrize(
    ("wells", "fields", "expected"),
    [
        ((), (), ["A01 0", "A01 1", "B02 0", "B02 1", "B12 0", "B12 1"]),
        (("A01",), (), ["A01 0", "A01 1"]),
        (("b*",), ("1",), ["B02 1", "B12 1"]),
        (("a1", "B2"), ("0", "7"), ["A01 0", "B02 0"]),
    ],
)
def test_wells_and_fields_of_a_plate_can_be_chosen(tmp_path, wells, fields, expected):
    plate = write_plate(tmp_path / "all" / "plate.zarr", ["A/01", "B/02", "B/12"], ["0", "1"])
    write_ome_zarr(tmp_path / "all" / "single.zarr", np.zeros((1, 8, 8), np.uint8))
    found = find_images(plate, choice=FieldChoice(wells, fields))
    assert [f"{image.spot.well} {image.spot.field}" for image in found] == expected
    assert {image.spot.plate for image in found} == {str(plate)}
    *fields_found, single = find_images(tmp_path / "all", choice=FieldChoice(wells, fields))
    assert [image.spot for image in fields_found] == [image.spot for image in found]
    assert single.spot is None


def test_wells_that_do_not_exist_are_no_images(tmp_path):
    plate = write_plate(tmp_path / "plate.zarr", ["A/01"], ["0"])
    with pytest.raises(NoImageError, match="none in such wells and fields"):
        find_images(plate, choice=FieldChoice(("C*",)))


def test_plates_list_their_fields_and_name_what_is_missing(tmp_path):
    plate = zarr.open_group(str(tmp_path / "plate.zarr"), mode="w")
    wells = [{"path": "A/1", "rowIndex": 0, "columnIndex": 0}, {"path": "B/1", "rowIndex": 1, "columnIndex": 0}]
    plate.attrs["ome"] = {"version": "0.5", "plate": {"wells": wells, "rows": [], "columns": []}}
    well = plate.create_group("A").create_group("1")
    well.attrs["ome"] = {"version": "0.5", "well": {"images": [{"path": "0"}, {"path": "1"}]}}
    for field in ("0", "1"):
        fill_ome_zarr(well.create_group(field), None, coordinates("cyx", (2, 16, 16)))
    found = find_images(tmp_path / "plate.zarr")
    assert [image.name for image in found] == ["plate.zarr/A/1/0", "plate.zarr/A/1/1", "plate.zarr/B/1"]
    assert isinstance(found[2], Broken)
    assert "not in the store" in found[2].reason
    assert [(image.spot.well, image.spot.field) for image in found] == [("A1", "0"), ("A1", "1"), ("B1", "")]
    assert only(tmp_path / "plate.zarr" / "A" / "1" / "0").store == tmp_path / "plate.zarr"


def test_bioformats2raw_series_come_in_numerical_order(tmp_path):
    root = zarr.open_group(str(tmp_path / "b.zarr"), mode="w", zarr_format=2)
    root.attrs["bioformats2raw.layout"] = 3
    for series in ("10", "2", "0"):
        fill_ome_zarr(root.create_group(series), None, coordinates("cyx", (1, 16, 16)), version="0.4")
    root.create_group("OME")
    assert [slide.path for slide in find_images(tmp_path / "b.zarr")] == ["0", "2", "10"]


def test_a_missing_full_resolution_is_passed_over(tmp_path):
    path = write_ome_zarr(tmp_path / "a.zarr", coordinates("cyx", (1, 32, 32)), levels=2)
    for file in sorted((path / "0").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    slide = only(path)
    assert [level.shape for level in slide.levels] == [(1, 16, 16)]


def damaged(tmp_path, kind):
    path = tmp_path / f"{kind}.zarr"
    if kind == "json":
        write_ome_zarr(path, coordinates("cyx", (1, 16, 16)))
        (path / "zarr.json").write_text("{not json")
    elif kind == "array":
        zarr.create_array(str(path), shape=(3, 4, 5, 6), dtype="uint8")
    elif kind == "no-datasets":
        zarr.open_group(str(path), mode="w").attrs["ome"] = {"version": "0.5", "multiscales": []}
    elif kind == "axes":
        write_ome_zarr(path, coordinates("cyx", (1, 16, 16)))
        metadata = json.loads((path / "zarr.json").read_text())
        metadata["attributes"]["ome"]["multiscales"][0]["axes"][0]["name"] = "wavelength"
        (path / "zarr.json").write_text(json.dumps(metadata))
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("json", "cannot be read"), ("array", "`axes=czyx`"), ("no-datasets", "multiscale"), ("axes", "t, c, z, y, x")],
)
def test_what_cannot_be_used_says_why(tmp_path, kind, reason):
    broken = only(damaged(tmp_path, kind))
    assert isinstance(broken, Broken)
    assert reason in broken.reason


def test_axes_can_be_given_for_plain_arrays(tmp_path):
    path = damaged(tmp_path, "array")
    assert only(path, axes="tcyx").plane_axes == "t"


@pytest.mark.parametrize("make", [lambda p: p / "nothing", lambda p: p, lambda p: (p / "t.txt").write_text("") or p])
def test_nothing_to_find(tmp_path, make):
    with pytest.raises(NoImageError):
        find_images(make(tmp_path))


@pytest.mark.parametrize(
    ("labels", "asked", "expected"),
    [
        (["actin", "DAPI"], None, (1,)),
        (["GFP", "Hoechst 33342"], None, (1,)),
        (["a", "b"], None, (0,)),
        (["a", "b"], "B", (1,)),
        (["a", "b"], "1", (1,)),
        (["R", "G", "B"], None, (0, 1, 2)),
        (["R", "G", "B"], "g", (1,)),
    ],
)
def test_channel_rule(tmp_path, labels, asked, expected):
    pixels = coordinates("cyx", (len(labels), 16, 16))
    path = write_ome_zarr(tmp_path / "a.zarr", pixels, channels=[{"label": label} for label in labels])
    assert choose_channels(only(path), asked).indices == expected


def test_unknown_channels_and_levels_are_refused(tmp_path):
    slide = only(write_ome_zarr(tmp_path / "a.zarr", coordinates("cyx", (2, 16, 16))))
    with pytest.raises(SlideError, match="`channel=7`"):
        choose_channels(slide, "7")
    with pytest.raises(SlideError, match="`level=5`"):
        choose_level(slide, 5, None, None)


def test_level_nearest_the_models_pixel_size(tmp_path):
    slide = only(write_ome_zarr(tmp_path / "a.zarr", coordinates("cyx", (1, 64, 64)), levels=4, um=0.1))
    assert choose_level(slide, None, None, 0.5).level == 2
    assert choose_level(slide, None, 0.5, 0.5).level == 0
    assert choose_level(slide, 3, None, 0.5).level == 3
    assert choose_level(slide, None, None, None).level == 0


@pytest.mark.parametrize("axes", ["cyx", "xy"])
def test_a_part_of_a_slide_is_a_slide_at_every_level(tmp_path, axes):
    shape = tuple({"c": 2, "y": 61, "x": 90}[axis] for axis in axes)
    whole = only(write_ome_zarr(tmp_path / "a.zarr", coordinates(axes, shape), axes, levels=3, um=0.5))
    part = whole.cropped(1, Box(8, 12, 20, 45))
    assert [part.plane_shape(level) for level in range(3)] == [(24, 66), (12, 33), (6, 17)]
    for level in range(3):
        height, width = part.plane_shape(level)
        y, x = (part.levels[level].origin[i] for i in (0, 1))
        expected = read(whole, level, (0,), 0, Box(y, x, y + height, x + width))
        np.testing.assert_array_equal(read(part, level, (0,), 0, Box(0, 0, height, width)), expected)
        assert part.levels[level].translation[part.axes.index("x")] == x * 0.5 * 2**level
    assert part.levels[1].origin == (8, 12)


def test_empty_and_complex_images_are_refused(tmp_path):
    zarr.create_array(str(tmp_path / "e.zarr"), shape=(0, 5), dtype="uint8")
    zarr.create_array(str(tmp_path / "c.zarr"), shape=(5, 5), dtype="complex64")
    assert "an image with pixels" in only(tmp_path / "e.zarr").reason
    assert "complex64" in only(tmp_path / "c.zarr").reason


def test_bounds_come_from_the_whole_slide_and_pass_over_nan(tmp_path):
    pixels = np.full((1, 64, 64), 10, np.float32)
    pixels[0, :32] = 30
    pixels[0, 0, :5] = np.nan
    slide = only(write_ome_zarr(tmp_path / "a.zarr", pixels, levels=1))
    bounds = settle_bounds(sample_slide(slide, (0,), 0), Normalisation("percentile", 1, 99))
    assert (bounds.low, bounds.high) == (10, 30)
    assert settle_bounds([], Normalisation("fixed", 5, 6)).high == 6


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
def test_bounds_of_integers_are_those_of_the_floats_that_the_model_sees(tmp_path, dtype):
    pixels = np.random.default_rng(0).integers(0, 251, (1, 61, 67)).astype(dtype) * (1 if dtype == "uint8" else 97)
    slides = [only(write_ome_zarr(tmp_path / f"{kind}.zarr", pixels.astype(kind))) for kind in (dtype, "float32")]
    of_integers, of_floats = (settle_bounds(sample_slide(slide, (0,), 0), Normalisation()) for slide in slides)
    assert of_integers == of_floats


def test_a_few_bright_pixels_on_a_ground_of_one_value_are_not_lost(tmp_path):
    pixels = np.zeros((1, 512, 512), np.uint16)
    pixels[0, :12, :12] = 9000
    slide = only(write_ome_zarr(tmp_path / "a.zarr", pixels, levels=1))
    assert settle_bounds(sample_slide(slide, (0,), 0), Normalisation()).high == 9000


def test_large_slides_without_a_pyramid_are_sampled_evenly(tmp_path):
    array = zarr.create_array(str(tmp_path / "a.zarr"), shape=(6000, 6000), dtype="uint8", chunks=(1000, 1000))
    array[:3000] = 200
    bounds = settle_bounds(sample_slide(only(tmp_path / "a.zarr"), (0,), 0), Normalisation("percentile", 10, 90))
    assert (bounds.low, bounds.high) == (0, 200)


@pytest.mark.parametrize("axes", ["tczyx", "zyx", "cyx"])
def test_local_chunks_are_decoded_by_zarrs(tmp_path, axes, monkeypatch):
    shape = [{"t": 2, "c": 3, "z": 2}.get(axis, 150) for axis in axes]
    pixels = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    (slide,) = find_images(write_ome_zarr(tmp_path / "a.zarr", pixels, axes))
    monkeypatch.setattr(BatchedCodecPipeline, "read", None)
    last = {axis: -1 for axis in axes if axis in "tz"}
    expected = pixels[tuple(last.get(axis, slice(None)) for axis in axes)].reshape(-1, 150, 150)[:, 10:140, 5:130]
    with SlideReader(slide, 0, tuple(range(slide.extent("c", 0)))) as reader:
        np.testing.assert_array_equal(reader.read(slide.planes(0) - 1, Box(10, 5, 140, 130)), expected)


def test_arrays_in_the_order_of_columns_are_read_too(tmp_path):
    pixels = blobs(150, 130)
    path = write_ome_zarr(tmp_path / "a.zarr", pixels, version="0.4", levels=1)
    array = zarr.create_array(path / "0", data=pixels, chunks=(1, 64, 64), zarr_format=2, order="F", overwrite=True)
    assert array.order == "F"
    (slide,) = find_images(path)
    with SlideReader(slide, 0, (0, 1, 2)) as reader:
        np.testing.assert_array_equal(reader.read(0, Box(10, 5, 140, 130)), pixels[:, 10:140, 5:130])


def test_reading_leaves_nothing_behind_for_each_chunk(tmp_path):
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("a C library that does not count what is allocated")
    libc.mallinfo2.restype = _Allocated
    write_ome_zarr(tmp_path / "a.zarr", blobs(256, 256), chunk=8, levels=1)
    with SlideReader(only(tmp_path / "a.zarr"), 0, (0, 1, 2)) as reader:
        reader.read(0, Box(0, 0, 8, 8))
        before = libc.mallinfo2().in_use
        for box in (Box(0, 0, 256, 256), Box(0, 0, 8, 8)):
            reader.read(0, box)
        assert libc.mallinfo2().in_use - before < 64 * 3 * 32**2, "no lock for each of the 3 x 32 x 32 chunks"


class _Allocated(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    _fields_: ClassVar = [(name, ctypes.c_size_t) for name in (*"abcdefg", "in_use", "free", "top")]
