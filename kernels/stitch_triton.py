"""Crop and stitch tiles on a GPU, in Triton: each program writes one block of a tile's core.

Per pixel it reads one logit (2 bytes in float16) and writes 1 byte of mask or probability.
`stitch_reference` defines the meaning; masks and counts are the same bit for bit.  It has the crop
functions of `cellseg_batch.kernels.stitch`, for tensors on the current device; they do not wait for the device.  Import
it only if triton is installed.

``python -m cellseg_batch.kernels.stitch_triton`` checks the kernel against the reference.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from cellseg_batch.kernels import stitch_reference
from cellseg_batch.kernels._tensors import upload
from cellseg_batch.kernels.tiling import check_places

MASK = tl.constexpr(0)
PROBABILITY = tl.constexpr(1)

# Four warps with 8 px per thread: a thread loads 16 bytes of float16 logits at once.
BLOCK_Y, BLOCK_X = 16, 64

# Fused multiply-adds would round a float32 blend differently from the CPU.
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def write_block(
    logits: tl.tensor,  # (BLOCK_Y, BLOCK_X) float32
    rows: tl.tensor,  # number of the block's rows inside the output
    columns: tl.tensor,
    threshold: tl.tensor,
    out_ptr: tl.tensor,  # uint8; address of the block's first pixel
    out_stride: tl.tensor,
    counts_ptr: tl.tensor,  # int32; foreground and NaN pixels of this program
    FORM: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
) -> None:
    """Write a block of logits as mask or probability; crop and blend share it."""
    y, x = tl.arange(0, BLOCK_Y)[:, None], tl.arange(0, BLOCK_X)[None, :]
    keep = (y < rows) & (x < columns)
    if FORM == PROBABILITY:
        scaled = 255 / (1 + tl.exp(-logits)) + 0.5
        tl.store(out_ptr + y * out_stride + x, tl.where(logits == logits, scaled, 0).to(tl.uint8), keep)
    else:
        inside = ((logits > threshold) & keep).to(tl.int32)
        missing = ((logits != logits) & keep).to(tl.int32)
        tl.store(counts_ptr, tl.sum(inside))
        tl.store(counts_ptr + 1, tl.sum(missing))
        tl.store(out_ptr + y * out_stride + x, inside.to(tl.uint8), keep)


@triton.jit
def crop_kernel(
    logits_ptr: tl.tensor,  # (N, K, T_y, T_x)
    tile_stride: tl.tensor,
    row_stride: tl.tensor,
    places_ptr: tl.tensor,  # (M, 6) int64
    blocks_y: tl.tensor,  # programs per tile
    blocks_x: tl.tensor,
    threshold: tl.tensor,
    out_ptr: tl.tensor,
    out_stride: tl.tensor,
    counts_ptr: tl.tensor,  # (programs, 2) int32
    FORM: tl.constexpr,
    ALIGN: tl.constexpr,  # divides the cores' positions and widths along x
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
) -> None:
    """Write one block of a core per program."""
    program = tl.program_id(0)
    tile = program // (blocks_y * blocks_x)
    place_ptr = places_ptr + tile * 6
    y0, x0 = program // blocks_x % blocks_y * BLOCK_Y, program % blocks_x * BLOCK_X
    from_y, to_y = tl.load(place_ptr) + y0, tl.load(place_ptr + 2) + y0
    rows = (tl.load(place_ptr + 4) - y0).to(tl.int32)
    # Rounding changes no value here; it tells the compiler that these are multiples, so that 8 px move at once.
    from_x = tl.load(place_ptr + 1) // ALIGN * ALIGN + x0
    to_x = tl.load(place_ptr + 3) // ALIGN * ALIGN + x0
    columns = (tl.load(place_ptr + 5) // ALIGN * ALIGN - x0).to(tl.int32)

    y, x = tl.arange(0, BLOCK_Y)[:, None], tl.arange(0, BLOCK_X)[None, :]
    # Compute offsets that may exceed 2^31 from scalars: ``places`` is int64.
    first_ptr = logits_ptr + tile.to(tl.int64) * tile_stride + from_y * row_stride + from_x
    logits = tl.load(first_ptr + y * row_stride + x, (y < rows) & (x < columns), 0).to(tl.float32)

    out_ptr += to_y * out_stride + to_x
    write_block(logits, rows, columns, threshold, out_ptr, out_stride, counts_ptr + 2 * program, FORM, BLOCK_Y, BLOCK_X)


def stitch_mask(logits: torch.Tensor, places: NDArray[np.int64], threshold: float, out: torch.Tensor) -> torch.Tensor:
    """Write ``logits[:, 0] > threshold`` of every tile's core into ``out``.

    Args:
        logits: (N, K, T_y, T_x) float16 or float32, contiguous along x.
        places: as `cellseg_batch.kernels.stitch.stitch_mask`, in host memory, where they are checked.
        threshold: logit above which a pixel is foreground.
        out: (H, W) uint8, contiguous along x, on the same device.

    Returns:
        (2,) int64 on the device: foreground pixels and NaN logits.

    Raises:
        ValueError: a dtype, stride or shape does not fit, or a core is out of bounds.
    """
    return _crop(logits, places, threshold, out, MASK).sum(0)


def stitch_probability(logits: torch.Tensor, places: NDArray[np.int64], out: torch.Tensor) -> None:
    """Write ``floor(255 * sigmoid(logits[:, 0]) + 0.5)``, 0 for NaN; arguments and errors as `stitch_mask`."""
    _crop(logits, places, 0.0, out, PROBABILITY)


def stitch_classes(
    logits: torch.Tensor, places: NDArray[np.int64], threshold: float, out: torch.Tensor
) -> torch.Tensor:
    """Write the number of each pixel's likeliest class; `cellseg_batch.kernels.stitch.stitch_classes`, `stitch_mask`.

    Each class is compared in turn, in torch: a batch has few tiles, and every value is read once.
    """
    check_tensors(logits, out)
    check_places(places, tuple(logits.shape), tuple(out.shape))
    counts = torch.zeros(2, dtype=torch.int64, device=out.device)
    for tile, (from_y, from_x, to_y, to_x, height, width) in enumerate(places.tolist()):
        core = logits[tile, :, from_y : from_y + height, from_x : from_x + width].float()
        best, number = core[1], torch.ones_like(core[1])
        for one in range(2, len(core)):
            better = core[one] > best
            best, number = torch.where(better, core[one], best), torch.where(better, one, number)
        undefined = core.isnan().any(0)
        inside = (best - core[0] > threshold) & ~undefined
        out[to_y : to_y + height, to_x : to_x + width] = torch.where(inside, number, 0).to(torch.uint8)
        counts += torch.stack((inside.sum(), undefined.sum()))
    return counts


def _crop(
    logits: torch.Tensor, places: NDArray[np.int64], threshold: float, out: torch.Tensor, form: tl.constexpr
) -> torch.Tensor:
    """Launch `crop_kernel`; return the counts of each program, (programs, 2) int32, undefined for a probability."""
    check_tensors(logits, out)
    check_places(places, tuple(logits.shape), tuple(out.shape))
    height, width = places[:, 4:6].max(axis=0, initial=0).tolist()
    blocks_y, blocks_x = triton.cdiv(height, BLOCK_Y), triton.cdiv(width, BLOCK_X)
    programs = len(places) * blocks_y * blocks_x
    counts = torch.empty((programs, 2), dtype=torch.int32, device=out.device)
    crop_kernel[(programs,)](
        logits,
        logits.stride(0),
        logits.stride(2),
        upload(places, out.device),
        blocks_y,
        blocks_x,
        threshold,
        out,
        out.stride(0),
        counts,
        FORM=form,
        ALIGN=align(places),
        BLOCK_Y=BLOCK_Y,
        BLOCK_X=BLOCK_X,
        **LAUNCH,
    )
    return counts


def align(places: NDArray[np.int64]) -> int:
    """Return what divides the cores' positions and widths along x: 8 if they all allow it, else 1."""
    return 1 if (places[:, 1::2] % 8).any() else 8


