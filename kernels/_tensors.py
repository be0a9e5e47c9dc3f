"""Copy small tables to the GPU without waiting for it, for the launchers of the Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray


def upload(table: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Return an int64 copy of ``table`` on ``device``.

    It goes through pinned memory: a copy from other memory waits for all earlier work of the stream.
    """
    # torch refuses to pin while it copies from numpy.
    pinned = torch.empty(table.shape, dtype=torch.int64, pin_memory=device.type == "cuda")
    return pinned.copy_(torch.from_numpy(table)).to(device, non_blocking=True)
