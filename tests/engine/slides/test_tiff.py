"""TIFF files: axes, series, pyramids, pixel sizes."""

import numpy as np
import pytest
import tifffile

from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.slides.discover import find_images
from cellseg_batch.engine.slides.level_and_channels import choose_level
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


def test_every_series_of_an_ome_tiff_is_an_image_and_thumbnails_of_others_are_not(tmp_path):
    large, small = coordinates("yx", (40, 30)), coordinates("yx", (20, 10))
    for name, ome in (("two.ome.tif", True), ("two.tif", False)):
        with tifffile.TiffWriter(tmp_path / name, ome=ome) as tiff:
            tiff.write(large)
            tiff.write(small)
    first, second = find_images(tmp_path / "two.ome.tif")
    assert [(slide.name, slide.path) for slide in (first, second)] == [("two.ome.tif/0", "0"), ("two.ome.tif/1", "1")]
    np.testing.assert_array_equal(read(second, 0, (0,), 0, Box(0, 0, 20, 10))[0], small)
    assert only(tmp_path / "two.tif").plane_shape(0) == (40, 30)
