"""Compute `classes` in torch, for tensors on any device."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from cellseg_batch.kernels.classes import check_classes
from cellseg_batch.kernels.tiling import check_places


def write_classes(
    logits: torch.Tensor, places: NDArray[np.int64], first: int, background: bool, out: torch.Tensor
) -> torch.Tensor:
    """Write the class codes, without waiting for the device; as `cellseg_batch.kernels.classes.write_classes`.

    Logits may be float16; returns (2,) int64 on the device.
    """
    check_classes(tuple(logits.shape), first, background)
    check_places(places, tuple(logits.shape), tuple(out.shape))
    missing = torch.zeros((), dtype=torch.int64, device=out.device)
    for tile, (from_y, from_x, to_y, to_x, height, width) in zip(logits, places.tolist(), strict=False):
        core = tile[first:, from_y : from_y + height, from_x : from_x + width]
        highest, codes = core[0], torch.full((height, width), 1 - background, dtype=torch.uint8, device=out.device)
        for number, values in enumerate(core[1:], 2 - background):
            codes = codes.masked_fill(values > highest, number)
            highest = torch.maximum(values, highest)  # NaN if either is
        undefined = highest.isnan()
        out[to_y : to_y + height, to_x : to_x + width] = codes.masked_fill(undefined, 0)
        missing += undefined.sum()
    return torch.stack([torch.zeros_like(missing), missing])
