"""Blend tiles on a GPU, in Triton: each output pixel reads the 1, 2 or 4 tiles that show it.

Every output pixel is written once, and no sum is kept in memory.  Per pixel, for float16 logits of tiles of T px that
overlap by O px:

    read  2 (T / (T - O))^2 bytes of logits: 2.6 for 512 and 64
    write 1 byte of mask or probability

`stitch_reference` defines the meaning; masks and counts are the same bit for bit.  It has the blend
functions of `cellseg_batch.kernels.stitch`, for tensors on the current device; they do not wait for the device.  Import
it only if triton is installed.

``python -m cellseg_batch.kernels.blend_triton`` checks the kernel against the reference.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from cellseg_batch.kernels import stitch_reference
from cellseg_batch.kernels.stitch_triton import (
    BLOCK_X,
    BLOCK_Y,
    LAUNCH,
    MASK,
    PROBABILITY,
    check_tensors,
    write_block,
)
from cellseg_batch.kernels.tiling import TileGrid, check_grid


@triton.jit
def _term(pointers: tl.tensor, weight: tl.tensor, keep: tl.tensor) -> tl.tensor:
    """Return the weighted logits of a tile; a logit of weight 0 is left out, even if it is infinite."""
    return tl.where(weight > 0, weight * tl.load(pointers, keep, 0).to(tl.float32), 0)


@triton.jit(do_not_specialize=["rows", "columns"])
def blend_kernel(
    logits_ptr: tl.tensor,  # (N, K, T_y, T_x)
    tile_stride: tl.tensor,
    row_stride: tl.tensor,
    rows: tl.tensor,  # number of tile rows
    columns: tl.tensor,
    top: tl.tensor,  # the window, in px
    left: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    threshold: tl.tensor,
    out_ptr: tl.tensor,
    out_stride: tl.tensor,
    counts_ptr: tl.tensor,  # (programs, 2) int32
    STEP_Y: tl.constexpr,
    STEP_X: tl.constexpr,
    OVERLAP: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
) -> None:
    """Write one block of the window per program."""
    program = tl.program_id(0)
    blocks_x = tl.cdiv(width, BLOCK_X)
    y0, x0 = program // blocks_x * BLOCK_Y, program % blocks_x * BLOCK_X
    y, x = y0 + tl.arange(0, BLOCK_Y), x0 + tl.arange(0, BLOCK_X)

    # The last tile that shows a pixel; within the overlap the tile before shows it too.
    tile_y, tile_x = tl.minimum((top + y) // STEP_Y, rows - 1), tl.minimum((left + x) // STEP_X, columns - 1)
    in_y, in_x = top + y - tile_y * STEP_Y, left + x - tile_x * STEP_X
    two_y, two_x = (tile_y > 0) & (in_y < OVERLAP), (tile_x > 0) & (in_x < OVERLAP)
    # Multiply: the GPU's division is approximate, and the reciprocal of a power of two is exact.
    rise_y = tl.where(two_y, in_y, OVERLAP)[:, None].to(tl.float32) * (1.0 / OVERLAP)
    rise_x = tl.where(two_x, in_x, OVERLAP)[None, :].to(tl.float32) * (1.0 / OVERLAP)

    # Offsets in int64: a batch may have more than 2^31 logits.
    tile_row = columns.to(tl.int64) * tile_stride
    here_y = (tile_y * tile_row + in_y * row_stride)[:, None]
    here_x = (tile_x.to(tl.int64) * tile_stride + in_x)[None, :]
    above, before = here_y + (STEP_Y * row_stride - tile_row), here_x + (STEP_X - tile_stride)
    in_window_y, in_window_x = (y < height)[:, None], (x < width)[None, :]
    keep_y, keep_x = in_window_y & two_y[:, None], in_window_x & two_x[None, :]

    logits = _term(logits_ptr + above + before, (1 - rise_y) * (1 - rise_x), keep_y & keep_x)
    logits += _term(logits_ptr + above + here_x, (1 - rise_y) * rise_x, keep_y & in_window_x)
    logits += _term(logits_ptr + here_y + before, rise_y * (1 - rise_x), in_window_y & keep_x)
    logits += _term(logits_ptr + here_y + here_x, rise_y * rise_x, in_window_y & in_window_x)

    out_ptr += y0.to(tl.int64) * out_stride + x0
    write_block(
        logits,
        height - y0,
        width - x0,
        threshold,
        out_ptr,
        out_stride,
        counts_ptr + 2 * program,
        FORM,
        BLOCK_Y,
        BLOCK_X,
    )


def blend_mask(logits: torch.Tensor, grid: TileGrid, threshold: float, out: torch.Tensor) -> torch.Tensor:
    """Write ``blended > threshold`` of a window of overlapping tiles into ``out``.

    Args:
        logits: (N, K, T_y, T_x) float16 or float32, contiguous along x: the tiles of ``grid`` in raster order.
        grid: overlap of the tiles, and the window to write.
        threshold: logit above which a pixel is foreground.
        out: (grid.height, grid.width) uint8, contiguous along x, on the same device.

    Returns:
        (2,) int64 on the device: foreground pixels, and pixels whose blended logit is NaN.

    Raises:
        ValueError: a dtype, stride or shape does not fit.
    """
    return _blend(logits, grid, threshold, out, MASK).sum(0)


def blend_probability(logits: torch.Tensor, grid: TileGrid, out: torch.Tensor) -> None:
    """Write ``floor(255 * sigmoid(blended) + 0.5)``, 0 for NaN; arguments and errors as `blend_mask`."""
    _blend(logits, grid, 0.0, out, PROBABILITY)


def _blend(
    logits: torch.Tensor, grid: TileGrid, threshold: float, out: torch.Tensor, form: tl.constexpr
) -> torch.Tensor:
    """Launch `blend_kernel`; return the counts of each program, (programs, 2) int32, undefined for a probability."""
    check_tensors(logits, out)
    check_grid(grid, tuple(logits.shape), tuple(out.shape))
    programs = triton.cdiv(grid.height, BLOCK_Y) * triton.cdiv(grid.width, BLOCK_X)
    counts = torch.empty((programs, 2), dtype=torch.int32, device=out.device)
    blend_kernel[(programs,)](
        logits,
        logits.stride(0),
        logits.stride(2),
        grid.rows,
        grid.columns,
        grid.top,
        grid.left,
        grid.height,
        grid.width,
        threshold,
        out,
        out.stride(0),
        counts,
        STEP_Y=logits.shape[2] - grid.overlap,
        STEP_X=logits.shape[3] - grid.overlap,
        OVERLAP=grid.overlap,
        FORM=form,
        BLOCK_Y=BLOCK_Y,
        BLOCK_X=BLOCK_X,
        **LAUNCH,
    )
    return counts


def check(device: str) -> None:
    """Compare every output with the reference on tiles of an odd size; raises AssertionError where they differ."""
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 4, (6, 2, 50, 41)).astype(np.float16)
    logits[generator.random(logits.shape) < 0.01] = np.nan
    grid = TileGrid(rows=2, columns=3, overlap=16, top=3, left=5, height=80, width=81)
    mask = np.zeros((80, 81), np.uint8)
    tensor, read = torch.tensor(logits, device=device), logits.astype(np.float32)
    out = torch.zeros(mask.shape, dtype=torch.uint8, device=device)
    counts = blend_mask(tensor, grid, 0.3, out)
    assert tuple(counts.tolist()) == stitch_reference.blend_mask(read, grid, 0.3, mask)
    assert np.array_equal(out.cpu().numpy(), mask)
    blend_probability(tensor, grid, out)
    stitch_reference.blend_probability(read, grid, mask)
    assert np.abs(out.cpu().numpy().astype(int) - mask).max() <= 1


if __name__ == "__main__":
    if not torch.cuda.is_available():
        raise SystemExit("no GPU")
    check("cuda")
