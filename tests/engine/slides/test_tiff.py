"""TIFF files: axes, series, pyramids, pixel sizes."""

import subprocess
import sys

import numpy as np
import pytest
import tifffile
from PIL import Image

from cellseg_batch.engine.errors import ReadError
from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.slides.convert_layout import channel_count
from cellseg_batch.engine.slides.discover import find_images
from cellseg_batch.engine.slides.level_and_channels import choose_level
from cellseg_batch.engine.slides.slide import Slide
from tests.support.slides import coordinates, only, read


def test_axes_given_for_a_tiff_that_does_not_name_them(tmp_path):
    pixels = coordinates("zyx", (9, 40, 30))
    tifffile.imwrite(tmp_path / "s.tif", pixels)
    assert "`axes=zyx`" in only(tmp_path / "s.tif").reason
    slide = only(tmp_path / "s.tif", axes="zyx")
    np.testing.assert_array_equal(read(slide, 0, (0,), 7, Box(0, 0, 40, 30))[0], pixels[7])


def test_sixteen_bit_rgb_tiffs_are_rgb(tmp_path):
    tifffile.imwrite(tmp_path / "s.tif", coordinates("yxc", (40, 30, 3)), photometric="rgb")
    assert only(tmp_path / "s.tif").rgb


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


@pytest.mark.parametrize("ome", [True, False])
def test_every_series_is_an_image(tmp_path, ome):
    large, small = coordinates("yx", (40, 30)), coordinates("yx", (20, 15))
    with tifffile.TiffWriter(tmp_path / "two.tif", ome=ome) as tiff:
        tiff.write(large)
        tiff.write(small)
    first, second = find_images(tmp_path / "two.tif")
    assert [(slide.name, slide.path) for slide in (first, second)] == [("two.tif/0", "0"), ("two.tif/1", "1")]
    np.testing.assert_array_equal(read(second, 0, (0,), 0, Box(0, 0, 20, 15))[0], small)


def test_pages_of_half_the_size_are_a_pyramid_if_they_say_so_or_are_tiled(tmp_path):
    pixels = coordinates("yx", (64, 64))
    for name, options in (
        ("strips.tif", {}),
        ("marked.tif", {"subfiletype": 1}),
        ("tiles.tif", {"tile": (16, 16)}),
    ):
        with tifffile.TiffWriter(tmp_path / name) as tiff:
            tiff.write(pixels, metadata=None, **{**options, "subfiletype": 0})
            tiff.write(pixels[::2, ::2] + 1, metadata=None, **options)
    assert [len(slide.levels) for slide in find_images(tmp_path)] == [2, 1, 1, 2]
    _, first, second, _ = find_images(tmp_path)
    assert first.notes == ()
    assert "it has the size of a lower resolution of another" in second.notes[0]
    np.testing.assert_array_equal(read(second, 0, (0,), 0, Box(0, 0, 32, 32))[0], pixels[::2, ::2] + 1)


def test_thumbnails_and_transparency_masks_are_left_out_and_said(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(coordinates("yx", (40, 30)), metadata=None)
        tiff.write(coordinates("yx", (9, 7)), metadata=None, subfiletype=1)
        tiff.write(np.zeros((40, 30), bool), metadata=None, subfiletype=4)
    slide = only(tmp_path / "a.tif")
    assert slide.plane_shape(0) == (40, 30)
    assert slide.notes == ("left out beside the scan: page 1 (9 x 7), page 2 (40 x 30)",)


@pytest.mark.parametrize("asked", ["cyx", "zyx", "tyx"])
def test_the_users_axes_are_obeyed(tmp_path, asked):
    pages = [Image.fromarray(coordinates("yx", (8, 9), "uint8") + page) for page in range(3)]
    pages[0].save(tmp_path / "plain.tif", save_all=True, append_images=pages[1:])
    assert only(tmp_path / "plain.tif", axes=asked).axes == asked


@pytest.mark.parametrize(("letters", "own"), [("TYX", "tyx"), ("YXS", "yxc")])
def test_axes_other_than_those_that_a_file_names_are_refused(tmp_path, letters, own):
    pixels = np.zeros({"TYX": (5, 8, 9), "YXS": (8, 9, 3)}[letters], "uint8")
    photometric = "rgb" if "S" in letters else "minisblack"
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric=photometric, metadata={"axes": letters})
    assert f"expected `axes={own}`" in only(tmp_path / "a.tif", axes="zyx").reason


