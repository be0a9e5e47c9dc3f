"""Copy small tables to the GPU without waiting for it, for the launchers of the Triton kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def upload(table: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Return a copy of ``table``, of integers or float32, on ``device``; integers become int64.

    It goes through pinned memory: a copy from other memory waits for all earlier work of the stream.
    """
    # torch refuses to pin while it copies from numpy.
    dtype = torch.float32 if table.dtype == np.float32 else torch.int64
    pinned = torch.empty(table.shape, dtype=dtype, pin_memory=device.type == "cuda")
    return pinned.copy_(torch.from_numpy(table)).to(device, non_blocking=True)
