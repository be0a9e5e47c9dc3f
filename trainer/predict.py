"""Predict the logits of one whole image, for scoring during and after training."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@torch.inference_mode()
def predict_logits(
    network: nn.Module, pixels: NDArray[np.float32], total_stride: int, precision: str, margin: int = 0
) -> Tensor:
    """Predict the logits of an image, padded by reflection to a multiple of the total stride.

    Args:
        network: network in evaluation mode, on any device.
        pixels: (H, W, C) float32 image in [0, 1].
        total_stride: px; the network takes multiples of it.
        precision: fp32, bf16 or fp16.
        margin: px by which the image is mirrored at each edge, as the engine does.

    Returns:
        (K, H, W) float32 on the CPU.
    """
    height, width = pixels.shape[:2]
    below, right = -(height + 2 * margin) % total_stride, -(width + 2 * margin) % total_stride
    padding = ((margin, margin + below), (margin, margin + right), (0, 0))
    padded = torch.from_numpy(np.pad(pixels, padding, mode="reflect")).permute(2, 0, 1)[None]
    device = next(network.parameters()).device
    with torch.autocast(device.type, dtype=PRECISIONS[precision], enabled=precision != "fp32"):
        logits = network(padded.to(device).contiguous(memory_format=torch.channels_last))
    inside: Tensor = logits[0, :, margin : margin + height, margin : margin + width].float().cpu()
    return inside
