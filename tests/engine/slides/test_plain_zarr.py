"""Zarr arrays without image metadata are images if their axes are known."""

import warnings

import numpy as np
import zarr

from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.slides.discover import find_images
from tests.support.slides import coordinates, only, read


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


def test_axes_can_be_given_for_plain_arrays(tmp_path):
    zarr.create_array(str(tmp_path / "a.zarr"), shape=(3, 4, 5, 6), dtype="uint8")
    assert only(tmp_path / "a.zarr", axes="tcyx").plane_axes == "t"


def test_xarrays_names_of_dimensions_are_axes(tmp_path):
    attributes = {"_ARRAY_DIMENSIONS": ["z", "y", "x"]}
    zarr.create_array(str(tmp_path / "a.zarr"), shape=(9, 8, 9), dtype="uint8", zarr_format=2, attributes=attributes)
    assert only(tmp_path / "a.zarr").axes == "zyx"
