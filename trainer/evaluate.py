"""Score a bundle on annotated images: pixels, instances and speed of each image, and summaries of several images.

The plain network is run on whole images, mirrored at their edges as the engine does.  To see the engine's own result on
the same images, use ``run``.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, reduce
from operator import add

import numpy as np
from numpy.typing import NDArray
from skimage.segmentation import relabel_sequential
from skimage.transform import resize
from torch import nn

from cellseg_batch.trainer.bundle import Bundle
from cellseg_batch.trainer.data.sample import Sample, instance_distance
from cellseg_batch.trainer.decode import decode_instances, foreground_mask
from cellseg_batch.trainer.metrics import (
    PixelScore,
    aggregated_jaccard,
    average_precisions,
    instance_overlaps,
    matches,
    pixel_score,
)
from cellseg_batch.trainer.predict import predict_logits
from cellseg_batch.trainer.scale import pick_downscale
from cellseg_batch.trainer.unet import Downscaled

_PIXEL_FIGURES = ("dice", "iou", "accuracy", "precision", "recall")


@dataclass(frozen=True)
class ImageScore:
    """The scores of a model on one image.

    Attributes:
        name: id of the image.
        kind: kind of the image.
        pixels: score of the foreground mask.
        ap: average precision at IoU 0.50, 0.55, ... 0.95.
        aji: aggregated Jaccard index.
        found, spurious, missed: numbers of matched, unmatched predicted and unmatched true instances at IoU 0.5.
        megapixels: size of the image in Mpx.
        seconds: seconds that the network took.
        downscale: factor by which the image was downscaled for the model.
    """

    name: str
    kind: str
    pixels: PixelScore
    ap: tuple[float, ...]
    aji: float
    found: int
    spurious: int
    missed: int
    megapixels: float
    seconds: float
    downscale: int = 1


@dataclass(frozen=True)
class Summary:
    """The scores of a model on several images.

    Attributes:
        images: number of images.
        mean: dice, iou, accuracy, precision, recall of the masks, averaged over images.
        pooled: the same figures from the pixels of all images together.
        ap: average precision at IoU 0.50, 0.55, ... 0.95, averaged over images.
        competition: mean of ``ap``.
        f1: F1 of the instances of all images together, at IoU 0.5.
        aji: aggregated Jaccard index, averaged over images.
        mpx_per_s: speed of the network in torch fp32, in Mpx/s.
    """

    images: int
    mean: dict[str, float]
    pooled: dict[str, float]
    ap: list[float]
    competition: float
    f1: float
    aji: float
    mpx_per_s: float


def evaluate(bundle: Bundle, network: nn.Module, samples: Iterable[Sample]) -> list[ImageScore]:
    """Score the bundle's ``network`` on every sample in float32.

    Args:
        bundle: the model.
        network: the bundle's network, in evaluation mode.
        samples: annotated images.
    """
    card, scores = bundle.card, []
    for sample in samples:
        start = time.perf_counter()
        downscale, logits = predict_sample(network, sample, bundle)
        seconds = time.perf_counter() - start
        truth = relabel_sequential(sample.labels)[0]
        decoded = decode_instances(logits, card.decoder, card.threshold, card.rule, downscale)
        overlaps = instance_overlaps(decoded, truth)
        matched, spurious, missed = matches(overlaps.ious, 0.5)
        scores.append(
            ImageScore(
                name=sample.name,
                kind=sample.kind,
                pixels=pixel_score(foreground_mask(logits, card.threshold), truth > 0),
                ap=average_precisions(overlaps.ious),
                aji=aggregated_jaccard(overlaps),
                found=matched,
                spurious=spurious,
                missed=missed,
                megapixels=truth.size / 1e6,
                seconds=seconds,
                downscale=downscale,
            )
        )
    return scores


def predict_sample(network: nn.Module, sample: Sample, bundle: Bundle) -> tuple[int, NDArray[np.float32]]:
    """Choose the factor by which a sample is downscaled, by the rule of the bundle's card, and predict its logits.

    Returns:
        (factor, logits (K, H, W) at the size of the sample).
    """
    card = bundle.card

    @cache
    def logits_at(factor: int) -> NDArray[np.float32]:
        downscaled = network if factor == 1 else Downscaled(factor, network)
        stride, margin = factor * card.total_stride, factor * card.margin
        return predict_logits(downscaled, sample.pixels, stride, "fp32", margin).numpy()

    def masks_at(factor: int) -> list[NDArray[np.bool_]]:
        pixels = logits_at(factor)[:, factor // 2 :: factor, factor // 2 :: factor]
        return [foreground_mask(pixels, card.threshold)]

    downscale = pick_downscale(card.downscale, masks_at)
    return downscale, logits_at(downscale)


def summarise(scores: Sequence[ImageScore]) -> Summary:
    """Summarise the scores of at least one image."""
    true_positives = sum(score.found for score in scores)
    errors = sum(score.spurious + score.missed for score in scores)
    pooled = reduce(add, (score.pixels for score in scores))
    ap = np.mean([score.ap for score in scores], axis=0)
    return Summary(
        images=len(scores),
        mean={name: float(np.mean([getattr(score.pixels, name) for score in scores])) for name in _PIXEL_FIGURES},
        pooled={name: getattr(pooled, name) for name in _PIXEL_FIGURES},
        ap=ap.tolist(),
        competition=float(ap.mean()),
        f1=2 * true_positives / max(1, 2 * true_positives + errors),
        aji=float(np.mean([score.aji for score in scores])),
        mpx_per_s=sum(score.megapixels for score in scores) / sum(score.seconds for score in scores),
    )


def rescale(sample: Sample, factor: float) -> Sample:
    """Magnify a sample by ``factor``: its image bilinearly (smoothed first if it shrinks), its labels by nearest."""
    height, width = (round(side * factor) for side in sample.labels.shape)
    image = resize(sample.image, (height, width), order=1, preserve_range=True, anti_aliasing=factor < 1)
    labels = resize(sample.labels, (height, width), order=0, preserve_range=True, anti_aliasing=False)
    distance = np.round(255 * instance_distance(labels)).astype(np.uint8)
    return replace(sample, image=image.astype(np.float32), labels=labels.astype(np.int32), distance=distance)
