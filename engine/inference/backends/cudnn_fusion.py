"""Have cuDNN compute a convolution, its bias and the ReLU behind it as one kernel, in eager torch.

Eager torch launches a kernel for each, and each reads and writes the whole features.  Only inference is possible.  It
must not know which backend runs the network.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


def fuse_relu(network: nn.Module) -> nn.Module:
    """Fuse every convolution with a ReLU or ReLU6 behind it in a ``Sequential``, in place; returns ``network``.

    Layers that cuDNN cannot fuse on the network's device and in its dtype stay as they are, so move it there first.
    Fold batch norms before that (`fold_batch_norm`).
    """
    for module in list(network.modules()):
        if isinstance(module, nn.Sequential):
            layers = [index for index, layer in enumerate(module) if not isinstance(layer, nn.Identity)]
            for first, second in pairwise(layers):
                fused = _fused(module[first], module[second])
                if fused is not None:
                    module[first], module[second] = fused, nn.Identity()
    return network


class ConvolutionReLU(nn.Module):
    """A convolution with ReLU in one kernel; the sum is rounded to the features' dtype once, after bias and ReLU.

    Args:
        convolution: the convolution, padded with zeros.
        ceiling: value at which the result is cut off, 6 for ReLU6; None cuts nothing off.
    """

    def __init__(self, convolution: nn.Conv2d, ceiling: float | None) -> None:
        super().__init__()
        self.weight = convolution.weight
        self.bias = convolution.bias
        self._geometry = convolution.stride, convolution.padding, convolution.dilation, convolution.groups
        self._ceiling = ceiling

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, K, H', W') of ``features`` (N, C, H, W)."""
        convolved: Tensor = torch.ops.aten.cudnn_convolution_relu(features, self.weight, self.bias, *self._geometry)
        return convolved if self._ceiling is None else convolved.clamp_max_(self._ceiling)


def _fused(convolution: nn.Module, activation: nn.Module) -> ConvolutionReLU | None:
    """The two layers as one; None if they are others, or if cuDNN has no such kernel on their device."""
    if not isinstance(convolution, nn.Conv2d) or not isinstance(activation, (nn.ReLU, nn.ReLU6)):
        return None
    if convolution.padding_mode != "zeros" or isinstance(convolution.padding, str):
        return None
    fused = ConvolutionReLU(convolution, 6.0 if isinstance(activation, nn.ReLU6) else None)
    features = convolution.weight.new_zeros(1, convolution.in_channels, 32, 32)
    try:
        with torch.no_grad():
            fused(features.contiguous(memory_format=torch.channels_last))
    except RuntimeError:  # no cuDNN on this device, or no kernel for these channels or groups
        return None
    return fused
