"""The least time that a network can take: every convolution at the device's peak or its memory's, whichever is slower.

What lies between two convolutions (batch norm, activations) counts as part of the one before it, as if all were fused;
so no real network reaches it.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn

_HALF = 2


def least_seconds(network: nn.Module, shape: tuple[int, ...], flops: float, bandwidth: float) -> float:
    """Seconds for a batch of ``shape`` (N, C, H, W) in float16.

    Args:
        network: in evaluation mode; it is not changed.
        shape: of the batch.
        flops: floating point operations per second of the device, a multiply-add counting as two.
        bandwidth: bytes per second of its memory, read and written.
    """
    seconds = 0.0

    def count(layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal seconds
        positions = inputs[0] if isinstance(layer, nn.ConvTranspose2d) else output
        per_position = math.prod(layer.weight.shape[1:])
        work = 2 * positions.numel() * per_position
        moved = _HALF * (inputs[0].numel() + layer.weight.numel() + output.numel())
        seconds += max(work / flops, moved / bandwidth)

    shapes_only = copy.deepcopy(network).to("meta")
    for layer in shapes_only.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            layer.register_forward_hook(count)
    with torch.no_grad():
        shapes_only(torch.empty(shape, device="meta"))
    return seconds
