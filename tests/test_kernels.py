"""The fused kernels against the plain references that define them."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellseg_batch.kernels import gather_reference, stitch_reference
from cellseg_batch.kernels.gather import gather
from cellseg_batch.kernels.stitch import logit_threshold, stitch_mask, stitch_probability

DTYPES = ["uint8", "int8", "uint16", "int32", "float32", "float64", "bool"]


@given(
    st.sampled_from(DTYPES),
    st.sampled_from([1, 3]),
    st.booleans(),
    st.integers(1, 3),
    st.integers(0, 2**32 - 1),
)
def test_gather_equals_its_reference(dtype, channels, interleaved, tiles, seed):
    rng = np.random.default_rng(seed)
    values = rng.normal(40, 60, (23, 31, channels))
    if dtype.startswith("float"):
        values[rng.random(values.shape) < 0.05] = np.nan
        values[0, 0], values[0, 1] = np.inf, -np.inf
    pixels = np.moveaxis(values.astype(dtype) if dtype != "int8" else np.clip(values, -128, 127).astype(dtype), -1, 0)
    pixels = pixels if interleaved else np.ascontiguousarray(pixels)
    rows, columns = rng.integers(0, 23, (tiles, 9)), rng.integers(0, 31, (tiles, 12))
    out, expected = np.full((2, tiles, 3, 9, 12), -1.0, np.float32)
    low, scale = float(rng.normal(10, 10)), float(rng.choice([0.0, 0.013]))
    gather(pixels, rows, columns, low, scale, out)
    gather_reference.gather(pixels, rows, columns, low, scale, expected)
    np.testing.assert_array_equal(out, expected)
    assert out.min() >= 0
    assert out.max() <= 1


def test_gather_cuts_the_pixels_that_it_is_told_to():
    y, x = np.mgrid[:50, :60]
    pixels = (100 * y + x)[None].astype(np.float64)
    out = np.empty((1, 1, 2, 3), np.float32)
    gather(pixels, np.array([[7, 49]]), np.array([[0, 5, 59]]), 0.0, 1 / 8192, out)
    np.testing.assert_array_equal(out[0, 0] * 8192, [[700, 705, 759], [4900, 4905, 4959]])


def test_gather_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="do not fit"):
        gather(np.zeros((2, 9, 9)), np.zeros((1, 4), int), np.zeros((1, 4), int), 0, 1, np.empty((1, 3, 4, 4), "f4"))


@st.composite
def stitches(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    side, cores = draw(st.integers(4, 40)), draw(st.integers(1, 3))
    margin = draw(st.integers(0, (side - 1) // 2))
    core = side - 2 * margin
    logits = rng.normal(0, 4, (cores * cores, 2, side, side)).astype(np.float32)
    logits[rng.random(logits.shape) < 0.01] = np.nan
    places = np.array([[margin, margin, y * core, x * core, core, core] for y in range(cores) for x in range(cores)])
    return logits, places, cores * core


@given(stitches(), st.sampled_from([0.5, 0.03, 0.9]))
def test_stitch_equals_its_reference(case, probability):
    logits, places, side = case
    mask, expected = np.full((2, side, side), 7, np.uint8)
    threshold = logit_threshold(probability)
    counts = stitch_mask(logits, places, threshold, mask)
    assert counts == stitch_reference.stitch_mask(logits, places, threshold, expected)
    np.testing.assert_array_equal(mask, expected)
    assert counts[0] == mask.sum()
    stitch_probability(logits, places, mask)
    stitch_reference.stitch_probability(logits, places, expected)
    assert np.abs(mask.astype(int) - expected).max() <= 1


def test_a_padded_batch_writes_nothing_for_its_padding():
    logits = np.ones((3, 1, 4, 4), np.float32)
    mask = np.zeros((4, 8), np.uint8)
    stitch_mask(logits, np.array([[0, 0, 0, 0, 4, 4]]), 0.0, mask)
    np.testing.assert_array_equal(mask, np.repeat([[1, 1, 1, 1, 0, 0, 0, 0]], 4, axis=0))


def test_logit_threshold_inverts_the_sigmoid():
    assert logit_threshold(0.5) == 0
    assert 1 / (1 + math.exp(-logit_threshold(0.2))) == pytest.approx(0.2)


@pytest.mark.parametrize("writable", [True, False])
def test_compiled_kernels_are_cached_away_from_the_code(tmp_path, writable):
    """Beside the code they would outlive an uninstall and hide the next installation."""
    cache = tmp_path / "cache"
    if not writable:
        cache.write_text("a file where the folder should be")
    code = (
        "import numpy as np; from cellseg_batch.kernels import stitch;"
        "stitch.stitch_mask(np.ones((1, 1, 4, 4), 'f4'), np.array([[0, 0, 0, 0, 4, 4]]), 0.0, np.zeros((4, 4), 'u1'));"
        "print(stitch.stitch_numba.stitch_mask._cache.cache_path if WRITABLE else 'worked')"
    ).replace("WRITABLE", str(writable))
    environment = {key: value for key, value in os.environ.items() if key != "NUMBA_CACHE_DIR"}
    environment["XDG_CACHE_HOME"] = str(cache)
    output = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert output.startswith(str(cache)) if writable else output == "worked"
    assert bool(list(cache.rglob("*.nbi"))) == writable
