"""Compute `gather` on a GPU, in Triton: each program cuts, mirrors and normalises one block of a tile.

Per output pixel it reads 1 pixel of each source channel (1, 2 or 4 bytes) and writes C values (2 C bytes in float16),
so the write dominates: 3 + 6 bytes for RGB in uint8.  The index tables cost 8 bytes per row and column of a tile.
Where a table does not mirror, neighbouring threads still read neighbouring pixels, so there is no second code path for
that case.

`gather_reference` defines the meaning; the result is the same bit for bit, rounded once more for float16.  The function
`gather` is that of `cellseg_batch.kernels.gather`, for tensors on the current device; it does not wait for the device.
Import it only if triton is installed.

``python -m cellseg_batch.kernels.gather_triton`` checks the kernel against the reference.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import ArrayLike, NDArray

from cellseg_batch.kernels import gather_reference
from cellseg_batch.kernels._tensors import upload
from cellseg_batch.kernels.gather import by_channel

# Four warps with 8 px per thread: a thread stores 16 bytes of float16 at once.
BLOCK_Y, BLOCK_X = 8, 128


@triton.jit
def gather_kernel(
    pixels_ptr: tl.tensor,  # (S, h, w), any strides
    channel_stride: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    rows_ptr: tl.tensor,  # (N, T_y) int64
    columns_ptr: tl.tensor,  # (N, T_x) int64
    low_ptr: tl.tensor,  # (C,) float32
    scale_ptr: tl.tensor,  # (C,) float32
    out_ptr: tl.tensor,  # (N, C, T_y, T_x), contiguous
    height: tl.tensor,  # height of a tile in px
    width: tl.tensor,
    SOURCES: tl.constexpr,
    CHANNELS: tl.constexpr,
    CLIP: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
) -> None:
    """Write one block of a tile, all channels, per program."""
    program = tl.program_id(0)
    blocks_y, blocks_x = tl.cdiv(height, BLOCK_Y), tl.cdiv(width, BLOCK_X)
    # Offsets in int64: a batch may have more than 2^31 values.
    tile = (program // (blocks_y * blocks_x)).to(tl.int64)
    y = program // blocks_x % blocks_y * BLOCK_Y + tl.arange(0, BLOCK_Y)
    x = program % blocks_x * BLOCK_X + tl.arange(0, BLOCK_X)
    row = tl.load(rows_ptr + tile * height + y, y < height, 0)
    column = tl.load(columns_ptr + tile * width + x, x < width, 0)
    keep = (y < height)[:, None] & (x < width)[None, :]

    from_pixel = (row * row_stride)[:, None] + (column * column_stride)[None, :]
    to_pixel = (y * width)[:, None] + x[None, :]
    out_ptr += tile * CHANNELS * height * width
    for source in tl.static_range(SOURCES):
        pixel = tl.load(pixels_ptr + from_pixel, keep, 0).to(tl.float32)
        # One source channel is replicated.
        for copy in tl.static_range(CHANNELS if SOURCES == 1 else 1):
            scaled = (pixel - tl.load(low_ptr + source + copy)) * tl.load(scale_ptr + source + copy)
            if CLIP:
                # NaN is not above 0.
                value = tl.where(scaled > 0, tl.where(scaled < 1, scaled, 1), 0)
            else:
                value = tl.where(scaled == scaled, scaled, 0)
            tl.store(out_ptr + to_pixel, value.to(out_ptr.dtype.element_ty), keep)
            out_ptr += tl.cast(height, tl.int64) * width
        pixels_ptr += channel_stride


def gather(
    pixels: torch.Tensor,
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    low: ArrayLike,
    scale: ArrayLike,
    out: torch.Tensor,
    clip: bool = True,
) -> None:
    """Fill ``out`` with ``clip((pixel - low) * scale, 0, 1)`` of every tile, in float32; a NaN becomes 0.

    Args:
        pixels: (S, h, w) uint8, uint16 or float32, any strides; S channels of a block's read box.
        rows: (N, T_y) row in ``pixels`` of each row of each tile, in host memory, where they are checked.
        columns: (N, T_x) column in ``pixels`` of each column of each tile, in host memory.
        low: pixel value that becomes 0; one for all C channels or one for each.
        scale: 1 / (high - low); as low.
        out: (N, C, T_y, T_x) float16 or float32, contiguous, on the same device; C = S, or any C for S = 1, which is
            then replicated.
        clip: False leaves values outside [0, 1] as they are.

    Raises:
        ValueError: a dtype or shape does not fit, or an index lies outside ``pixels``.
    """
    tiles, channels, height, width = out.shape
    if pixels.shape[0] not in (1, channels) or rows.shape != (tiles, height) or columns.shape != (tiles, width):
        raise ValueError(
            f"pixels {tuple(pixels.shape)}, rows {rows.shape} and columns {columns.shape} do not fit tiles "
            f"{tuple(out.shape)}"
        )
    if pixels.dtype not in (torch.uint8, torch.uint16, torch.float32) or out.dtype not in (
        torch.float16,
        torch.float32,
    ):
        raise ValueError(f"pixels of {pixels.dtype} into tiles of {out.dtype}; see the docstring for those possible")
    if not out.is_contiguous() or pixels.device != out.device:
        raise ValueError(f"pixels on {pixels.device}; tiles on {out.device} are contiguous: {out.is_contiguous()}")
    for table, length in ((rows, pixels.shape[1]), (columns, pixels.shape[2])):
        if table.size and not 0 <= table.min() <= table.max() < length:
            raise ValueError(f"indices {table.min()} to {table.max()} leave an axis of {length} px")
    programs = tiles * triton.cdiv(height, BLOCK_Y) * triton.cdiv(width, BLOCK_X)
    gather_kernel[(programs,)](
        pixels,
        *pixels.stride(),
        upload(rows, out.device),
        upload(columns, out.device),
        *(upload(numbers, out.device) for numbers in by_channel(low, scale, channels)),
        out,
        height,
        width,
        SOURCES=pixels.shape[0],
        CHANNELS=channels,
        CLIP=clip,
        BLOCK_Y=BLOCK_Y,
        BLOCK_X=BLOCK_X,
    )


def check(device: str) -> None:
    """Compare with the reference on tiles of an odd size; raises AssertionError where they differ."""
    generator = np.random.default_rng(0)
    rows, columns = generator.integers(0, 70, (3, 21)), generator.integers(0, 90, (3, 150))
    for dtype, sources in ((np.uint8, 3), (np.uint16, 1), (np.float32, 3)):
        pixels = generator.integers(0, 256, (70, 90, sources)).astype(dtype).transpose(2, 0, 1)
        expected = np.empty((3, 3, 21, 150), np.float32)
        gather_reference.gather(pixels, rows, columns, 20.0, 1 / 200, expected)
        for precision in (torch.float16, torch.float32):
            out = torch.zeros(expected.shape, dtype=precision, device=device)
            gather(torch.from_numpy(pixels).to(device), rows, columns, 20.0, 1 / 200, out)
            assert torch.equal(out.cpu(), torch.from_numpy(expected).to(precision)), f"{dtype} to {precision} differs"


if __name__ == "__main__":
    if not torch.cuda.is_available():
        raise SystemExit("no GPU")
    check("cuda")
