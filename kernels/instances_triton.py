"""Turn logits into pixel codes on a GPU, in Triton: smooth distance minus border along rows and columns, and decide.

The first kernel reads two logits per pixel and tap, mostly from the cache, and writes smoothed rows of each core and
around it (4 bytes); the second reads them and three logits (6 bytes in float16) and writes 1 byte.

`instances_reference` defines the meaning; all arithmetic is in integers, and codes and counts are the same bit for bit.
It has the functions of `cellseg_batch.kernels.instances` that read logits, for tensors on the current device; they do
not wait for the device.  Import it only if triton is installed.

``python -m cellseg_batch.kernels.instances_triton`` checks the kernels against the reference.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from cellseg_batch.kernels import instances_reference, stitch_triton
from cellseg_batch.kernels._tensors import upload
from cellseg_batch.kernels.instances import ONE_BITS, SEED, TABLE_RANGE, TABLE_STEPS, SeedRule, seed_rule
from cellseg_batch.kernels.stitch_triton import BLOCK_X, BLOCK_Y, LAUNCH, align, check_tensors
from cellseg_batch.kernels.tiling import check_places

_ONE_BITS, _HALF = tl.constexpr(ONE_BITS), tl.constexpr(1 << (ONE_BITS - 1))
# A logit is looked up at ``logit * _STEPS + _OFFSET``, rounded down, from 0 to `_LAST`.
_STEPS, _OFFSET = tl.constexpr(TABLE_STEPS), tl.constexpr(TABLE_RANGE * TABLE_STEPS + 0.5)
_LAST = tl.constexpr(2 * TABLE_RANGE * TABLE_STEPS)


@triton.jit
def score_at(
    border_ptr: tl.tensor,  # logits of the row's border
    channel_stride: tl.tensor,
    x: tl.tensor,  # columns of the tile
    keep: tl.tensor,
    tables_ptr: tl.tensor,  # int64: probability of each quantised logit, that times the border's weight, smoothing
) -> tl.tensor:
    """Return distance minus border in fixed point, int32."""
    high = tl.load(border_ptr + channel_stride + x, keep, 0).to(tl.float32) * _STEPS + _OFFSET
    low = tl.load(border_ptr + x, keep, 0).to(tl.float32) * _STEPS + _OFFSET
    # NaN is not above 0.
    high = tl.where(high > 0, tl.where(high < _LAST, high, _LAST), 0).to(tl.int32)
    low = tl.where(low > 0, tl.where(low < _LAST, low, _LAST), 0).to(tl.int32)
    return (tl.load(tables_ptr + high) - tl.load(tables_ptr + _LAST + 1 + low)).to(tl.int32)


@triton.jit
def rows_kernel(
    logits_ptr: tl.tensor,  # (N, K, T_y, T_x)
    tile_stride: tl.tensor,
    channel_stride: tl.tensor,
    row_stride: tl.tensor,
    tile_height: tl.tensor,
    tile_width: tl.tensor,
    places_ptr: tl.tensor,  # (M, 6) int64
    blocks_y: tl.tensor,  # programs per tile
    blocks_x: tl.tensor,
    tables_ptr: tl.tensor,  # as `score_at`
    spacing: tl.tensor,
    rows_ptr: tl.tensor,  # (M, height + 2 * reach, width) int32
    height: tl.tensor,
    width: tl.tensor,
    TAPS: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
) -> None:
    """Smooth one block of a core's rows, and of those that its columns reach; the tile's outermost pixels repeat."""
    program = tl.program_id(0)
    tile = program // (blocks_y * blocks_x)
    place_ptr = places_ptr + tile * 6
    reach = (TAPS - 1) * spacing
    y = program // blocks_x % blocks_y * BLOCK_Y + tl.arange(0, BLOCK_Y)
    x = program % blocks_x * BLOCK_X + tl.arange(0, BLOCK_X)[None, :]
    keep = (y < height + 2 * reach)[:, None] & (x < width)
    row = tl.load(place_ptr) + y - reach
    row = tl.where(row > 0, tl.where(row < tile_height, row, tile_height - 1), 0)
    column = tl.load(place_ptr + 1) + x
    border_ptr = logits_ptr + tile.to(tl.int64) * tile_stride + channel_stride + (row * row_stride)[:, None]
    weights_ptr = tables_ptr + 2 * (_LAST + 1)

    centre = tl.where(column < tile_width, column, tile_width - 1)
    total = score_at(border_ptr, channel_stride, centre, keep, tables_ptr) * tl.load(weights_ptr).to(tl.int32)
    for tap in range(1, TAPS):
        left, right = column - tap * spacing, column + tap * spacing
        left = tl.where(left > 0, tl.where(left < tile_width, left, tile_width - 1), 0)
        right = tl.where(right < tile_width, right, tile_width - 1)
        both = score_at(border_ptr, channel_stride, left, keep, tables_ptr)
        both += score_at(border_ptr, channel_stride, right, keep, tables_ptr)
        total += both * tl.load(weights_ptr + tap).to(tl.int32)
    rows_ptr += tile.to(tl.int64) * (height + 2 * reach) * width
    tl.store(rows_ptr + y[:, None] * width + x, (total + _HALF) >> _ONE_BITS, keep)


@triton.jit
def codes_kernel(
    logits_ptr: tl.tensor,  # (N, K, T_y, T_x)
    tile_stride: tl.tensor,
    channel_stride: tl.tensor,
    row_stride: tl.tensor,
    places_ptr: tl.tensor,  # (M, 6) int64
    blocks_y: tl.tensor,  # programs per tile
    blocks_x: tl.tensor,
    weights_ptr: tl.tensor,  # (taps,) int64
    spacing: tl.tensor,
    rows_ptr: tl.tensor,  # as `rows_kernel`
    height: tl.tensor,
    width: tl.tensor,
    foreground: tl.tensor,
    border_level: tl.tensor,
    seed_level: tl.tensor,
    out_ptr: tl.tensor,  # uint8
    out_stride: tl.tensor,
    counts_ptr: tl.tensor,  # (programs, 2) int32
    TAPS: tl.constexpr,
    ALIGN: tl.constexpr,  # divides the cores' positions and widths along x
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
) -> None:
    """Smooth the columns of one block of a core, and write its codes and counts."""
    program = tl.program_id(0)
    tile = program // (blocks_y * blocks_x)
    place_ptr = places_ptr + tile * 6
    reach = (TAPS - 1) * spacing
    y = program // blocks_x % blocks_y * BLOCK_Y + tl.arange(0, BLOCK_Y)[:, None]
    x = program % blocks_x * BLOCK_X + tl.arange(0, BLOCK_X)[None, :]
    # Rounding changes no value here; it tells the compiler that these are multiples, so that 8 px move at once.
    from_x, to_x = tl.load(place_ptr + 1) // ALIGN * ALIGN, tl.load(place_ptr + 3) // ALIGN * ALIGN
    keep = (y < tl.load(place_ptr + 4)) & (x < tl.load(place_ptr + 5) // ALIGN * ALIGN)

    rows_ptr += tile.to(tl.int64) * (height + 2 * reach) * width + (y + reach) * width + x
    total = tl.load(rows_ptr, keep, 0) * tl.load(weights_ptr).to(tl.int32)
    for tap in range(1, TAPS):
        step = tap * spacing * width
        both = tl.load(rows_ptr - step, keep, 0) + tl.load(rows_ptr + step, keep, 0)
        total += both * tl.load(weights_ptr + tap).to(tl.int32)
    score = (total + _HALF) >> _ONE_BITS

    logits_ptr += tile.to(tl.int64) * tile_stride
    logits_ptr += (tl.load(place_ptr) + y) * row_stride + from_x + x
    mask = tl.load(logits_ptr, keep, 0).to(tl.float32)
    border = tl.load(logits_ptr + channel_stride, keep, 0)
    distance = tl.load(logits_ptr + 2 * channel_stride, keep, 0)
    inside = ((mask > foreground) & keep).to(tl.int32)
    missing = ((mask != mask) | (border != border) | (distance != distance)) & keep
    codes = inside * (1 + (score > border_level).to(tl.int32) + (score > seed_level).to(tl.int32))
    tl.store(counts_ptr + 2 * program, tl.sum(inside))
    tl.store(counts_ptr + 2 * program + 1, tl.sum(missing.to(tl.int32)))
    out_ptr += (tl.load(place_ptr + 2) + y) * out_stride + to_x + x
    tl.store(out_ptr, codes.to(tl.uint8), keep)


def classify_pixels(logits: torch.Tensor, places: NDArray[np.int64], rule: SeedRule, out: torch.Tensor) -> torch.Tensor:
    """Write the pixel codes of every tile's core.

    Args:
        logits: (N, K, T_y, T_x) float16 or float32, contiguous along x: 0 foreground, 1 border, 2 distance.
        places: as `cellseg_batch.kernels.stitch.stitch_mask`, in host memory, where they are checked.
        rule: from `cellseg_batch.kernels.instances.seed_rule`.
        out: (H, W) uint8, contiguous along x, on the same device.

    Returns:
        (2,) int64 on the device: foreground pixels, and pixels with a NaN among their logits.

    Raises:
        ValueError: a dtype, stride or shape does not fit, a core is out of bounds, or logits are fewer than three.
    """
    if logits.shape[1] < 3:
        raise ValueError(f"{logits.shape[1]} logits; seeds need foreground, border and distance")
    check_tensors(logits, out)
    check_places(places, tuple(logits.shape), tuple(out.shape))
    taps = len(rule.weights)
    height, width = places[:, 4:6].max(axis=0, initial=0).tolist()
    extended = height + 2 * (taps - 1) * rule.spacing
    on_device = upload(places, out.device)
    tables = upload(np.concatenate([rule.distance, rule.border, rule.weights]), out.device)
    rows = torch.empty((len(places), extended, width), dtype=torch.int32, device=out.device)
    blocks_x = triton.cdiv(width, BLOCK_X)
    blocks_y = triton.cdiv(extended, BLOCK_Y)
    rows_kernel[(len(places) * blocks_y * blocks_x,)](
        logits,
        *logits.stride()[:3],
        *logits.shape[2:],
        on_device,
        blocks_y,
        blocks_x,
        tables,
        rule.spacing,
        rows,
        height,
        width,
        TAPS=taps,
        BLOCK_Y=BLOCK_Y,
        BLOCK_X=BLOCK_X,
        **LAUNCH,
    )
    blocks_y = triton.cdiv(height, BLOCK_Y)
    programs = len(places) * blocks_y * blocks_x
    counts = torch.empty((programs, 2), dtype=torch.int32, device=out.device)
    codes_kernel[(programs,)](
        logits,
        *logits.stride()[:3],
        on_device,
        blocks_y,
        blocks_x,
        tables[-taps:],
        rule.spacing,
        rows,
        height,
        width,
        float(rule.foreground),
        rule.border_level,
        rule.seed_level,
        out,
        out.stride(0),
        counts,
        TAPS=taps,
        ALIGN=align(places),
        BLOCK_Y=BLOCK_Y,
        BLOCK_X=BLOCK_X,
        **LAUNCH,
    )
    return counts.sum(0)


def classify_foreground(
    logits: torch.Tensor, places: NDArray[np.int64], foreground: float, out: torch.Tensor
) -> torch.Tensor:
    """Write pixel codes for a model without distance: all foreground is seed; arguments as `classify_pixels`."""
    counts = stitch_triton.stitch_mask(logits, places, foreground, out)
    for _, _, y, x, height, width in places.tolist():
        out[y : y + height, x : x + width] *= SEED
    return counts


def check(device: str) -> None:
    """Compare the codes with the reference on cores of an odd size; raises AssertionError where they differ."""
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 4, (2, 3, 50, 71)).astype(np.float16)
    logits[generator.random(logits.shape) < 0.01] = np.nan
    places = np.array([[9, 1, 0, 67 * x, 37, 67] for x in range(2)])
    expected = np.zeros((37, 134), np.uint8)
    for smoothing, spacing in ((1.1, 1), (0.7, 2)):
        rule = seed_rule(0.3, 0.75, smoothing, spacing, 0.05, -0.1)
        out = torch.full(expected.shape, 9, dtype=torch.uint8, device=device)
        counts = classify_pixels(torch.tensor(logits, device=device), places, rule, out)
        in_reference = instances_reference.classify_pixels(logits.astype(np.float32), places, rule, expected)
        assert tuple(counts.tolist()) == in_reference
        assert np.array_equal(out.cpu().numpy(), expected)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        raise SystemExit("no GPU")
    check("cuda")
