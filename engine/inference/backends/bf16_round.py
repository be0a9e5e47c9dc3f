"""Round the weights of a torch network for bfloat16, so that rounding errors within a kernel cancel.

A kernel that looks for edges has large weights of both signs that add up to almost nothing.  Rounded one by one their
sum is wrong, and over an even ground the error is as large as an edge.  It must not know which backend compiles the
network.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def round_kernels(network: nn.Module) -> nn.Module:
    """Round the weights of every convolution with more than one tap to bfloat16, in place; returns ``network``.

    The weights of a kernel are rounded from the largest to the smallest, and each error is added to the next weight
    (error diffusion), so that the kernel's sum is as exact as its smallest weight.

    Args:
        network: batch norms folded; the parameters stay float32.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.weight[0, 0].numel() > 1:
            module.weight.data = _diffused(module.weight.data)
    return network


def _diffused(weights: Tensor) -> Tensor:
    """Weights (K, C, h, w) float32 that bfloat16 holds exactly; each (h, w) keeps its sum."""
    kernels = weights.flatten(2).double()
    order = kernels.abs().argsort(2, descending=True)
    rounded, error = torch.empty_like(kernels), torch.zeros_like(kernels[..., :1])
    for position in order.split(1, 2):
        wanted = kernels.gather(2, position) + error
        nearest = wanted.bfloat16().double()
        rounded.scatter_(2, position, nearest)
        error = wanted - nearest
    return rounded.float().view_as(weights)
