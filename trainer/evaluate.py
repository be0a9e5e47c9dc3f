"""Score a bundle on annotated images: pixels, instances and speed, per kind of image and overall.

It runs the plain network on whole images; the engine's own result on the same images is what ``run`` writes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from skimage.segmentation import relabel_sequential
from torch import nn

from cellseg_batch.trainer.bundle import Bundle
from cellseg_batch.trainer.data.sample import Sample
from cellseg_batch.trainer.decode import Decoding, decode_instances
from cellseg_batch.trainer.metrics import competition_metric, instance_ious, matches, pixel_score
from cellseg_batch.trainer.train import predict_logits


@dataclass(frozen=True)
class ImageScore:
    """What a model reached on one image.

    Attributes:
        name: the image's id.
        kind: the kind of image.
        dice, iou, accuracy: of the foreground mask.
        metric: mean over IoU 0.50 ... 0.95 of TP / (TP + FP + FN), see `cellseg_batch.trainer.metrics`.
        found, spurious, missed: instances at IoU 0.5.
        megapixels: size of the image.
        seconds: of the network.
    """

    name: str
    kind: str
    dice: float
    iou: float
    accuracy: float
    metric: float
    found: int
    spurious: int
    missed: int
    megapixels: float
    seconds: float


@dataclass(frozen=True)
class Summary:
    """Means over images, and instances pooled over them (F1 at IoU 0.5)."""

    images: int
    dice: float
    iou: float
    accuracy: float
    metric: float
    f1: float
    mpx_per_s: float


def evaluate(bundle: Bundle, network: nn.Module, samples: Iterable[Sample]) -> list[ImageScore]:
    """Score ``network``, which is the bundle's in evaluation mode, on every sample in float32.

    Args:
        bundle: the model.
        network: built from it.
        samples: annotated images.
    """
    scores = []
    for sample in samples:
        start = time.perf_counter()
        logits = predict_logits(network, sample.pixels, bundle.card.total_stride, torch.float32).numpy()
        seconds = time.perf_counter() - start
        decoded = decode_instances(logits, Decoding(threshold=bundle.card.threshold))
        truth = relabel_sequential(sample.labels)[0]
        limit = np.log(bundle.card.threshold / (1 - bundle.card.threshold))
        pixels = pixel_score(logits[0] > limit, truth > 0)
        ious = instance_ious(decoded, truth)
        counts = matches(ious, 0.5)
        size = truth.size / 1e6
        metric = competition_metric(ious)
        scores.append(
            ImageScore(
                sample.name, sample.kind, pixels.dice, pixels.iou, pixels.accuracy, metric, *counts, size, seconds
            )
        )
    return scores


def summarise(scores: list[ImageScore]) -> Summary:
    """The figures of several images as one row."""
    found, spurious, missed = (sum(getattr(one, name) for one in scores) for name in ("found", "spurious", "missed"))
    return Summary(
        images=len(scores),
        dice=float(np.mean([one.dice for one in scores])),
        iou=float(np.mean([one.iou for one in scores])),
        accuracy=float(np.mean([one.accuracy for one in scores])),
        metric=float(np.mean([one.metric for one in scores])),
        f1=2 * found / max(1, 2 * found + spurious + missed),
        mpx_per_s=sum(one.megapixels for one in scores) / sum(one.seconds for one in scores),
    )
