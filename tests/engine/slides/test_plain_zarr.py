"""Zarr arrays without image metadata are images if their axes are known."""

import warnings

import numpy as np
import pytest
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


def write_arrays(path, names, pixels, **options):
    """A group of arrays, each with the pixels that belong to its name."""
    group = zarr.open_group(str(path), mode="w")
    for name, array in zip(names, pixels, strict=True):
        group.create_array(name, shape=array.shape, dtype=array.dtype, **options)[...] = array
    return path


def halvings(pixels, count=3):
    return [pixels[..., :: 2**level, :: 2**level] for level in range(count)]


@pytest.mark.parametrize("names", [["s0", "s1", "s2"], ["0", "1", "2"], ["level_1", "level_2", "level_3"]])
@pytest.mark.parametrize("shape", [(64, 97), (3, 64, 97)])
def test_numbered_arrays_each_half_of_the_one_before_are_one_image(tmp_path, names, shape):
    pixels = halvings(coordinates("cyx"[-len(shape) :], shape))
    write_arrays(tmp_path / "a.zarr" / "other", ["b"], pixels[:1])
    zarr.open_group(str(tmp_path / "a.zarr"), mode="a")
    write_arrays(tmp_path / "a.zarr" / "pyramid", names, pixels)
    other, pyramid = find_images(tmp_path / "a.zarr")
    assert (other.path, other.notes) == ("other/b", ())
    assert (pyramid.name, pyramid.path) == ("a.zarr/pyramid", "pyramid")
    assert [level.shape for level in pyramid.levels] == [array.shape for array in pixels]
    assert pyramid.levels[2].scale[-2:] == (4, 97 / 25)
    assert pyramid.notes == (f"{', '.join(names)} are taken for resolutions of one image, as each is half as large as "
                             "the one before",)  # fmt: skip
    np.testing.assert_array_equal(
        read(pyramid, 1, (0,), 0, Box(3, 4, 20, 25))[0], pixels[1][..., 3:20, 4:25].reshape(-1, 17, 21)[0]
    )
    assert only(tmp_path / "a.zarr" / "pyramid" / names[1]).path == f"pyramid/{names[1]}"


@pytest.mark.parametrize(
    ("names", "pixels"),
    [
        (["0", "1"], [np.zeros((64, 96), "uint8"), np.zeros((31, 48), "uint8")]),
        (["0", "1"], [np.zeros((64, 96), "uint8"), np.zeros((32, 48), "uint16")]),
        (["0", "1"], [np.zeros((4, 64, 96), "uint8"), np.zeros((2, 32, 96), "uint8")]),
        (["0", "1"], [np.zeros((4, 64, 96), "uint8"), np.zeros((2, 32, 48), "uint8")]),
        (["a", "b"], halvings(np.zeros((64, 96), "uint8"), 2)),
        (["a0", "b1"], halvings(np.zeros((64, 96), "uint8"), 2)),
        (["2", "3"], halvings(np.zeros((64, 96), "uint8"), 2)),
    ],
)
def test_other_arrays_of_a_group_are_images_of_their_own(tmp_path, names, pixels):
    slides = find_images(write_arrays(tmp_path / "a.zarr", names, pixels))
    assert [(slide.path, slide.levels[0].shape) for slide in slides] == [
        (name, array.shape) for name, array in zip(names, pixels, strict=True)
    ]


def test_a_pyramid_whose_axes_are_unknown_is_one_failure(tmp_path):
    path = write_arrays(tmp_path / "a.zarr", ["s0", "s1"], halvings(np.zeros((9, 64, 96), "uint8"), 2))
    assert "`axes=czyx`" in only(path).reason
    assert only(path, axes="zyx").planes(0) == 9


@pytest.mark.parametrize(
    ("names", "axes"), [(["time", "y", "x"], "tyx"), (["channel", "y", "x"], "cyx"), ([None, None, None], "cyx")]
)
def test_names_of_dimensions_come_before_the_shape(tmp_path, names, axes):
    zarr.create_array(str(tmp_path / "a.zarr"), shape=(3, 8, 9), dtype="uint8", dimension_names=names)
    assert only(tmp_path / "a.zarr").axes == axes


def test_unknown_names_of_dimensions_are_no_channels(tmp_path):
    zarr.create_array(str(tmp_path / "a.zarr"), shape=(3, 8, 9), dtype="uint8", dimension_names=["angle", "y", "x"])
    assert "with axes angle, y, x (likely axes other than t, c, z, y, x)" in only(tmp_path / "a.zarr").reason
    assert only(tmp_path / "a.zarr", axes="tyx").axes == "tyx"
