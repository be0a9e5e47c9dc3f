"""Compute `hover` in torch, for tensors on any device; each tap of a kernel is one pass over a tile's core.

All arithmetic is in integers, so codes and counts equal `hover_reference` bit for bit.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from cellseg_batch.kernels.hover import HoverRule, check_maps
from cellseg_batch.kernels.instances import ONE_BITS
from cellseg_batch.kernels.tiling import check_places


def classify_maps(logits: torch.Tensor, places: NDArray[np.int64], rule: HoverRule, out: torch.Tensor) -> torch.Tensor:
    """Write the pixel codes of every tile's core, without waiting for the device.

    Args:
        logits: (N, K, T_y, T_x) float16 or float32: 0 logit of the foreground, 1 horizontal and 2 vertical map.
        places: as `cellseg_batch.kernels.stitch.stitch_mask`, in host memory.
        rule: from `cellseg_batch.kernels.hover.hover_rule`.
        out: (H, W) uint8 on the same device.

    Returns:
        (2,) int64 on the device: foreground pixels, and pixels with a NaN among the three.

    Raises:
        ValueError: a core is out of bounds, or there are fewer than three outputs.
    """
    check_maps(tuple(logits.shape))
    check_places(places, tuple(logits.shape), tuple(out.shape))
    counts = torch.zeros(2, dtype=torch.int64, device=out.device)
    radius = rule.reach
    for tile, (from_y, from_x, to_y, to_x, height, width) in zip(logits, places.tolist(), strict=False):
        core = tile[:3, from_y : from_y + height, from_x : from_x + width]
        around = torch.arange(max(height, width) + 2 * radius, device=out.device) - radius
        rows = (from_y + around[: height + 2 * radius]).clamp(0, tile.shape[1] - 1)
        columns = (from_x + around[: width + 2 * radius]).clamp(0, tile.shape[2] - 1)
        horizontal, vertical = _fixed_point(tile[1:3, rows[:, None], columns])
        smooth, slope = (rule.smooth, 1, rule.spacing, radius), (rule.slope, -1, rule.spacing, radius)
        along_x = _convolve(_convolve(horizontal, *slope).T, *smooth).T
        along_y = _convolve(_convolve(vertical, *smooth).T, *slope).T
        rise, mask = torch.minimum(along_x, along_y), core[0].float() > float(rule.foreground)
        codes = mask * (1 + (rise > rule.border_level).int() + (rise > rule.seed_level).int())
        out[to_y : to_y + height, to_x : to_x + width] = codes.to(torch.uint8)
        counts += torch.stack([mask.sum(), core.isnan().any(0).sum()])
    return counts


def _fixed_point(values: torch.Tensor) -> torch.Tensor:
    """Values from -1 to 1 in units of 2 ** -14; a NaN counts as -1."""
    unit = 1 << ONE_BITS
    steps = (values.float() * unit + (unit + 0.5)).nan_to_num(0.0, posinf=2 * unit, neginf=0).clamp(0, 2 * unit)
    return steps.int() - unit


def _convolve(values: torch.Tensor, half: NDArray[np.int32], sign: int, spacing: int, radius: int) -> torch.Tensor:
    """Convolve along the last axis with a kernel whose other half has this sign; drops ``radius`` px on either side."""
    length = values.shape[1] - 2 * radius
    centre, *weights = half.tolist()
    total = centre * values[:, radius : radius + length] + (1 << (ONE_BITS - 1))
    for tap, weight in enumerate(weights, 1):
        before, after = (values[:, radius + step :][:, :length] for step in (-tap * spacing, tap * spacing))
        total += weight * after.add(before, alpha=sign)
    rounded: torch.Tensor = total >> ONE_BITS
    return rounded