def test_a_single_plane_beside_stacks_keeps_its_axes_and_says_so(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((8, 9), "uint8"))
    slide = only(tmp_path / "a.tif", axes="zyx")
    assert (slide.axes, slide.notes) == ("yx", ("`axes=zyx` was not applied: the image is a single plane",))


def test_axes_that_do_not_fit_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((5, 8, 9, 3), "uint8"), photometric="rgb")
    for axes in ("zyx", "yxzc", "czyx"):
        assert f"found `axes={axes}`" in only(tmp_path / "a.tif", axes=axes).reason
    assert only(tmp_path / "a.tif", axes="zyxc").rgb


def test_channels_of_colours_are_refused_with_the_true_reason(tmp_path):
    pixels = np.zeros((2, 8, 9, 3), "uint8")
    tifffile.imwrite(tmp_path / "a.ome.tif", pixels, photometric="rgb", metadata={"axes": "CYXS"}, ome=True)
    reason = only(tmp_path / "a.ome.tif").reason
    assert "CYXS" in reason
    assert "`axes=zyxc`" in reason
    assert only(tmp_path / "a.ome.tif", axes="zyxc").rgb


def test_lengths_of_one_without_a_name_are_dropped(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", coordinates("yx", (8, 9))[None])
    slide = only(tmp_path / "a.tif")
    assert slide.axes == "yx"
    np.testing.assert_array_equal(read(slide, 0, (0,), 0, Box(0, 0, 8, 9))[0], coordinates("yx", (8, 9)))


@pytest.mark.parametrize("planarconfig", ["contig", "separate"])
def test_samples_are_colours_only_if_the_file_says_so(tmp_path, planarconfig):
    shape = (8, 9, 5) if planarconfig == "contig" else (5, 8, 9)
    axes = "yxc" if planarconfig == "contig" else "cyx"
    pixels = coordinates(axes, shape)
    options = {"planarconfig": planarconfig, "metadata": None}
    tifffile.imwrite(tmp_path / "five.tif", pixels, photometric="minisblack", **options)
    tifffile.imwrite(tmp_path / "colours.tif", pixels, photometric="rgb", **options)
    colours, five = find_images(tmp_path)
    assert (five.rgb, colours.rgb) == (False, True)
    for slide in (five, colours):
        assert channel_count(slide) == 5
        assert read(slide, 0, (4,), 0, Box(1, 2, 2, 3)).item() == 412


@pytest.mark.parametrize(("extra", "alpha"), [("unassalpha", True), ("assocalpha", True), ("unspecified", False)])
def test_alpha_is_no_channel_and_what_is_not_said_to_be_alpha_is_one(tmp_path, extra, alpha):
    pixels = coordinates("yxc", (8, 9, 4), "uint8")
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", extrasamples=[extra])
    slide = only(tmp_path / "a.tif")
    assert (slide.rgb, slide.alpha, channel_count(slide)) == (True, alpha, 4 - alpha)


NOT_APPLIED = ("its colour table is not applied: its values are taken for intensities",)


def write_indexed(path, ramps, **options):
    """Indices with a colour table: of each primary the values (first, last, at which index it is reached)."""
    table = np.stack([np.interp(np.arange(256), (0, end), (low, high)) for low, high, end in ramps]).astype("uint16")
    indices = coordinates("yx", (8, 9), "uint8")
    tifffile.imwrite(path, indices, photometric="palette", colormap=table, **options)
    return indices


GREY, FIRE = [(0, 65535, 255)] * 3, [(0, 65535, 85), (0, 65535, 170), (0, 65535, 255)]
RAINBOW = [(65535, 0, 255), (0, 30000, 255), (0, 65535, 100)]


def test_a_colour_table_that_only_shows_intensities_is_noted(tmp_path):
    indices = write_indexed(tmp_path / "a.tif", GREY)
    write_indexed(tmp_path / "b.tif", FIRE)
    write_indexed(tmp_path / "c.tif", RAINBOW, description="ImageJ=1.54f\nimages=1\n", metadata=None)
    write_indexed(tmp_path / "d.ome.tif", RAINBOW, ome=True)
    slides = find_images(tmp_path)
    assert [slide.notes for slide in slides] == [(), *[NOT_APPLIED] * 3]
    for slide in slides:
        assert not slide.rgb
        np.testing.assert_array_equal(read(slide, 0, (0,), 0, Box(0, 0, 8, 9))[0], indices)


def test_indexed_colours_are_refused_with_the_reason(tmp_path):
    write_indexed(tmp_path / "a.tif", RAINBOW)
    assert "found a colour table whose brightness rises and falls" in only(tmp_path / "a.tif").reason


@pytest.mark.parametrize(("dtype", "bits"), [("uint8", None), ("uint16", None), ("uint16", 12), ("bool", None)])
@pytest.mark.parametrize("ome", [True, False])
def test_values_of_which_0_is_white_are_read_inverted(tmp_path, dtype, bits, ome):
    pixels = np.arange(200).reshape(10, 20)
    pixels = pixels > 99 if dtype == "bool" else pixels.astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="miniswhite", bitspersample=bits, ome=ome)
    slide = only(tmp_path / "a.tif")
    expected = ~pixels if dtype == "bool" else (1 << (bits or pixels.itemsize * 8)) - 1 - pixels
    np.testing.assert_array_equal(read(slide, 0, (0,), 0, Box(2, 3, 9, 11))[0], expected[2:9, 3:11])
    assert slide.notes == ("0 is white in the file: its values are read inverted, as viewers show them",)


