"""The blocks that the U-Nets are built of.

Shapes are (N, C, H, W) throughout.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


def _conv(inputs: int, outputs: int) -> nn.Sequential:
    """A 3x3 convolution with batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


def conv_block(inputs: int, outputs: int, count: int = 2) -> nn.Sequential:
    """3x3 convolutions, two as a rule, each with batch norm and ReLU."""
    widths = [inputs, *[outputs] * count]
    return nn.Sequential(*(layer for a, b in pairwise(widths) for layer in _conv(a, b)))


class DenseBlock(nn.Module):
    """Two 3x3 convolutions of half the width each; the second sees the input as well, the output is both."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.first = _conv(inputs, half)
        self.second = _conv(inputs + half, outputs - half)

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, outputs, H, W)."""
        first = self.first(features)
        return torch.cat([first, self.second(torch.cat([features, first], dim=1))], dim=1)


def contract(features: Tensor, down: nn.ModuleList, pool: nn.Module) -> list[Tensor]:
    """The features of every resolution, the finest first."""
    skips: list[Tensor] = []
    for level, block in enumerate(down):
        features = block(features if level == 0 else pool(features))
        skips.append(features)
    return skips


class Merge(nn.Module):
    """Brings features to the next finer resolution and convolves them together with those found there.

    Args:
        up: doubles height and width.
        block: convolutions of the finer features, if there are any, and after them, in order of channels, the enlarged.
    """

    def __init__(self, up: nn.Module, block: nn.Sequential) -> None:
        super().__init__()
        self.up = up
        self.block = block

    def forward(self, features: Tensor, *finer: Tensor) -> Tensor:
        """Features (N, outputs of the block, 2 H, 2 W) of (N, C, H, W), and finer ones (N, D, 2 H, 2 W)."""
        merged: Tensor = self.block(torch.cat([*finer, self.up(features)], dim=1))
        return merged


def expand(features: Tensor, skips: list[Tensor], merge: nn.ModuleList) -> Tensor:
    """The deepest features brought back up, merged with those of each finer resolution on the way."""
    for join, skip in zip(reversed(merge), reversed(skips), strict=True):
        features = join(features, skip)
    return features


def upsample(inputs: int, outputs: int, how: str) -> nn.Module:
    """Doubles height and width, by ``transposed`` convolution or ``bilinear`` interpolation.

    Raises:
        ValueError: ``how`` is neither.
    """
    if how == "transposed":
        # A bias would change nothing: the convolutions that follow are normalised.
        return nn.ConvTranspose2d(inputs, outputs, 2, stride=2, bias=False)
    if how == "bilinear":
        return nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(inputs, outputs, 1))
    raise ValueError(f"up is transposed or bilinear, not {how!r}")
