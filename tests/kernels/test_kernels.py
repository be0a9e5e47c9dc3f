"""The fused kernels against the plain references that define them."""

import importlib.util
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cellseg_batch.kernels import gather_reference, instances_reference, stitch, stitch_reference
from cellseg_batch.kernels._fastest import fastest
from cellseg_batch.kernels.gather import cut, gather
from cellseg_batch.kernels.instances import seed_rule
from cellseg_batch.kernels.stitch import logit_threshold, stitch_classes, stitch_mask, stitch_probability
from cellseg_batch.kernels.tiling import TileGrid, check_places

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed: pip install 'cellseg-batch[triton]'")
if HAS_TRITON:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_INTERPRET", "1")
        from cellseg_batch.kernels import blend_triton, gather_triton, instances_triton, stitch_triton


@pytest.fixture(autouse=True, scope="module")
def interpreted_triton():
    """Triton interprets kernels, without a GPU, if this is set when they are decorated and when they are called."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_INTERPRET", "1")
        yield


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
    lows, scales = rng.normal(10, 10, 3), rng.choice([0.0, 0.013], 3)
    for clip in (True, False):
        gather(pixels, rows, columns, lows, scales, out, clip)
        gather_reference.gather(pixels, rows, columns, lows, scales, expected, clip)
        np.testing.assert_array_equal(out, expected)


def test_gather_cuts_the_pixels_that_it_is_told_to():
    y, x = np.mgrid[:50, :60]
    pixels = (100 * y + x)[None].astype(np.float64)
    out = np.empty((1, 1, 2, 3), np.float32)
    gather(pixels, np.array([[7, 49]]), np.array([[0, 5, 59]]), 0.0, 1 / 8192, out)
    np.testing.assert_array_equal(out[0, 0] * 8192, [[700, 705, 759], [4900, 4905, 4959]])


@given(
    st.sampled_from([1, 3]),
    st.booleans(),
    st.lists(st.integers(0, 22), min_size=1, max_size=12),
    st.integers(-50, 40),
    st.integers(1, 60),
)
def test_cut_copies_any_rows_and_mirrored_columns(channels, interleaved, rows, start, width):
    pixels = np.random.default_rng(width).integers(0, 256, (23, 31, channels), np.uint8).transpose(2, 0, 1)
    pixels = pixels if interleaved else np.ascontiguousarray(pixels)
    columns = np.pad(np.arange(31), 500, mode="reflect")[500 + start :][:width]
    out = np.full((1, 3, len(rows), width), 7, np.uint8)
    cut(pixels, np.array([rows]), columns[None], out)
    np.testing.assert_array_equal(out[0], np.broadcast_to(pixels[:, rows][:, :, columns], out.shape[1:]))


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


@given(stitches(), st.sampled_from([0.5, 0.03, 0.9]), st.integers(1, 4), st.booleans())
def test_classes_equal_their_reference(case, probability, classes, on_device):
    logits, places, side = case
    rng = np.random.default_rng(side)
    more = np.round(rng.normal(0, 2, (len(logits), classes, *logits.shape[2:]))).astype(np.float32)  # many are equal
    more[rng.random(more.shape) < 0.01] = rng.choice([np.nan, np.inf, -np.inf])
    logits = np.concatenate([np.round(logits[:, :1]), more], axis=1)
    labels, expected = np.full((2, side, side), 77, np.uint8)
    threshold = logit_threshold(probability)
    counts = stitch_reference.stitch_classes(logits, places, threshold, expected)
    if on_device and HAS_TRITON:
        found = stitch_triton.stitch_classes(torch.from_numpy(logits), places, threshold, torch.from_numpy(labels))
        assert tuple(found.tolist()) == counts
    else:
        assert stitch_classes(logits, places, threshold, labels) == counts
    np.testing.assert_array_equal(labels, expected)
    assert counts[0] == np.count_nonzero(labels)


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


def spoil(rng, logits):
    """Strew what a float16 network may put out: NaN, infinities, huge values, thresholds hit exactly."""
    for value in (np.nan, np.inf, -np.inf, 60000, -60000, 0):
        logits[rng.random(logits.shape) < 0.004] = value


@st.composite
def byte_cores(draw):
    """Logits, places and output shape (H, W) of tiles whose cores begin at whole bytes; the last may end anywhere."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    height, width = draw(st.integers(1, 40)), 8 * draw(st.integers(1, 10))
    top, left, cut = draw(st.integers(0, 9)), draw(st.sampled_from([0, 3, 8, 16])), draw(st.integers(0, 7))
    logits = rng.normal(0, 4, (rows * columns + 1, 2, height + 2 * top, width + 2 * left))
    logits = logits.astype(draw(st.sampled_from([np.float16, np.float32])))
    spoil(rng, logits)
    places = np.array([[top, left, y * height, x * width, height, width] for y in range(rows) for x in range(columns)])
    places[columns - 1 :: columns, 5] -= cut
    return logits, places, (rows * height, columns * width - cut)