@pytest.mark.parametrize("dtype", ["float32", "int16"])
def test_values_of_which_0_is_white_and_none_is_black_are_refused(tmp_path, dtype):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((8, 9), dtype), photometric="miniswhite")
    assert f"expected unsigned integers, as 0 is white, found {dtype}" in only(tmp_path / "a.tif").reason


def test_a_note_on_the_file_stays_if_its_first_image_cannot_be_used(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(np.zeros((40, 30), "float32"), photometric="miniswhite", metadata=None)
        tiff.write(coordinates("yx", (33, 31)), metadata=None)
        tiff.write(coordinates("yx", (9, 19)), metadata=None, subfiletype=1)
    refused, slide = find_images(tmp_path / "a.tif")
    assert "0 is white" in refused.reason
    assert slide.notes == ("left out beside the scan: page 2 (9 x 19)",)


@pytest.mark.parametrize("photometric", ["separated", "cielab", "ycbcr", "cfa"])
def test_colours_that_are_not_decoded_are_refused(tmp_path, photometric):
    samples = {"separated": 4, "cfa": 1}.get(photometric, 3)
    pixels = np.zeros((16, 16, samples), "uint8").squeeze()
    tifffile.imwrite(
        tmp_path / "a.tif", pixels, photometric=photometric, planarconfig="contig" if samples > 1 else None
    )
    assert "expected grey values or RGB" in only(tmp_path / "a.tif").reason


@pytest.mark.parametrize("name", ["a.btf", "a.tf8", "a.ome.tf2", "a.lsm", "a.ptif", "A.TIFF"])
def test_suffixes_of_tiff(tmp_path, name):
    tifffile.imwrite(tmp_path / name, coordinates("yx", (8, 9)), bigtiff=True)
    assert only(tmp_path / name).plane_shape(0) == (8, 9)


@pytest.mark.parametrize(
    ("page", "name", "value", "reason"),
    [
        (0, "TileOffsets", (0, 0, 0, 0), "none for 4 of them"),
        (1, "TileOffsets", (0, 8, 8, 8), "none for 1 of them"),
        (0, "ImageLength", 2000, "none for"),
        (0, "TileLength", (16, 16), "one length of each side"),
    ],
)
def test_damaged_tags_make_up_no_pixels(tmp_path, page, name, value, reason):
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        for _ in range(2):
            tiff.write(coordinates("yx", (32, 32)), tile=(16, 16), compression="zlib", metadata=None)
    tifffile.imwrite(tmp_path / "b.tif", coordinates("yx", (32, 32)))
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as tiff:
        tiff.pages[page].tags[name].overwrite(value)
    *damaged, whole = find_images(tmp_path)
    assert reason in damaged[0].reason
    assert whole.plane_shape(0) == (32, 32)


def test_pages_behind_a_damaged_one_are_not_left_out(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        for _ in range(3):
            tiff.write(coordinates("yx", (8, 9)), metadata=None)
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        place = tiff.pages[2].offset
    with open(tmp_path / "a.tif", "r+b") as file:
        file.seek(place)
        file.write(b"\xff\xff")
    assert "found 2, and a reference to one that cannot be read" in only(tmp_path / "a.tif").reason


@pytest.mark.parametrize("count", [3, 130])
def test_pages_that_lead_back_to_another_are_named(tmp_path, count):
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        for _ in range(count):
            tiff.write(coordinates("yx", (8, 9)), metadata=None)
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        second, last = tiff.pages[1].offset, tiff.pages[count - 1]
    with open(tmp_path / "a.tif", "r+b") as file:
        file.seek(last.offset + 2 + 12 * len(last.tags))
        file.write(second.to_bytes(4, "little"))
    assert f"leads from the last of {count} back to number 1" in only(tmp_path / "a.tif").reason


@pytest.mark.parametrize("content", [b"II*\0\x08\0\0\0", b"II*\0\0\0\0\0"])
def test_a_tiff_without_pages_is_named(tmp_path, content):
    (tmp_path / "a.tif").write_bytes(content)
    assert "expected a TIFF with pages, found none" in only(tmp_path / "a.tif").reason


@pytest.mark.parametrize(("slices", "left_out"), [(2, "page 4, page 5"), (3, None)])
def test_pages_of_which_imagej_does_not_tell_are_noted(tmp_path, slices, left_out):
    about = f"ImageJ=1.54f\nimages=6\nchannels=2\nslices={slices}\nhyperstack=true\n"
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        for _ in range(6):
            tiff.write(coordinates("yx", (8, 9)), description=about, metadata=None, contiguous=False)
            about = None
    slide = only(tmp_path / "a.tif")
    assert slide.levels[0].shape == (slices, 2, 8, 9)
    assert slide.notes == ((f"left out beside the scan: {left_out}",) if left_out else ())


def test_tiles_that_are_not_stored_have_the_value_that_is_noted(tmp_path):
    tiles = iter([np.full((16, 16), 7, "uint8"), None, None, None])
    ground = [(42113, "s", 0, "200", True)]  # GDAL's tag
    options = {"shape": (32, 32), "dtype": "uint8", "tile": (16, 16), "metadata": None, "extratags": ground}
    tifffile.imwrite(tmp_path / "a.tif", tiles, **options)
    slide = only(tmp_path / "a.tif")
    assert slide.notes == ("3 of 4 tiles of its first plane are not stored and read as 200",)
    assert set(read(slide, 0, (0,), 0, Box(0, 0, 32, 32)).flat) == {7, 200}


@pytest.mark.parametrize(("compression", "found"), [(34661, "JBIG"), (65432, "65432")])
def test_a_compression_that_cannot_be_decoded_is_named(tmp_path, compression, found):
    tifffile.imwrite(tmp_path / "a.tif", coordinates("yx", (8, 9)), compression="zlib", metadata=None)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as tiff:
        tiff.pages[0].tags["Compression"].overwrite(compression)
    assert f"expected a compression that can be decoded, found {found}" in only(tmp_path / "a.tif").reason


@pytest.mark.parametrize("ome", [True, False])
def test_lower_resolutions_that_are_not_in_the_file_are_noted(tmp_path, ome):
    pixels = coordinates("yx", (64, 64))
    with tifffile.TiffWriter(tmp_path / "a.tif", ome=ome) as tiff:
        tiff.write(pixels, subifds=2, tile=(16, 16))
        for step in (2, 4):
            tiff.write(pixels[::step, ::step], subfiletype=1, tile=(16, 16))
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as tiff:
        tags = tiff.pages[0].tags
        tags["SubIFDs"].overwrite((tags["SubIFDs"].value[0], 0))
    slide = only(tmp_path / "a.tif")
    assert [level.shape for level in slide.levels] == [(64, 64), (32, 32)]
    assert slide.notes == ("1 of its 2 lower resolutions are not in the file and left out",)


def test_a_file_that_was_cut_short_is_not_filled_up(tmp_path):
    for name, options in (
        ("a.tif", {"truncate": True}),
        ("b.tif", {"imagej": True}),
        ("c.ome.tif", {"ome": True}),
        ("d.tif", {"tile": (16, 16)}),
        ("e.tif", {"compression": "zlib"}),
        ("f.tif", {"metadata": None}),
    ):
        pixels = np.random.default_rng(0).integers(0, 999, (3, 40, 30), "uint16")
        options = {"metadata": {"axes": "ZYX"}, "photometric": "minisblack", **options}
        tifffile.imwrite(tmp_path / name, pixels, **options)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) * 2 // 3])
        image = only(tmp_path / name)
        if isinstance(image, Slide):
            with pytest.raises(ReadError):
                read(image, 0, (0,), 2, Box(0, 0, 40, 30))


def test_tifffile_prints_nothing_of_its_own(tmp_path):
    about = "ImageJ=1.54f\nimages=40\nslices=40\n"
    tifffile.imwrite(tmp_path / "a.tif", coordinates("yx", (8, 9)), description=about, metadata=None)
    script = (
        "import sys; from pathlib import Path; from cellseg_batch.engine.slides.discover import find_images; "
        "find_images(Path(sys.argv[1]))"
    )
    # In the tests' own process pytest takes what is logged.
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
