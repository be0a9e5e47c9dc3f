"""Published encoders in plain torch, with the parameter names of their publishers so that weights load strictly.

An encoder returns its features at strides 2, 4, 8, 16 and 32.  Nothing here knows segmentation.
"""

from __future__ import annotations

from cellseg_batch.trainer.encoders.base import Encoder, load_encoder_weights
from cellseg_batch.trainer.encoders.efficientnet import EfficientNetLite0
from cellseg_batch.trainer.encoders.torchvision import MobileNetV2, ResNet34

__all__ = ["ENCODERS", "EfficientNetLite0", "Encoder", "load_encoder_weights"]

ENCODERS: dict[str, type[ResNet34 | MobileNetV2 | EfficientNetLite0]] = {
    "resnet34": ResNet34,
    "mobilenetv2": MobileNetV2,
    "efficientnet-lite0": EfficientNetLite0,
}