@st.composite
def overlapping_tiles(draw):
    """Logits and the grid of their tiles, with any window of it."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    overlap = 2 ** draw(st.integers(0, 5))
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    height, width = (2 * overlap + draw(st.integers(1, 40)) for _ in range(2))
    whole = ((count - 1) * (side - overlap) + side for count, side in ((rows, height), (columns, width)))
    (top, bottom), (left, right) = (sorted(rng.choice(length + 1, 2, replace=False).tolist()) for length in whole)
    if draw(st.booleans()):
        top = left = 0
    logits = rng.normal(0, 4, (rows * columns + 1, 2, height, width))
    logits = logits.astype(draw(st.sampled_from([np.float16, np.float32])))
    spoil(rng, logits)
    return logits, TileGrid(rows, columns, overlap, top, left, bottom - top, right - left)


def forms(form, implementation, logits, argument, shape, threshold):
    """Mask, probability and counts that ``implementation`` makes of a crop or a blend."""
    made, counts = [], []
    with np.errstate(all="ignore"):  # the interpreter computes with numpy, a GPU is silent
        for name in ("mask", "probability"):
            out = np.full(shape, 7, np.uint8)
            target, limit = torch.from_numpy(out), () if name == "probability" else (threshold,)
            result = getattr(implementation, f"{form}_{name}")(
                logits, argument, *limit, target if isinstance(logits, torch.Tensor) else out
            )
            made.append(out)
            counts.append(None if result is None else tuple(int(value) for value in result))
    return made, counts


def assert_forms_equal(made, expected):
    (mask, probability), counts = made
    (expected_mask, expected_probability), expected_counts = expected
    np.testing.assert_array_equal(mask, expected_mask)
    assert np.abs(probability.astype(int) - expected_probability).max() <= 1
    assert counts == expected_counts


THRESHOLDS = st.sampled_from([0.0, -3.4, 2.2])


@given(byte_cores(), THRESHOLDS)
def test_every_form_of_stitch_equals_its_reference(case, threshold):
    logits, places, shape = case
    logits = logits.astype(np.float32)
    expected = forms("stitch", stitch_reference, logits, places, shape, threshold)
    assert_forms_equal(forms("stitch", stitch, logits, places, shape, threshold), expected)


@given(overlapping_tiles(), THRESHOLDS)
def test_every_form_of_blend_equals_its_reference(case, threshold):
    logits, grid = case
    logits, shape = logits.astype(np.float32), grid[5:]
    expected = forms("blend", stitch_reference, logits, grid, shape, threshold)
    assert_forms_equal(forms("blend", stitch, logits, grid, shape, threshold), expected)


@needs_triton
@settings(max_examples=20)
@given(byte_cores(), THRESHOLDS)
def test_every_form_of_stitch_in_triton_equals_its_reference(case, threshold):
    logits, places, shape = case
    expected = forms("stitch", stitch_reference, logits.astype(np.float32), places, shape, threshold)
    assert_forms_equal(forms("stitch", stitch_triton, torch.from_numpy(logits), places, shape, threshold), expected)


@needs_triton
@settings(max_examples=20)
@given(overlapping_tiles(), THRESHOLDS)
def test_every_form_of_blend_in_triton_equals_its_reference(case, threshold):
    logits, grid = case
    expected = forms("blend", stitch_reference, logits.astype(np.float32), grid, grid[5:], threshold)
    assert_forms_equal(forms("blend", blend_triton, torch.from_numpy(logits), grid, grid[5:], threshold), expected)


@given(overlapping_tiles())
def test_tiles_that_agree_are_blended_into_their_image_exactly(case):
    _, grid = case
    height, width = case[0].shape[2:]
    rng = np.random.default_rng(grid.width)
    steps = height - grid.overlap, width - grid.overlap
    image = rng.normal(0, 4, (grid.rows * height, grid.columns * width)).astype(np.float16).astype(np.float32)
    corners = [(row * steps[0], column * steps[1]) for row in range(grid.rows) for column in range(grid.columns)]
    tiles = np.stack([image[y : y + height, x : x + width] for y, x in corners])[:, None]
    window = image[grid.top :, grid.left :][: grid.height, : grid.width]
    np.testing.assert_array_equal(stitch_reference.blend(tiles, grid), window)


def test_a_blend_runs_evenly_from_one_tile_to_the_next():
    logits = np.zeros((2, 1, 16, 16), np.float32)
    logits[1] = 8
    grid = TileGrid(rows=1, columns=2, overlap=8, top=0, left=0, height=16, width=24)
    ramp = [0] * 8 + list(range(8)) + [8] * 8
    np.testing.assert_array_equal(stitch_reference.blend(logits, grid), [ramp] * 16)


def test_a_tile_of_no_weight_cannot_spoil_a_seam():
    logits = np.ones((2, 1, 4, 16), np.float32)
    logits[1, :, :, 0] = np.inf
    grid = TileGrid(rows=1, columns=2, overlap=2, top=0, left=0, height=4, width=30)
    mask = np.zeros((4, 30), np.uint8)
    assert stitch.blend_mask(logits, grid, 0.0, mask) == (120, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"overlap": 3}, "power of two"),
        ({"overlap": 0}, "power of two"),
        ({"overlap": 128}, "power of two"),
        ({"overlap": 16}, "power of two"),
        ({"rows": 3}, "do not fill"),
        ({"rows": 0}, "do not fill"),
        ({"top": 1}, "leaves a grid"),
        ({"left": -1}, "leaves a grid"),
        ({"height": 35}, "does not fit"),
    ],
)
def test_blend_refuses_a_grid_that_does_not_fit(change, message):
    grid = TileGrid(rows=2, columns=2, overlap=4, top=0, left=0, height=36, width=36)
    logits, mask = np.zeros((4, 1, 20, 20), np.float32), np.zeros((36, 36), np.uint8)
    assert stitch.blend_mask(logits, grid, 0.0, mask) == (0, 0)
    with pytest.raises(ValueError, match=message):
        stitch.blend_mask(logits, grid._replace(**change), 0.0, mask)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ([1, 0, 0, 0, 8, 8], "leaves its tile"),
        ([0, 0, 0, 16, 8, 8], "leaves its tile"),
        ([0, 0, -1, 0, 8, 8], "leaves its tile"),
    ],
)
def test_cores_that_do_not_fit_are_refused(place, message):
    logits, out = (1, 1, 8, 8), (8, 16)
    with pytest.raises(ValueError, match=message):
        check_places(np.array([place]), logits, out)
    with pytest.raises(ValueError, match="expected"):
        check_places(np.zeros((2, 6), int), logits, out)


@needs_triton
@settings(max_examples=15)
@given(
    st.sampled_from(["uint8", "uint16", "float32"]),
    st.sampled_from([torch.float16, torch.float32]),
    st.sampled_from([1, 3]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_gather_in_triton_equals_its_reference(dtype, precision, channels, interleaved, seed):
    rng = np.random.default_rng(seed)
    values = np.clip(rng.normal(40, 60, (23, 31, channels)), 0, 255)
    if dtype == "float32":
        values[rng.random(values.shape) < 0.05] = np.nan
        values[0, 0], values[0, 1] = np.inf, -np.inf
    pixels = np.moveaxis(values.astype(dtype), -1, 0)
    pixels = pixels if interleaved else np.ascontiguousarray(pixels)
    rows, columns = rng.integers(0, 23, (2, 9)), rng.integers(0, 31, (2, int(rng.integers(1, 200))))
    expected = np.full((2, 3, 9, columns.shape[1]), -1, np.float32)
    out = torch.from_numpy(expected).to(precision)
    low, scale, clip = rng.normal(10, 10, 3), rng.choice([0.0, 0.013], 3), bool(rng.integers(2))
    with np.errstate(all="ignore"):
        gather_triton.gather(torch.from_numpy(pixels), rows, columns, low, scale, out, clip)
    gather_reference.gather(pixels, rows, columns, low, scale, expected, clip)
    assert torch.equal(out, torch.from_numpy(expected).to(precision))


@needs_triton
@settings(max_examples=8)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 9),
    st.sampled_from([1, 2, 7]),
    st.sampled_from([0.0, 0.7, 1.1]),
    st.sampled_from([torch.float16, torch.float32]),
)
def test_pixel_codes_in_triton_equal_their_reference(seed, margin, spacing, smoothing, precision):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 6, (3, 3, 27, 81)).astype(np.float16)
    for value in (np.nan, np.inf, -np.inf, 6e4):
        logits[rng.random(logits.shape) < 0.02] = value
    height, width = 27 - 2 * margin, 81 - 2 * margin
    places = np.array([[margin, margin, 0, 0, height, width], [margin, margin, 0, width, height - 3, width - 1]])
    rule = seed_rule(float(rng.normal()), 0.75, smoothing, spacing, 0.1, -0.1)
    expected = np.full((height, 2 * width), 9, np.uint8)
    out = torch.from_numpy(expected.copy())
    counts = instances_triton.classify_pixels(torch.from_numpy(logits).to(precision), places, rule, out)
    assert tuple(counts.tolist()) == instances_reference.classify_pixels(
        logits.astype(np.float32), places, rule, expected
    )
    np.testing.assert_array_equal(out, expected)


@needs_triton
def test_pixel_codes_in_triton_need_logits_that_can_be_read():
    codes, places = torch.zeros(8, 8, dtype=torch.uint8), np.array([[0, 0, 0, 0, 8, 8]])
    rule = seed_rule(0, 1, 1, 1, 0, 0)
    for logits, message in (
        (torch.zeros(1, 1, 8, 8), "1 logits"),
        (torch.zeros(1, 3, 8, 8).double(), "expected float16"),
        (torch.zeros(1, 3, 8, 7), "leaves its tile"),
    ):
        with pytest.raises(ValueError, match=message):
            instances_triton.classify_pixels(logits, places, rule, codes)


@needs_triton
@pytest.mark.parametrize("module", ["stitch_triton", "blend_triton", "gather_triton", "instances_triton"])
def test_the_check_of_each_triton_module_passes(module):
    globals()[module].check("cpu")


@needs_triton
def test_triton_kernels_count_beyond_32_bits(monkeypatch):
    """More than 2^31 logits or pixels; the memory is reserved, and but for a few pixels never touched."""
    from triton.runtime.interpreter import GridExecutor

    # It would copy whole arguments back, which are the same memory here.
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *arguments: None)
    side = 2**14
    logits = torch.empty(9, 1, side, side, dtype=torch.float16)
    logits[8, 0, :24, :48] = torch.arange(-24, 24)
    out = torch.full((8, 16), 7, dtype=torch.uint8)
    places = np.zeros((9, 6), np.int64)
    places[8] = 0, 16, 0, 0, 8, 16
    expected = np.broadcast_to(np.arange(16) > 8, (8, 16))
    assert stitch_triton.stitch_mask(logits, places, 0.0, out).tolist() == [56, 0]
    np.testing.assert_array_equal(out, expected)
    last = 8 * (side - 16) + 16
    for grid in (TileGrid(1, 9, 16, top=0, left=last, height=8, width=16), TileGrid(9, 1, 16, last, 16, 8, 16)):
        assert blend_triton.blend_mask(logits, grid, 0.0, out.zero_()).tolist() == [56, 0]
        np.testing.assert_array_equal(out, expected)
    pixels = torch.empty(1, 2**16, 2**15 + 8, dtype=torch.uint8)
    pixels[0, -1, -2:] = torch.tensor([3, 4], dtype=torch.uint8)
    tiles = torch.empty(1, 1, 1, 2)
    gather_triton.gather(pixels, np.array([[2**16 - 1]]), np.array([[2**15 + 6, 2**15 + 7]]), 2.0, 0.5, tiles)
    assert tiles.flatten().tolist() == [0.5, 1]


@needs_triton
def test_triton_launchers_refuse_what_they_cannot_read():
    logits, mask = torch.zeros(1, 1, 8, 8), torch.zeros(8, 8, dtype=torch.uint8)
    places = np.array([[0, 0, 0, 0, 8, 8]])
    for bad_logits, bad_mask, message in (
        (logits.double(), mask, "expected float16"),
        (logits, mask.float(), "expected float16"),
        (logits.transpose(2, 3), mask, "not contiguous"),
        (logits, mask.T, "not contiguous"),
        (logits, mask[:7], "leaves its tile"),
    ):
        with pytest.raises(ValueError, match=message):
            stitch_triton.stitch_mask(bad_logits, places, 0.0, bad_mask)
    with pytest.raises(ValueError, match="do not fill"):
        blend_triton.blend_mask(logits, TileGrid(1, 2, 4, 0, 0, 8, 8), 0.0, mask)
    pixels, table, tiles = torch.zeros(1, 8, 8), np.zeros((1, 4), int), torch.zeros(1, 1, 4, 4)
    for bad_pixels, bad_table, bad_tiles, message in (
        (torch.zeros(2, 8, 8), table, tiles, "do not fit"),
        (pixels.double(), table, tiles, "see the docstring"),
        (pixels, table, tiles.transpose(2, 3), "contiguous: False"),
        (pixels, table + 8, tiles, "leave an axis"),
        (pixels, table - 1, tiles, "leave an axis"),
    ):
        with pytest.raises(ValueError, match=message):
            gather_triton.gather(bad_pixels, bad_table, bad_table, 0.0, 1.0, bad_tiles)


def test_a_padded_batch_writes_nothing_for_its_padding():
    logits = np.ones((3, 1, 4, 4), np.float32)
    mask = np.zeros((4, 8), np.uint8)
    stitch_mask(logits, np.array([[0, 0, 0, 0, 4, 4]]), 0.0, mask)
    np.testing.assert_array_equal(mask, np.repeat([[1, 1, 1, 1, 0, 0, 0, 0]], 4, axis=0))


def test_logit_threshold_inverts_the_sigmoid():
    assert logit_threshold(0.5) == 0
    assert 1 / (1 + math.exp(-logit_threshold(0.2))) == pytest.approx(0.2)


def test_the_kernels_of_the_cpu_import_no_triton():
    code = "import sys; from cellseg_batch.kernels import gather, stitch; print({'triton', 'torch'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


@pytest.mark.parametrize("kernel", ["gather", "instances", "moments", "quality", "stitch"])
def test_numba_is_used_where_it_is_installed(kernel, monkeypatch):
    name = f"cellseg_batch.kernels.{kernel}"
    assert fastest(name).__name__ == f"{name}_numba"
    monkeypatch.setitem(sys.modules, f"{name}_numba", None)
    assert fastest.__wrapped__(name).__name__ == f"{name}_reference"


@pytest.mark.parametrize("writable", [True, False])
def test_compiled_kernels_are_cached_away_from_the_code(tmp_path, writable):
    """Beside the code they would outlive an uninstall and hide the next installation."""
    cache = tmp_path / "cache"
    if not writable:
        cache.write_text("a file where the folder should be")
    code = (
        "import numpy as np; from cellseg_batch.kernels import stitch;"
        "stitch.stitch_probability(np.ones((1, 1, 4, 4), 'f4'), np.array([[0] * 4 + [4] * 2]), np.zeros((4, 4), 'u1'));"
        "from cellseg_batch.kernels import stitch_numba;"
        "print(stitch_numba.stitch_probability._cache.cache_path if WRITABLE else 'worked')"
    ).replace("WRITABLE", str(writable))
    environment = {key: value for key, value in os.environ.items() if key != "NUMBA_CACHE_DIR"}
    environment["XDG_CACHE_HOME"] = str(cache)
    output = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert output.startswith(str(cache)) if writable else output == "worked"
    assert bool(list(cache.rglob("*.nbi"))) == writable
