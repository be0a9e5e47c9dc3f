"""Pixel codes of HoVer-Net's maps: the fast forms against the reference, and the reference against SciPy's Sobel."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from cellseg_batch.kernels import hover_reference, hover_torch
from cellseg_batch.kernels.hover import classify_maps, hover_rule
from tests.support.hover_maps import crowded_nuclei, draw_maps


def smooth_maps(rng, shape):
    """Outputs (N, 3, H, W) that neighbouring pixels share, some of them beyond -1 and 1."""
    noise = ndimage.gaussian_filter(rng.normal(size=shape), (0, 0, 3, 3))
    return (noise / noise.std()).astype(np.float32)


@given(st.integers(0, 2**32 - 1), st.integers(0, 12), st.integers(1, 3), st.sampled_from(["float32", "float16"]))
def test_classifying_equals_its_reference(seed, margin, spacing, precision):
    rng = np.random.default_rng(seed)
    logits = smooth_maps(rng, (3, 3, 33, 41)).astype(precision)
    for value in (np.nan, np.inf, -np.inf, 6e4):
        logits[rng.integers(3), rng.integers(3), rng.integers(33), rng.integers(41)] = value
    height, width = 33 - 2 * margin, 41 - 2 * margin
    places = np.array([[margin, margin, 0, 0, height, width], [margin, margin, 0, width, height, width]])
    rule = hover_rule(0.2, spacing, 0.05, -0.05)
    expected, fast, in_torch = np.full((3, height, 2 * width), 9, np.uint8)
    counts = hover_reference.classify_maps(logits.astype(np.float32), places, rule, expected)
    assert classify_maps(logits.astype(np.float32), places, rule, fast) == counts
    found = hover_torch.classify_maps(torch.from_numpy(logits), places, rule, torch.from_numpy(in_torch))
    assert tuple(found.tolist()) == counts
    np.testing.assert_array_equal(fast, expected)
    np.testing.assert_array_equal(in_torch, expected)


def codes_of(maps, rule, box=(0, 0, None, None)):
    """The pixel codes of a part (y, x, height, width) of one tile."""
    height, width = box[2] or maps.shape[1], box[3] or maps.shape[2]
    out = np.empty((height, width), np.uint8)
    classify_maps(maps[None], np.array([[*box[:2], 0, 0, height, width]]), rule, out)
    return out


def test_a_seed_is_where_both_maps_rise_by_a_sobel_kernel_of_21_px():
    maps = draw_maps(crowded_nuclei(150, 180, 60))
    # A Sobel kernel of 21 taps is one of 3 taps that a binomial of 19 taps smooths, nine times (1, 2, 1) / 4.
    gradients = []
    for axis, values in ((1, maps[1]), (0, maps[2])):
        gradient = ndimage.sobel(np.clip(values, -1, 1).astype(float), axis, mode="nearest")
        for _ in range(9):
            for along in (0, 1):
                gradient = ndimage.correlate1d(gradient, [0.25, 0.5, 0.25], along, mode="nearest")
        gradients.append(gradient)
    step = np.sign(np.arange(-20.5, 21))[None].repeat(42, 0)
    highest = ndimage.sobel(step, 1)
    for _ in range(9):
        highest = ndimage.correlate1d(highest, [0.25, 0.5, 0.25], 1, mode="constant")
    rise = np.minimum(*gradients) / highest[21].max()
    expected = np.where(maps[0] > 0, 1 + (rise > -0.3) + (rise > 0.05), 0)
    codes = codes_of(maps, hover_rule(0.0, 1, 0.05, -0.3))
    inside = np.s_[10:-10, 10:-10]  # the smoothings repeat different pixels beyond the edge
    assert np.mean(codes[inside] != expected[inside]) < 5e-3  # where the rise rounds to a level
    assert set(np.unique(codes)) == {0, 1, 2, 3}


@pytest.mark.parametrize("spacing", [1, 2])
def test_pixel_codes_do_not_depend_on_how_a_margin_is_cut(spacing):
    maps, rule = smooth_maps(np.random.default_rng(1), (1, 3, 90, 100))[0], hover_rule(0.0, spacing, 0.05, -0.05)
    margin = rule.reach
    whole, part = codes_of(maps, rule), codes_of(maps, rule, (30, 35, 20, 30))
    np.testing.assert_array_equal(part, whole[30:50, 35:65])
    cut = maps[:, 30 - margin : 50 + margin, 35 - margin : 65 + margin]
    np.testing.assert_array_equal(codes_of(cut, rule, (margin, margin, 20, 30)), part)


def test_a_fall_between_two_nuclei_is_border():
    maps = np.full((3, 40, 60), 8, np.float32)
    maps[1] = np.r_[np.linspace(-1, 1, 30), np.linspace(-1, 1, 30)]
    maps[2] = np.linspace(-1, 1, 40)[:, None]
    line = codes_of(maps, hover_rule(0.0, 1, 0.05, -0.3))[20]
    assert (line[28:32] == 1).all()
    assert (line[:25] == 3).all()
    assert (line[35:] == 3).all()


def test_classifying_refuses_other_outputs_and_a_core_outside():
    out, rule = np.empty((8, 8), np.uint8), hover_rule(0.0, 1, 0.05, -0.3)
    with pytest.raises(ValueError, match="1 outputs"):
        classify_maps(np.zeros((1, 1, 8, 8), np.float32), np.array([[0, 0, 0, 0, 8, 8]]), rule, out)
    with pytest.raises(ValueError, match="core leaves"):
        classify_maps(np.zeros((1, 3, 8, 8), np.float32), np.array([[4, 0, 0, 0, 8, 8]]), rule, out)
