"""Stars: the fast form against the reference, and the reference against scikit-image and plain geometry."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.draw import polygon

from cellseg_batch.kernels import stardist, stardist_reference
from cellseg_batch.kernels.stardist import OPEN, SUPPRESSED, SURVIVOR, Stars, draw, find_stars, join, suppress

seeds_of_generators = st.integers(0, 2**32 - 1)


def some_stars(rng, count, shape, rays=16, longest=9.0, levels=4):
    """Ranked stars of random shapes; their few logits make many ties."""
    y, x = (values.astype(np.int32) for values in np.divmod(rng.choice(np.prod(shape), count, False), shape[1]))
    logits = rng.integers(0, levels, count).astype(np.float32)
    lengths = np.clip(rng.uniform(-0.2, 1, (count, 1)) + rng.normal(0, 0.3, (count, rays)), 0, 1) * longest
    stars = Stars(y, x, logits, np.maximum(lengths, stardist.SHORTEST_RAY).astype(np.float32))
    return stars.take(stars.ranking())


def discs(centres, radius, logits, rays=32):
    """Stars that are discs."""
    y, x = np.array(centres, np.int32).T
    return Stars(y, x, np.array(logits, np.float32), np.full((len(y), rays), radius, np.float32))


def decide(stars, threshold, states=None, exposed=None):
    count = len(stars.y)
    states = np.full(count, OPEN, np.uint8) if states is None else states
    return suppress(stars, states, np.zeros(count, bool) if exposed is None else exposed, threshold)


@settings(max_examples=25)
@given(
    seeds_of_generators,
    st.integers(0, 40),
    st.sampled_from([3, 5, 16, 32]),
    st.sampled_from([0.01, 2.0, 9.0, 40.0]),
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
)
def test_suppressing_equals_its_reference(seed, count, rays, longest, threshold):
    rng = np.random.default_rng(seed)
    stars = some_stars(rng, count, (40, 90), rays, longest)
    states = np.where(rng.random(count) < 0.2, SURVIVOR, OPEN).astype(np.uint8)
    for known in (np.full(count, OPEN, np.uint8), states):
        for exposed in (np.zeros(count, bool), rng.random(count) < 0.3):
            expected = known.copy()
            stardist_reference.suppress(stars, expected, exposed, threshold)
            np.testing.assert_array_equal(suppress(stars, known, exposed, threshold), expected)


@given(seeds_of_generators, st.integers(0, 40), st.sampled_from([3, 7, 32]), st.sampled_from([0.01, 3.0, 30.0]))
def test_drawing_equals_its_reference(seed, count, rays, longest):
    rng = np.random.default_rng(seed)
    stars = some_stars(rng, count, (60, 70), rays, longest)
    stars = stars._replace(y=stars.y - 10, x=stars.x - 10)
    ids = rng.permutation(count).astype(np.uint32) + 1
    out, expected = np.full((2, 37, 51), 99, np.uint32)
    draw(stars, ids, out)
    stardist_reference.draw(stars, ids, expected)
    np.testing.assert_array_equal(out, expected)


@given(seeds_of_generators, st.sampled_from([3, 8, 32]))
def test_a_star_covers_the_pixels_of_scikit_images_polygon(seed, rays):
    (lengths,) = some_stars(np.random.default_rng(seed), 1, (1, 1), rays, 30.0).rays
    y, x = np.mgrid[-31:32, -31:32]
    angles = np.linspace(0, 2 * np.pi, rays, endpoint=False)
    expected = np.zeros((63, 63), bool)
    # Shifted, so that no pixel lies on an edge, where the two may differ.
    expected[polygon(31 + 1e-4 + lengths * np.sin(angles), 31 - 2e-4 + lengths * np.cos(angles), (63, 63))] = True
    shifted = stardist_reference.is_inside(lengths, y - 1e-4, x + 2e-4)
    np.testing.assert_array_equal(shifted, expected)
    assert stardist_reference.is_inside(lengths, y, x)[31, 31], "a star covers its own centre"


def test_the_area_of_a_star_is_that_of_its_polygon():
    (lengths,) = np.random.default_rng(0).uniform(20, 40, (1, 32)).astype(np.float32)
    y, x = np.mgrid[-41:42, -41:42]
    exact = 0.5 * np.sin(2 * np.pi / 32) * np.sum(lengths * np.roll(lengths, 1))
    assert np.count_nonzero(stardist_reference.is_inside(lengths, y, x)) == pytest.approx(exact, rel=0.01)


def test_overlap_counts_the_smaller_star_and_is_not_the_intersection_over_union():
    stars = discs([(50, 50), (50, 58)], 0, [2, 1])
    stars.rays[:] = [[30], [5]]
    np.testing.assert_array_equal(decide(stars, 0.99), [SURVIVOR, SUPPRESSED])
    np.testing.assert_array_equal(decide(stars, 1.0), [SURVIVOR, SURVIVOR])


def test_a_suppressed_star_suppresses_none():
    chain = discs([(20, 20 + 8 * number) for number in range(7)], 10, range(7, 0, -1))
    np.testing.assert_array_equal(decide(chain, 0.4), [SURVIVOR, SUPPRESSED] * 3 + [SURVIVOR])


def test_ties_go_to_the_upper_then_the_left_star():
    stars = discs([(21, 20), (20, 22), (20, 21)], 10, [1, 1, 1])
    np.testing.assert_array_equal(stars.ranking(), [2, 1, 0])
    with pytest.raises(ValueError, match="order of their ranks"):
        decide(stars, 0.5)


def test_what_an_exposed_star_decides_stays_open_unless_a_survivor_decides_it():
    chain = discs([(20, 20 + 8 * number) for number in range(5)], 10, range(5, 0, -1))
    exposed = np.array([True, False, False, False, False])
    np.testing.assert_array_equal(decide(chain, 0.4, exposed=exposed), [OPEN] * 5)
    known = np.array([OPEN, SURVIVOR, OPEN, OPEN, OPEN], np.uint8)
    np.testing.assert_array_equal(
        decide(chain, 0.4, known, exposed), [OPEN, SURVIVOR, SUPPRESSED, SURVIVOR, SUPPRESSED]
    )


def test_the_star_of_the_highest_rank_is_on_top():
    out = np.zeros((40, 40), np.uint64)
    draw(discs([(20, 15), (20, 20)], 8, [2, 1]), np.array([7, 2**40], np.uint64), out)
    assert out[20, 17] == 7
    assert out[20, 26] == 2**40
    with pytest.raises(ValueError, match="2 ids of uint32 for 1 stars in uint64"):
        draw(discs([(20, 15)], 8, [2]), np.array([7, 8], np.uint32), out)


@given(seeds_of_generators, st.sampled_from([1, 2, 4]), st.sampled_from([1.0, 2.0]))
def test_candidates_are_the_points_of_the_grid_above_the_threshold(seed, grid, scale):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 4, (2, 9, 12, 16)).astype(np.float32)
    # Two cores in margins of 2 and 3 points; the second is clipped off the grid.
    height, width = 8 * grid, 10 * grid - (grid > 1)
    places = np.array([[2, 3, 0, 0, 8, 10], [2, 3, 8, 0, 8, 10]]) * grid
    places[1, 4:] = height, width
    stars, missing = find_stars(logits, places, grid, 0.5, scale, 5.0)
    both = np.concatenate([logits[0, :, 2:10, 3:13], logits[1, :, 2:10, 3:13]], axis=1)
    y, x = np.nonzero(both[0] > 0.5)
    order = np.lexsort((stars.x, stars.y))
    np.testing.assert_array_equal(stars.y[order], grid * y)
    np.testing.assert_array_equal(stars.x[order], grid * x)
    np.testing.assert_array_equal(stars.logits[order], both[0, y, x])
    rays = scale * both[1:, y, x].T
    np.testing.assert_allclose(stars.rays[order], np.clip(rays, stardist.SHORTEST_RAY, 5.0))
    assert missing == 0


def test_nan_is_counted_where_it_would_decide():
    logits = np.zeros((1, 5, 4, 4), np.float32)
    logits[0, 0, 1, 1:3] = 1, np.nan
    logits[0, 2, 1, 1] = logits[0, 2, 3, 3] = np.nan
    assert find_stars(logits, np.array([[0, 0, 0, 0, 4, 4]]), 1, 0.5, 1.0, 9.0)[1] == 2


def test_what_no_network_for_stars_gives_is_refused():
    places = np.array([[0, 0, 0, 0, 4, 4]])
    with pytest.raises(ValueError, match="2 rays"):
        find_stars(np.zeros((1, 3, 4, 4), np.float32), places, 1, 0.5, 1.0, 9.0)
    with pytest.raises(ValueError, match="off the grid of 2 px"):
        find_stars(np.zeros((1, 9, 4, 4), np.float32), places + 1, 2, 0.5, 1.0, 9.0)
    with pytest.raises(ValueError, match="core leaves"):
        find_stars(np.zeros((1, 9, 4, 4), np.float32), 2 * places, 1, 0.5, 1.0, 9.0)


def test_no_stars_are_no_trouble():
    none = join([], 8)
    assert decide(none, 0.5).shape == (0,)
    out = np.zeros((3, 3), np.uint32)
    draw(none, np.zeros(0, np.uint32), out)
    assert not out.any()
