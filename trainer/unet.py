"""Network architectures, plain torch.

A network maps a batch (N, C, H, W) of normalised float pixels to logits (N, K, H, W); H and W must be
multiples of its total stride.  Nothing here knows about data, training or slides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def _conv_block(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with batch norm and ReLU."""
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [nn.Conv2d(width, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class StemUNet(nn.Module):
    """U-Net (Ronneberger et al. 2015, arXiv:1505.04597) that works at half resolution.

    A stride-2 4x4 convolution brings the image to half resolution, ``depth`` resolutions of dense 3x3
    convolutions follow (width, 2 width, 4 width, ...), and a 1x1 head with a pixel shuffle brings the
    logits back to full resolution.  Most of a plain U-Net's time goes into its full-resolution layers,
    which this one does not have.

    Args:
        in_channels: C of the input.
        outputs: K, the number of logits per pixel.
        width: channels at half resolution.
        depth: number of resolutions; the total stride is ``2 ** depth``.
    """

    def __init__(self, in_channels: int = 3, outputs: int = 3, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(depth)]
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        self.down = nn.ModuleList(_conv_block(a, b) for a, b in zip([width, *widths], widths, strict=False))
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in widths[:-1])
        self.merge = nn.ModuleList(_conv_block(2 * w, w) for w in widths[:-1])
        self.head = nn.Conv2d(width, 4 * outputs, 1)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (N, K, H, W) of ``pixels`` (N, C, H, W)."""
        features = self.stem(pixels)
        skips: list[Tensor] = []
        for level, block in enumerate(self.down):
            features = block(features if level == 0 else self.pool(features))
            skips.append(features)
        skips.pop()
        for up, merge in zip(reversed(self.up), reversed(self.merge), strict=True):
            features = merge(torch.cat([skips.pop(), up(features)], dim=1))
        logits: Tensor = self.shuffle(self.head(features))
        return logits


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {"stem-unet": StemUNet}


def build_network(architecture: dict[str, Any]) -> nn.Module:
    """The network that ``{"name": ..., **arguments}`` describes, with random weights, in training mode.

    Raises:
        KeyError: no architecture has that name.
        TypeError: it does not take these arguments.
    """
    arguments = dict(architecture)
    return ARCHITECTURES[arguments.pop("name")](**arguments)
