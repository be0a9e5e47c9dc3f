"""Network architectures, plain torch.

A network maps a batch (N, C, H, W) of normalised float pixels to logits (N, K, H, W); H and W must be
multiples of its total stride.  Nothing here knows about data, training or slides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cellseg_batch.trainer.encoders import ENCODERS


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


class UNet(nn.Module):
    """The plain U-Net (Ronneberger et al. 2015, arXiv:1505.04597), padded so that its output is as large as its input.

    Args:
        in_channels: C of the input.
        outputs: K, the number of logits per pixel.
        width: channels at full resolution; 64 in the paper.
        depth: number of resolutions; 5 in the paper. The total stride is ``2 ** (depth - 1)``.
        up: ``transposed`` convolutions, or ``bilinear`` interpolation and a 1x1 convolution.
        dropout: probability with which the deepest features are dropped in training.
    """

    def __init__(
        self,
        in_channels: int = 3,
        outputs: int = 1,
        width: int = 64,
        depth: int = 5,
        up: str = "transposed",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(depth)]
        self.down = nn.ModuleList(_conv_block(a, b) for a, b in zip([in_channels, *widths], widths, strict=False))
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout2d(dropout)
        self.up = nn.ModuleList(_upsample(2 * w, w, up) for w in widths[:-1])
        self.merge = nn.ModuleList(_conv_block(2 * w, w) for w in widths[:-1])
        self.head = nn.Conv2d(width, outputs, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (N, K, H, W) of ``pixels`` (N, C, H, W)."""
        skips: list[Tensor] = []
        features = pixels
        for level, block in enumerate(self.down):
            features = block(features if level == 0 else self.pool(features))
            skips.append(features)
        features = self.dropout(skips.pop())
        for up, merge in zip(reversed(self.up), reversed(self.merge), strict=True):
            features = merge(torch.cat([skips.pop(), up(features)], dim=1))
        logits: Tensor = self.head(features)
        return logits


class EncoderUNet(nn.Module):
    """A U-Net whose contracting path is a published encoder; its decoder halves the channels at each resolution.

    Args:
        encoder: a name of `cellseg_batch.trainer.encoders.ENCODERS`.
        outputs: K, the number of logits per pixel.
        widths: channels of the decoder at strides 16, 8, 4, 2 and 1.
        up: as `UNet`.
        dropout: probability with which the encoder's deepest features are dropped in training.
    """

    def __init__(
        self,
        encoder: str,
        outputs: int = 1,
        widths: Sequence[int] = (256, 128, 64, 32, 16),
        up: str = "transposed",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.encoder = ENCODERS[encoder]()
        self.dropout = nn.Dropout2d(dropout)
        skips = [*reversed(self.encoder.widths[:-1]), 0]
        inputs = [self.encoder.widths[-1], *widths[:-1]]
        self.up = nn.ModuleList(_upsample(a, b, up) for a, b in zip(inputs, widths, strict=True))
        self.merge = nn.ModuleList(_conv_block(b + skip, b) for b, skip in zip(widths, skips, strict=True))
        self.head = nn.Conv2d(widths[-1], outputs, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (N, K, H, W) of ``pixels`` (N, 3, H, W)."""
        skips: list[Tensor] = self.encoder(pixels)
        features = self.dropout(skips.pop())
        for up, merge in zip(self.up, self.merge, strict=True):
            features = up(features)
            features = merge(torch.cat([skips.pop(), features], dim=1) if skips else features)
        logits: Tensor = self.head(features)
        return logits


def _upsample(inputs: int, outputs: int, how: str) -> nn.Module:
    if how == "transposed":
        return nn.ConvTranspose2d(inputs, outputs, 2, stride=2)
    if how == "bilinear":
        return nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(inputs, outputs, 1))
    raise ValueError(f"up is transposed or bilinear, not {how!r}")


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "stem-unet": StemUNet,
    "unet": UNet,
    "encoder-unet": EncoderUNet,
}


def build_network(architecture: dict[str, Any]) -> nn.Module:
    """The network that ``{"name": ..., **arguments}`` describes, with random weights, in training mode.

    Raises:
        KeyError: no architecture has that name.
        TypeError: it does not take these arguments.
    """
    arguments = dict(architecture)
    return ARCHITECTURES[arguments.pop("name")](**arguments)
