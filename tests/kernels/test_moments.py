"""Moments of objects against the reference, against scikit-image, and in pieces against in one piece."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skimage.filters import gaussian
from skimage.measure import label as components
from skimage.measure import regionprops_table

from cellseg_batch.kernels import moments, moments_reference, quality, quality_reference
from cellseg_batch.kernels import moments_columns as columns

FIGURES = ("perimeter", "eccentricity", "axis_major_length", "axis_minor_length")
LIGHT = ("intensity_mean", "intensity_min", "intensity_max", "intensity_std")
PROPERTIES = ("label", "area", "bbox", "centroid", *FIGURES, *LIGHT)


def cells(rng, height, width, density=0.55):
    """A label image of touching, concave and scattered objects with ids that have gaps."""
    rough = rng.random((-(-height // 3), -(-width // 3))).repeat(3, 0).repeat(3, 1)[:height, :width]
    labels = components((rough + 0.3 * rng.random((height, width))) < density * 1.3, connectivity=1)
    labels[rng.random(labels.shape) < 0.03] = labels.max() + 1  # one object strewn over the whole image
    return (labels * 7).astype(np.uint32)


def measure(labels, pixels, probability=None, cuts=((), ())):
    """Measure an image block by block, cut at rows ``cuts[0]`` and columns ``cuts[1]``."""
    padded = np.pad(labels, moments.HALO)
    rows, ids = [], []
    edges = [[0, *cut, length] for cut, length in zip(cuts, labels.shape, strict=True)]
    for y0, y1 in zip(edges[0], edges[0][1:], strict=False):
        for x0, x1 in zip(edges[1], edges[1][1:], strict=False):
            window = padded[y0 : y1 + 2 * moments.HALO, x0 : x1 + 2 * moments.HALO]
            part = None if probability is None else probability[y0:y1, x0:x1]
            found = moments.measure(window, pixels[:, y0:y1, x0:x1], part, (y0, x0))
            ids.append(found[0])
            rows.append(found[1])
    return moments.merge(np.concatenate(ids), np.concatenate(rows))


@st.composite
def images(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    height, width = draw(st.integers(2, 40)), draw(st.integers(2, 40))
    labels = cells(rng, height, width)
    dtype = draw(st.sampled_from(["uint8", "uint32", "float32"]))
    pixels = rng.normal(60, 20, (height, width, draw(st.integers(0, 3)))).clip(0)
    pixels = np.moveaxis(pixels.astype(dtype), -1, 0)
    probability = rng.integers(0, 256, (height, width), np.uint8) if draw(st.booleans()) else None
    cuts = [sorted(draw(st.sets(st.integers(1, side - 1), max_size=3))) for side in (height, width)]
    return labels, pixels, probability, cuts


@given(images())
def test_the_kernel_equals_its_reference(case):
    labels, pixels, probability, _ = case
    ids, rows = measure(labels, pixels, probability)
    certain = np.zeros((0, 0), np.uint8) if probability is None else probability
    expected = moments_reference.measure(np.pad(labels, moments.HALO), pixels, certain)
    np.testing.assert_array_equal(ids, expected[0])
    if pixels.dtype.kind == "f":
        np.testing.assert_allclose(rows, expected[1], rtol=1e-12)
    else:
        np.testing.assert_array_equal(rows, expected[1])


@given(images())
def test_pieces_add_up_to_the_whole(case):
    labels, pixels, probability, cuts = case
    ids, rows = measure(labels, pixels, probability)
    again, pieces = measure(labels, pixels, probability, cuts)
    np.testing.assert_array_equal(again, ids)
    if pixels.dtype.kind == "f":
        np.testing.assert_allclose(pieces, rows, rtol=1e-12)
    else:
        np.testing.assert_array_equal(pieces, rows)


def test_figures_are_those_of_scikit_image():
    rng = np.random.default_rng(5)
    labels = cells(rng, 190, 230)
    pixels = rng.integers(0, 65536, (2, 190, 230), np.uint16)
    ids, rows = measure(labels, pixels, cuts=((64, 128), (96, 97)))
    expected = regionprops_table(labels, np.moveaxis(pixels, 0, -1), PROPERTIES)
    np.testing.assert_array_equal(ids, expected["label"])
    np.testing.assert_array_equal(rows[:, columns.AREA], expected["area"])
    for number, column in enumerate((columns.TOP, columns.LEFT, columns.BOTTOM, columns.RIGHT)):
        np.testing.assert_array_equal(rows[:, column], expected[f"bbox-{number}"])
    area = rows[:, columns.AREA]
    figures = {
        "centroid-0": rows[:, columns.TOP] + rows[:, columns.SUM_Y] / area,
        "centroid-1": rows[:, columns.LEFT] + rows[:, columns.SUM_X] / area,
        "perimeter": moments.perimeter(rows),
    }
    names = ("axis_major_length", "axis_minor_length", "eccentricity")
    figures |= dict(zip(names, moments.axes(rows), strict=True))
    for channel in (0, 1):
        light = rows[:, columns.CHANNELS + columns.PER_CHANNEL * channel :]
        mean = light[:, columns.SUM] / area
        figures[f"intensity_min-{channel}"] = light[:, columns.LOW]
        figures[f"intensity_max-{channel}"] = light[:, columns.HIGH]
        figures[f"intensity_mean-{channel}"] = mean
        figures[f"intensity_std-{channel}"] = np.sqrt(light[:, columns.SQUARES] / area - mean**2)
    assert set(expected) - set(figures) == {"label", "area", "bbox-0", "bbox-1", "bbox-2", "bbox-3"}
    for name, values in figures.items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-6, atol=1e-6, err_msg=name)


def test_an_object_with_a_missing_pixel_has_no_intensity_there():
    labels = np.array([[4, 4, 9, 9]], np.uint64)
    pixels = np.array([[[1, np.nan, 3, 5]], [[1, 2, 3, 4]]], np.float32)
    for cuts in ((), ()), ((), (1,)), ((), (2,)):
        _, rows = measure(labels, pixels, cuts=cuts)
        light = rows[:, columns.CHANNELS :]
        np.testing.assert_array_equal(light[0], [np.nan] * 4 + [1, 2, 3, 5])
        np.testing.assert_array_equal(light[1], [3, 5, 8, 34, 3, 4, 7, 25])


def test_measure_refuses_shapes_that_do_not_fit():
    labels = np.zeros((9, 9), np.uint32)
    with pytest.raises(ValueError, match="do not fit"):
        moments.measure(labels, np.zeros((1, 9, 9), np.uint8), None, (0, 0))
    with pytest.raises(ValueError, match="do not fit"):
        moments.measure(labels, np.zeros((1, 5, 5), np.uint8), np.zeros((4, 4), np.uint8), (0, 0))


@given(st.integers(0, 2**32 - 1), st.sampled_from(["uint8", "int16", "int32", "float32"]), *[st.integers(1, 20)] * 2)
def test_quality_equals_its_reference_in_one_piece_and_in_two(seed, dtype, height, width):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 9, (height, width)).astype(dtype)
    if dtype == "float32":
        pixels[rng.random(pixels.shape) < 0.05] = np.nan
    cut = int(rng.integers(0, height + 1))
    found = quality.survey(pixels, np.s_[0:height, 0:width])
    expected = quality_reference.survey(pixels, 0, height, 0, width)
    assert tuple(vars(found).values()) == expected
    upper = quality.survey(pixels[: cut + 1], np.s_[0:cut, 0:width])
    above = max(0, cut - 1)
    lower = quality.survey(pixels[above:], np.s_[cut - above : height - above, 0:width])
    assert quality.Quality() + upper + lower == found


def test_focus_falls_with_blur_and_not_with_exposure():
    rng = np.random.default_rng(0)
    sharp = gaussian(rng.random((80, 80)), 1, preserve_range=True) * 1000
    whole = np.s_[0:80, 0:80]
    focus = quality.survey(sharp, whole).focus
    assert quality.survey(gaussian(sharp, 2, preserve_range=True), whole).focus < focus / 4
    assert quality.survey(3 * sharp, whole).focus == pytest.approx(focus)
    for scale in (0, 1e200, 1e-200):
        assert quality.survey(scale * sharp, whole).focus is None, "nothing, or squares that are infinite or 0"


def test_saturation_is_the_share_at_the_end_of_a_cameras_scale():
    pixels = np.full((10, 10), 7, np.uint16)
    assert quality.survey(pixels, np.s_[0:10, 0:10]).saturation == 0
    pixels[:2] = 4095
    assert quality.survey(pixels, np.s_[0:10, 0:10]).saturation == 0.2
