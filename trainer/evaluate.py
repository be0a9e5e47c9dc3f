"""Score a bundle on annotated images: pixels, instances and speed, per kind of image and overall.

It runs the plain network on whole images, mirrored at their edges as the engine does; the engine's own result on the
same images is what ``run`` writes.
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
from cellseg_batch.trainer.decode import decode_instances
from cellseg_batch.trainer.metrics import (
    PixelScore,
    aggregated_jaccard,
    average_precisions,
    instance_overlaps,
    matches,
    pixel_score,
)
from cellseg_batch.trainer.predict import predict_logits
from cellseg_batch.trainer.scale import pick_shrink
from cellseg_batch.trainer.unet import Shrunk

_PIXEL_FIGURES = ("dice", "iou", "accuracy", "precision", "recall")


@dataclass(frozen=True)
class ImageScore:
    """What a model reached on one image.

    Attributes:
        name: the image's id.
        kind: the kind of image.
        pixels: of the foreground mask.
        ap: at IoU 0.50 ... 0.95.
        aji: aggregated Jaccard index.
        found, spurious, missed: instances at IoU 0.5.
        megapixels: size of the image.
        seconds: of the network.
        shrink: by how much the image was shrunk for the model.
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
    shrink: int = 1


@dataclass(frozen=True)
class Summary:
    """The figures of several images.

    Attributes:
        images: how many.
        mean: dice, iou, accuracy, precision, recall of the masks, averaged over images.
        pooled: the same from all pixels together.
        ap: at IoU 0.50 ... 0.95, averaged over images.
        competition: mean of ``ap``.
        f1: of all instances together, at IoU 0.5.
        aji: averaged over images.
        mpx_per_s: of the network in torch fp32.
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
    """Score ``network``, which is the bundle's in evaluation mode, on every sample in float32.

    With one output every connected component of the mask is an instance.

    Args:
        bundle: the model.
        network: built from it.
        samples: annotated images.
    """
    limit = _limit(bundle)
    scores = []
    for sample in samples:
        start = time.perf_counter()
        shrink, logits = predict_sample(network, sample, bundle)
        seconds = time.perf_counter() - start
        truth = relabel_sequential(sample.labels)[0]
        decoded = decode_instances(logits, bundle.card.threshold, bundle.card.instances, shrink)
        overlaps = instance_overlaps(decoded, truth)
        found, spurious, missed = matches(overlaps.ious, 0.5)
        scores.append(
            ImageScore(
                name=sample.name,
                kind=sample.kind,
                pixels=pixel_score(logits[0] > limit, truth > 0),
                ap=average_precisions(overlaps.ious),
                aji=aggregated_jaccard(overlaps),
                found=found,
                spurious=spurious,
                missed=missed,
                megapixels=truth.size / 1e6,
                seconds=seconds,
                shrink=shrink,
            )
        )
    return scores


def predict_sample(network: nn.Module, sample: Sample, bundle: Bundle) -> tuple[int, NDArray[np.float32]]:
    """By how much a sample is shrunk for ``network``, as the bundle's card wants it, and its logits (K, H, W) then."""
    limit = _limit(bundle)

    @cache
    def logits_at(factor: int) -> NDArray[np.float32]:
        shown = network if factor == 1 else Shrunk(factor, network)
        stride, margin = factor * bundle.card.total_stride, factor * bundle.card.margin
        return predict_logits(shown, sample.pixels, stride, "fp32", margin).numpy()

    def masks_at(factor: int) -> list[NDArray[np.bool_]]:
        return [logits_at(factor)[0, factor // 2 :: factor, factor // 2 :: factor] > limit]

    shrink = pick_shrink(bundle.card.shrink, masks_at)
    return shrink, logits_at(shrink)


def _limit(bundle: Bundle) -> float:
    """The logit above which a pixel is foreground."""
    return float(np.log(bundle.card.threshold / (1 - bundle.card.threshold)))


def summarise(scores: Sequence[ImageScore]) -> Summary:
    """The figures of several images, at least one."""
    counts = ("found", "spurious", "missed")
    found, spurious, missed = (sum(getattr(score, name) for score in scores) for name in counts)
    pooled = reduce(add, (score.pixels for score in scores))
    ap = np.mean([score.ap for score in scores], axis=0)
    return Summary(
        images=len(scores),
        mean={name: float(np.mean([getattr(score.pixels, name) for score in scores])) for name in _PIXEL_FIGURES},
        pooled={name: getattr(pooled, name) for name in _PIXEL_FIGURES},
        ap=ap.tolist(),
        competition=float(ap.mean()),
        f1=2 * found / max(1, 2 * found + spurious + missed),
        aji=float(np.mean([score.aji for score in scores])),
        mpx_per_s=sum(score.megapixels for score in scores) / sum(score.seconds for score in scores),
    )


def rescale(sample: Sample, factor: float) -> Sample:
    """The sample magnified by ``factor``: image bilinearly (smoothed first when it shrinks), labels by nearest."""
    height, width = (round(side * factor) for side in sample.labels.shape)
    image = resize(sample.image, (height, width), order=1, preserve_range=True, anti_aliasing=factor < 1)
    labels = resize(sample.labels, (height, width), order=0, preserve_range=True, anti_aliasing=False)
    distance = np.round(255 * instance_distance(labels)).astype(np.uint8)
    return replace(sample, image=image.astype(np.float32), labels=labels.astype(np.int32), distance=distance)
