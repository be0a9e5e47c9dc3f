"""Outlines of objects: filling them gives the object again, and no ring touches itself."""

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from cellseg_batch.kernels.outline import signed_area, trace


def fill(ring, shape):
    """Pixels inside a ring by the even-odd rule: those with an odd number of its vertical edges on their left."""
    crossed = np.zeros((shape[0], shape[1] + 1), int)
    for (y0, x0), (y1, _) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        crossed[min(y0, y1) : max(y0, y1), x0] += 1
    return crossed.cumsum(axis=1)[:, :-1] % 2 == 1


@st.composite
def masks(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.random((draw(st.integers(1, 12)), draw(st.integers(1, 12)))) < draw(st.sampled_from([0.3, 0.6, 0.9]))


def test_every_small_mask_is_enclosed():
    for number in range(1 << 12):
        mask = (number >> np.arange(12) & 1).astype(bool).reshape(3, 4)
        assert sum(signed_area(ring) for ring, _ in trace(mask)) == mask.sum()
    rng = np.random.default_rng(0)
    for _ in range(1000):
        mask = rng.random((30, 30)) < 0.7
        assert sum(signed_area(ring) for ring, _ in trace(mask)) == mask.sum()


@given(masks())
@example(np.zeros((3, 3), bool))
@example(np.ones((1, 1), bool))
@example(np.array([[1, 1, 1], [1, 0, 1], [1, 1, 0]], bool))
def test_rings_enclose_the_object_exactly(mask):
    filled = np.zeros(mask.shape, bool)
    for ring, inside in trace(mask):
        assert len(np.unique(ring, axis=0)) == len(ring) >= 4
        assert mask[inside]
        region = fill(ring, mask.shape)
        assert region.sum() == abs(signed_area(ring))
        assert region[inside] == (signed_area(ring) > 0)
        filled ^= region
    np.testing.assert_array_equal(filled, mask)
