"""Seeds, components and growth: the fast forms against the references, and the references against other people's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from cellseg_batch.kernels import instances, instances_reference
from cellseg_batch.kernels.instances import classify_pixels, grow, label_seeds, reach, seed_rule

seeds_of_generators = st.integers(0, 2**32 - 1)


def rule(**changes):
    usual = {"border_weight": 0.75, "smoothing": 1.4, "spacing": 1, "seed_level": 0.25, "border_level": -0.1}
    return seed_rule(foreground=0.0, **usual | changes)


def smooth_logits(rng, shape):
    """Blobs: logits of (N, 3, H, W) that neighbouring pixels share."""
    noise = ndimage.gaussian_filter(rng.normal(size=shape), (0, 0, 2, 2))
    return (5 * noise / noise.std()).astype(np.float32)


@given(seeds_of_generators, st.integers(0, 9), st.integers(1, 3), st.sampled_from([0.0, 0.7, 1.4]))
def test_marking_seeds_equals_its_reference(seed, margin, spacing, smoothing):
    rng = np.random.default_rng(seed)
    logits = smooth_logits(rng, (2, 3, 33, 41))
    for value in (np.nan, np.inf, -np.inf, 1e30):
        logits[rng.integers(2), rng.integers(3), rng.integers(33), rng.integers(41)] = value
    height, width = 33 - 2 * margin, 41 - 2 * margin
    places = np.array([[margin, margin, 0, 0, height, width], [margin, margin, 0, width, height, width]])
    smoothed = rule(spacing=spacing, smoothing=smoothing)
    out, expected = np.full((2, height, 2 * width), 9, np.uint8)
    assert classify_pixels(logits, places, smoothed, out) == instances_reference.classify_pixels(
        logits, places, smoothed, expected
    )
    np.testing.assert_array_equal(out, expected)


def test_a_seed_is_where_smoothed_distance_minus_border_is_high():
    logits = smooth_logits(np.random.default_rng(0), (1, 3, 120, 150))
    pixel_codes = np.empty((120, 150), np.uint8)
    classify_pixels(logits, np.array([[0, 0, 0, 0, 120, 150]]), rule(), pixel_codes)
    probability = 1 / (1 + np.exp(-logits[0].astype(float)))
    score = ndimage.gaussian_filter(probability[2] - 0.75 * probability[1], 1.4, mode="nearest")
    expected = np.where(logits[0, 0] > 0, 1 + (score > -0.1) + (score > 0.25), 0)
    assert np.mean(pixel_codes != expected) < 2e-3  # where the score rounds to a level
    assert set(np.unique(pixel_codes)) == {0, 1, 2, 3}


def test_pixel_codes_do_not_depend_on_how_a_margin_is_cut():
    logits = smooth_logits(np.random.default_rng(1), (1, 3, 64, 64))
    whole, part = np.empty((64, 64), np.uint8), np.empty((20, 30), np.uint8)
    classify_pixels(logits, np.array([[0, 0, 0, 0, 64, 64]]), rule(), whole)
    classify_pixels(logits, np.array([[17, 11, 0, 0, 20, 30]]), rule(), part)
    np.testing.assert_array_equal(part, whole[17:37, 11:41])


def test_marking_refuses_a_model_without_distance_and_a_core_outside():
    out = np.empty((8, 8), np.uint8)
    with pytest.raises(ValueError, match="1 logits"):
        classify_pixels(np.zeros((1, 1, 8, 8), np.float32), np.array([[0, 0, 0, 0, 8, 8]]), rule(), out)
    with pytest.raises(ValueError, match="core leaves"):
        classify_pixels(np.zeros((1, 3, 8, 8), np.float32), np.array([[4, 0, 0, 0, 8, 8]]), rule(), out)


PATTERNS = {
    "noise": lambda rng, shape: rng.integers(0, 4, shape),
    "seeds": lambda rng, shape: np.where(rng.random(shape) < 0.6, 3, 0),
    "checkerboard": lambda rng, shape: np.where(np.indices(shape).sum(0) % 2, 3, 2),
    "comb": lambda rng, shape: np.where((np.indices(shape)[1] % 2 == 0) | (np.indices(shape)[0] == shape[0] - 1), 3, 0),
    "spiral": lambda rng, shape: 3 * _spiral(shape),
    "empty": lambda rng, shape: np.zeros(shape),
    "full": lambda rng, shape: np.full(shape, 3),
}


def _spiral(shape):
    canvas, (y, x), (dy, dx) = np.zeros(shape, int), (0, 0), (0, 1)
    for _ in range(shape[0] * shape[1]):
        canvas[y, x] = 1
        ahead = (y + dy, x + dx), (y + 2 * dy, x + 2 * dx)
        inside = [0 <= a < shape[0] and 0 <= b < shape[1] for a, b in ahead]
        if not inside[0] or (inside[1] and canvas[ahead[1]]):
            dy, dx = dx, -dy
        y, x = y + dy, x + dx
        if not (0 <= y < shape[0] and 0 <= x < shape[1]) or canvas[y, x]:
            break
    return canvas


@given(st.sampled_from(sorted(PATTERNS)), seeds_of_generators, st.tuples(st.integers(1, 30), st.integers(1, 30)))
def test_labelling_equals_its_reference_and_scipy(pattern, seed, shape):
    rng = np.random.default_rng(seed)
    pixel_codes = PATTERNS[pattern](rng, shape).astype(np.uint8)
    cell = tuple(rng.integers(1, 33, 2).tolist())
    smallest, sides = int(rng.integers(0, 6)), tuple((rng.random(4) < 0.5).tolist())
    out, expected = np.full((2, *shape), 9, np.uint32)
    found = label_seeds(pixel_codes, cell, smallest, sides, out)
    first, area = instances_reference.label_seeds(pixel_codes, cell, smallest, sides, expected)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(found.first, first)
    np.testing.assert_array_equal(found.area, area)
    components, count = ndimage.label(pixel_codes == 3)
    everything = label_seeds(pixel_codes, cell, 0, sides, out)
    assert len(everything.area) == count
    pairs = np.unique(np.stack([components[pixel_codes == 3], out[pixel_codes == 3]]), axis=1)
    assert pairs.shape[1] == count


def test_ids_follow_cells_and_small_seeds_stay_only_at_open_sides():
    pixel_codes = np.zeros((8, 8), np.uint8)
    pixel_codes[0, 6:] = pixel_codes[2, 1:4] = pixel_codes[5, 0] = pixel_codes[6, 2:4] = pixel_codes[7, 5] = 3
    codes = np.empty((8, 8), np.uint32)
    seeds = label_seeds(pixel_codes, (4, 4), 2, (False, True, False, False), codes)
    # Cell (0, 0) comes before cell (0, 1), whose seed lies higher; the single pixel inside is no seed.
    np.testing.assert_array_equal(seeds.first, [2 * 8 + 1, 6, 5 * 8, 6 * 8 + 2])
    np.testing.assert_array_equal(seeds.area, [3, 2, 1, 2])
    assert codes[2, 1] == 3
    assert codes[0, 7] == 4
    assert codes[5, 0] == 5
    assert codes[6, 3] == 6
    assert codes[7, 5] == 2


@given(seeds_of_generators, st.integers(1, 5), st.sampled_from(["uint32", "uint64"]), st.floats(0.001, 0.3))
def test_growth_equals_its_reference(seed, steps, dtype, share):
    rng = np.random.default_rng(seed)
    height, width, frame = *rng.integers(1, 25, 2), reach(steps)
    codes = rng.choice([0, 1, 2], (height + 2 * frame, width + 2 * frame), p=[0.2, 0.3, 0.5]).astype(dtype)
    high = 2**40 if dtype == "uint64" else 2**31
    codes = np.where(rng.random(codes.shape) < share, rng.integers(3, high, codes.shape), codes).astype(dtype)
    out, expected = np.zeros((2, height, width), dtype)
    grow(codes.copy(), steps, out)
    instances_reference.grow(codes.copy(), steps, expected)
    np.testing.assert_array_equal(out, expected)


def test_seeds_meet_at_the_border_that_the_model_saw():
    line = np.array([3, 2, 1, 2, 2, 2, 2, 2, 2, 4], np.uint32)  # the border is much nearer to the first seed
    frame = reach(6)
    codes = np.pad(line[None], frame)
    out = np.zeros((1, 10), np.uint32)
    grow(codes, 6, out)
    np.testing.assert_array_equal(out[0], [1, 1, 1, 2, 2, 2, 2, 2, 2, 2])


@pytest.mark.parametrize("dtype", ["uint32", "uint64"])
def test_renumbering_equals_its_reference(dtype):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 9, (20, 30), np.uint32)
    final = np.append([0, 1, 2], rng.integers(3, np.iinfo(dtype).max, 6, np.uint64)).astype(dtype)
    out = np.zeros((2, 24, 34), dtype)
    for renumbered, work in zip(out, (instances.renumber, instances_reference.renumber), strict=True):
        work(codes, final, renumbered[2:-2, 2:-2])
        work(codes[:, 1:-1], final, renumbered[1:-3, 1:-5])
    np.testing.assert_array_equal(*out)
    for wrong in (final[:-1], final[:0]):
        with pytest.raises(ValueError, match="up to 8"):
            instances.renumber(codes, wrong, np.zeros((20, 30), dtype))


def test_growth_ends_after_its_steps():
    codes = np.pad(np.array([[3, 2, 2, 2, 2, 2]], np.uint32), reach(2))
    out = np.zeros((1, 6), np.uint32)
    grow(codes, 2, out)
    np.testing.assert_array_equal(out[0], [1, 1, 1, 1, 1, 0])


def test_growth_takes_the_neighbour_above_whatever_its_id():
    for above, left in ((8, 5), (5, 8)):
        codes = np.zeros((7, 7), np.uint32)
        codes[3, 3], codes[2, 3], codes[3, 2] = 2, above, left
        out = np.zeros((1, 1), np.uint32)
        grow(codes, 1, out)
        assert out[0, 0] == above - 2


def test_growth_looks_no_further_than_it_says():
    rng = np.random.default_rng(3)
    codes = rng.choice([0, 1, 2, 5, 9], (61, 61), p=[0.1, 0.3, 0.56, 0.02, 0.02]).astype(np.uint32)
    steps = 4
    changed = codes.copy()
    y, x = np.indices(codes.shape) - 30
    far = abs(y) + abs(x) > 2 * steps
    changed[far] = rng.choice([0, 1, 2, 7], codes.shape)[far]
    middle = slice(30 - reach(steps), 31 + reach(steps))
    one, other = np.zeros((2, 1, 1), np.uint32)
    grow(codes[middle, middle].copy(), steps, one)
    grow(changed[middle, middle].copy(), steps, other)
    assert one == other


def test_growth_refuses_a_frame_of_another_width():
    with pytest.raises(ValueError, match="frame of 5 px"):
        grow(np.zeros((9, 9), np.uint32), 2, np.zeros((1, 1), np.uint32))
    with pytest.raises(ValueError, match="at least 1"):
        grow(np.zeros((9, 9), np.uint32), 0, np.zeros((7, 7), np.uint32))
