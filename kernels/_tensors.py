"""What the launchers of the Triton kernels share: bringing small tables to the GPU without waiting for it."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray


def upload(table: NDArray[Any], device: torch.device) -> torch.Tensor:
    """An int64 copy of ``table`` on ``device``.

    From pinned memory, because a copy from any other waits for all that the stream was given before.
    """
    return torch.tensor(table, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