def check_tensors(logits: torch.Tensor, out: torch.Tensor) -> None:
    """Check that the kernels can read ``logits`` and write ``out``; raises ValueError."""
    if logits.dtype not in (torch.float16, torch.float32) or out.dtype != torch.uint8:
        raise ValueError(f"logits of {logits.dtype} and an output of {out.dtype}; expected float16 or float32, uint8")
    if logits.ndim != 4 or out.ndim != 2 or logits.stride(3) != 1 or out.stride(1) != 1:
        raise ValueError(f"logits {tuple(logits.shape)} and output {tuple(out.shape)} are not contiguous along x")
    if logits.device != out.device:
        raise ValueError(f"logits on {logits.device}, output on {out.device}")


def check(device: str) -> None:
    """Compare every output with the reference on cores of an odd size; raises AssertionError where they differ."""
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 4, (6, 2, 50, 41)).astype(np.float16)
    logits[generator.random(logits.shape) < 0.01] = np.nan
    places = np.array([[9, 1, 37 * y, 40 * x, 37, 40] for y in range(2) for x in range(3)])
    mask = np.zeros((74, 120), np.uint8)
    tensor, cropped = torch.tensor(logits, device=device), logits.astype(np.float32)
    out = torch.zeros(mask.shape, dtype=torch.uint8, device=device)
    counts = stitch_mask(tensor, places, 0.3, out)
    assert tuple(counts.tolist()) == stitch_reference.stitch_mask(cropped, places, 0.3, mask)
    assert np.array_equal(out.cpu().numpy(), mask)
    stitch_probability(tensor, places, out)
    stitch_reference.stitch_probability(cropped, places, mask)
    assert np.abs(out.cpu().numpy().astype(int) - mask).max() <= 1


if __name__ == "__main__":
    if not torch.cuda.is_available():
        raise SystemExit("no GPU")
    check("cuda")
