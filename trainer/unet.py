"""Network architectures, plain torch.

A network maps a batch (N, C, H, W) of normalised float pixels to logits (N, K, H, W); H and W must be
multiples of its total stride.  Nothing here knows about data, training or slides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cellseg_batch.trainer.blocks import DenseBlock, Merge, contract, conv_block, expand, upsample
from cellseg_batch.trainer.bundle import DOWNSCALED, Bundle
from cellseg_batch.trainer.encoders import ENCODERS, EfficientNetLite0, Encoder


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
        merge_convs: convolutions after each merge with the encoder's features.
    """

    def __init__(
        self, in_channels: int = 3, outputs: int = 3, width: int = 32, depth: int = 4, merge_convs: int = 2
    ) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(depth)]
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        self.down = nn.ModuleList(conv_block(a, b) for a, b in zip([width, *widths], widths, strict=False))
        self.pool = nn.MaxPool2d(2)
        self.merge = nn.ModuleList(
            Merge(upsample(2 * w, w, "transposed"), conv_block(2 * w, w, merge_convs)) for w in widths[:-1]
        )
        self.head = nn.Conv2d(width, 4 * outputs, 1)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (N, K, H, W) of ``pixels`` (N, C, H, W)."""
        skips = contract(self.stem(pixels), self.down, self.pool)
        features = expand(skips.pop(), skips, self.merge)
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
        grey: look at the mean of the input's channels only.
        encoder_block: makes one resolution of the contracting path from its input and output channels.
    """

    def __init__(
        self,
        in_channels: int = 3,
        outputs: int = 1,
        width: int = 64,
        depth: int = 5,
        up: str = "transposed",
        dropout: float = 0.0,
        grey: bool = False,
        encoder_block: Callable[[int, int], nn.Module] = conv_block,
    ) -> None:
        super().__init__()
        self.grey = grey
        widths = [width * 2**level for level in range(depth)]
        inputs = [1 if grey else in_channels, *widths]
        self.down = nn.ModuleList(encoder_block(a, b) for a, b in zip(inputs, widths, strict=False))
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout2d(dropout)
        self.merge = nn.ModuleList(Merge(upsample(2 * w, w, up), conv_block(2 * w, w)) for w in widths[:-1])
        self.head = nn.Conv2d(width, outputs, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (N, K, H, W) of ``pixels`` (N, C, H, W)."""
        seen = pixels.mean(dim=1, keepdim=True) if self.grey else pixels
        skips = contract(seen, self.down, self.pool)
        features = expand(self.dropout(skips.pop()), skips, self.merge)
        logits: Tensor = self.head(features)
        return logits


class UNetPlus(UNet):
    """A U-Net with a lighter, densely connected encoder, after the idea of U-Net+ (Long 2020).

    U-Net+ changes the contracting path of U-Net to be cheaper to compute (doi 10.1186/s12859-019-3332-1).
    Only that much of the paper's description was at hand; the layers here are ours: each resolution's two
    convolutions have half the channels, and the second one and the output reuse the first's features
    (Huang et al. 2017, arXiv:1608.06993).  The encoder has half the
    weights of U-Net's of the same width.

    Args:
        arguments: as `UNet`'s.
    """

    def __init__(
        self,
        outputs: int = 1,
        width: int = 64,
        depth: int = 5,
        up: str = "transposed",
        dropout: float = 0.0,
        grey: bool = False,
    ) -> None:
        super().__init__(3, outputs, width, depth, up, dropout, grey, encoder_block=DenseBlock)


class EncoderUNet(nn.Module):
    """A U-Net whose contracting path is a published encoder; its decoder halves the channels at each resolution.

    The input is pixels in [0, 1]; ImageNet's mean and standard deviation, which the published weights expect,
    are applied inside.

    Args:
        encoder: a name of `cellseg_batch.trainer.encoders.ENCODERS`.
        outputs: K, the number of logits per pixel.
        widths: channels of the decoder at strides 16, 8, 4, 2 and 1.
        up: as `UNet`.
        dropout: probability with which the encoder's deepest features are dropped in training.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        encoder: str,
        outputs: int = 1,
        widths: Sequence[int] = (256, 128, 64, 32, 16),
        up: str = "transposed",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.encoder: Encoder = ENCODERS[encoder]()
        self.register_buffer("mean", torch.tensor(self.encoder.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(self.encoder.deviation).view(1, 3, 1, 1), persistent=False)
        self.dropout = nn.Dropout2d(dropout)
        skips = [*reversed(self.encoder.widths[:-1]), 0]
        inputs = [self.encoder.widths[-1], *widths[:-1]]
        self.merge = nn.ModuleList(
            Merge(upsample(a, b, up), conv_block(b + skip, b)) for a, b, skip in zip(inputs, widths, skips, strict=True)
        )
        self.head = nn.Conv2d(widths[-1], outputs, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (N, K, H, W) of ``pixels`` (N, 3, H, W)."""
        skips: list[Tensor] = self.encoder((pixels - self.mean) / self.deviation)
        features = self.dropout(skips.pop())
        for merge in self.merge:
            features = merge(features, *([skips.pop()] if skips else []))
        logits: Tensor = self.head(features)
        return logits


class EfficientUNet(nn.Module):
    """A U-Net on the features of EfficientNet-Lite0 that ends at half resolution, as `StemUNet` does.

    The decoder has one 3x3 convolution for each resolution.  The input is pixels in [0, 1]; the scaling that the
    published weights expect is applied inside.

    Args:
        outputs: K, the number of logits per pixel.
        width: channels of the decoder at stride 2; at strides 4, 8 and 16 there are 4/3, 2 and 8/3 times as many,
            rounded up to multiples of 16.
        depth: number of resolutions, 2 to 5; the total stride is ``2 ** depth``.
        widths: channels of the decoder, those at stride 2 first, instead of the above.
        dropout: probability with which the deepest features are dropped in training.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self, outputs: int = 1, width: int = 48, depth: int = 4, widths: Sequence[int] = (), dropout: float = 0.0
    ) -> None:
        super().__init__()
        coarser = (16 * -(-width * thirds // 48) for thirds in (4, 6, 8))
        widths = list(widths) or [width, *coarser][: depth - 1]
        if len(widths) != depth - 1:
            raise ValueError(f"a depth of {depth} needs {depth - 1} widths, not {len(widths)}")
        self.encoder = EfficientNetLite0(depth)
        self.register_buffer("mean", torch.tensor(self.encoder.mean).view(1, 3, 1, 1), persistent=False)
        # Products stay in float32 where the backend keeps the encoder's filters of edges so; quotients do not.
        self.register_buffer("scale", 1 / torch.tensor(self.encoder.deviation).view(1, 3, 1, 1), persistent=False)
        self.dropout = nn.Dropout2d(dropout)
        inputs = [*widths[1:], self.encoder.widths[-1]]
        self.merge = nn.ModuleList(
            Merge(upsample(a, b, "transposed"), conv_block(b + skip, b, 1))
            for a, b, skip in zip(inputs, widths, self.encoder.widths[:-1], strict=True)
        )
        self.head = nn.Conv2d(widths[0], 4 * outputs, 1)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (N, K, H, W) of ``pixels`` (N, 3, H, W)."""
        skips = self.encoder((pixels - self.mean) * self.scale)
        features = expand(self.dropout(skips.pop()), skips, self.merge)
        logits: Tensor = self.shuffle(self.head(features))
        return logits


class Downscaled(nn.Module):
    """A network that works on an image downscaled by a whole factor: large nuclei become as large as it has learnt.

    Pixels are averaged, logits interpolated linearly, both around the same pixel centres.

    Args:
        factor: how many px of the input make one of the inner network's.
        inner: the network.
    """

    def __init__(self, factor: int, inner: nn.Module) -> None:
        super().__init__()
        self.factor = factor
        self.inner = inner

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (N, K, H, W) of ``pixels`` (N, C, H, W)."""
        logits = self.inner(F.avg_pool2d(pixels, self.factor))
        return F.interpolate(logits, scale_factor=float(self.factor), mode="bilinear", align_corners=False)


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "stem-unet": StemUNet,
    "unet": UNet,
    "unet-plus": UNetPlus,
    "unet-mobilenetv2": partial(EncoderUNet, "mobilenetv2"),
    "unet-resnet34": partial(EncoderUNet, "resnet34"),
    "unet-efficientnet-lite0": EfficientUNet,
}


def build_network(architecture: dict[str, Any]) -> nn.Module:
    """The network that ``{"name": ..., **arguments}`` describes, with random weights, in training mode.

    Raises:
        KeyError: no architecture has that name.
        TypeError: it does not take these arguments.
    """
    arguments = dict(architecture)
    if arguments["name"] == DOWNSCALED:
        return Downscaled(arguments["factor"], build_network(arguments["inner"]))
    return ARCHITECTURES[arguments.pop("name")](**arguments)


def load_network(bundle: Bundle) -> nn.Module:
    """The bundle's network in float32, in evaluation mode, with its weights loaded strictly.

    Raises:
        KeyError, TypeError: the architecture is not of this version.
        RuntimeError: the weights are of another architecture.
    """
    network = build_network(bundle.card.architecture)
    weights = {name: torch.from_numpy(array.copy()) for name, array in bundle.weights.items()}
    # Strict loading converts float16 to the parameters' float32.
    network.load_state_dict(weights, strict=True)
    return network.eval()
