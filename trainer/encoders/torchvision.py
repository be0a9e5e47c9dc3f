"""ResNet-34 and MobileNetV2 with the parameter names of torchvision.

ResNet: He et al. 2015, arXiv:1512.03385.  MobileNetV2: Sandler et al. 2018, arXiv:1801.04381.
"""

from __future__ import annotations

from torch import Tensor, nn

from cellseg_batch.trainer.encoders.base import Encoder, download


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
        return download("https://download.pytorch.org/models/resnet34-b627a593.pth")

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
        return download("https://download.pytorch.org/models/mobilenet_v2-7ebf99e0.pth")

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Features at strides 2, 4, 8, 16, 32."""
        taps, current = [], pixels
        for number, layer in enumerate(self.features):
            current = layer(current)
            if number in self._TAPS:
                taps.append(current)
        return taps
