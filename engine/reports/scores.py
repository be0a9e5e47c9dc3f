"""Score what a model finds in annotated images: pixels, instances and classes, of each image and of several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np
from skimage.segmentation import relabel_sequential

from cellseg_batch.engine.reports.sample_prediction import Prediction
from cellseg_batch.trainer.data.sample import Sample
from cellseg_batch.trainer.metrics import (
    PixelScore,
    aggregated_jaccard,
    average_precisions,
    class_scores,
    instance_overlaps,
    majority_classes,
    matches,
    panoptic_quality,
    pixel_score,
)

_PIXEL_FIGURES = ("dice", "iou", "accuracy", "precision", "recall")


@dataclass(frozen=True)
class InstanceScore:
    """Numbers of instances that match at IoU 0.5.

    Attributes:
        found, spurious, missed: matched, unmatched predicted and unmatched true instances.
    """

    found: int
    spurious: int
    missed: int

    def __add__(self, other: InstanceScore) -> InstanceScore:
        """The score of both images together."""
        return InstanceScore(self.found + other.found, self.spurious + other.spurious, self.missed + other.missed)

    @property
    def f1(self) -> float:
        """2 found / (2 found + spurious + missed), 0 without instances."""
        return 2 * self.found / max(1, 2 * self.found + self.spurious + self.missed)


@dataclass(frozen=True)
class ClassScore:
    """The scores of one class on one image.

    Attributes:
        pixels: score of its mask; None for a model that tells the classes of objects alone.
        instances: score of its objects; None where the truth has none, or their classes are unknown.
    """

    pixels: PixelScore | None
    instances: InstanceScore | None


@dataclass(frozen=True)
class ImageScore:
    """The scores of a model on one image.

    Attributes:
        name: id of the image.
        kind: kind of the image.
        pixels: score of the foreground mask.
        ap: average precision at IoU 0.50, 0.55, ... 0.95.
        aji: aggregated Jaccard index.
        pq: panoptic quality.
        found, spurious, missed: numbers of matched, unmatched predicted and unmatched true instances at IoU 0.5.
        megapixels: size of the image in Mpx.
        seconds: seconds that the network took.
        downscale: factor by which the image was downscaled for the model.
        classes: name of each class that model and truth know -> its scores.
    """

    name: str
    kind: str
    pixels: PixelScore
    ap: tuple[float, ...]
    aji: float
    pq: float
    found: int
    spurious: int
    missed: int
    megapixels: float
    seconds: float
    downscale: int
    classes: dict[str, ClassScore]


@dataclass(frozen=True)
class ClassSummary:
    """The scores of one class on several images, all of their pixels and objects together.

    Attributes:
        dice, iou: of its mask; None as in `ClassScore`.
        f1: of its objects at IoU 0.5; None as in `ClassScore`.
    """

    dice: float | None
    iou: float | None
    f1: float | None


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
        pq: panoptic quality, averaged over images.
        mpx_per_s: speed of the network in Mpx/s.
        classes: name of each class -> its figures.
    """

    images: int
    mean: dict[str, float]
    pooled: dict[str, float]
    ap: list[float]
    competition: float
    f1: float
    aji: float
    pq: float
    mpx_per_s: float
    classes: dict[str, ClassSummary]


def score(prediction: Prediction, sample: Sample, classes: Sequence[tuple[int, str]]) -> ImageScore:
    """Score what a model finds in an image.

    Args:
        prediction: what it finds.
        sample: the annotated image, whose classes have the model's numbers.
        classes: number and name of each class that both know.
    """
    truth = relabel_sequential(sample.labels)[0]
    overlaps = instance_overlaps(prediction.labels, truth)
    ious = overlaps.ious
    found, spurious, missed = matches(ious, 0.5)
    return ImageScore(
        name=sample.name,
        kind=sample.kind,
        pixels=pixel_score(prediction.mask, truth > 0),
        ap=average_precisions(ious),
        aji=aggregated_jaccard(overlaps),
        pq=panoptic_quality(ious),
        found=found,
        spurious=spurious,
        missed=missed,
        megapixels=truth.size / 1e6,
        seconds=prediction.seconds,
        downscale=prediction.downscale,
        classes=dict(_class_scores(prediction, sample, classes)) if sample.classes is not None else {},
    )


def _class_scores(
    prediction: Prediction, sample: Sample, classes: Sequence[tuple[int, str]]
) -> Iterator[tuple[str, ClassScore]]:
    assert sample.classes is not None
    count = max((number for number, _ in classes), default=0)
    pixels = None if prediction.classes is None else class_scores(prediction.classes, sample.classes, count)
    found, ious, true = prediction.class_of_object, None, None
    if found is not None and sample.has_objects:
        truth = relabel_sequential(sample.labels)[0]
        ious, true = instance_overlaps(prediction.labels, truth).ious, majority_classes(truth, sample.classes, count)
    for number, name in classes:
        instances = None
        if found is not None and ious is not None and true is not None:
            instances = InstanceScore(*matches(ious[np.ix_(found == number, true == number)], 0.5))
        yield name, ClassScore(None if pixels is None else pixels[number - 1], instances)


def summarise(scores: Sequence[ImageScore]) -> Summary:
    """Summarise the scores of at least one image."""
    instances = reduce(add, (InstanceScore(one.found, one.spurious, one.missed) for one in scores))
    pooled = reduce(add, (one.pixels for one in scores))
    ap = np.mean([one.ap for one in scores], axis=0)
    seconds = sum(one.seconds for one in scores)
    names = dict.fromkeys(name for one in scores for name in one.classes)
    return Summary(
        images=len(scores),
        mean={name: float(np.mean([getattr(one.pixels, name) for one in scores])) for name in _PIXEL_FIGURES},
        pooled={name: getattr(pooled, name) for name in _PIXEL_FIGURES},
        ap=ap.tolist(),
        competition=float(ap.mean()),
        f1=instances.f1,
        aji=float(np.mean([one.aji for one in scores])),
        pq=float(np.mean([one.pq for one in scores])),
        mpx_per_s=sum(one.megapixels for one in scores) / seconds if seconds else 0.0,
        classes={
            name: _summarise_class([one.classes[name] for one in scores if name in one.classes]) for name in names
        },
    )


def _summarise_class(scores: Sequence[ClassScore]) -> ClassSummary:
    masks = [one.pixels for one in scores if one.pixels is not None]
    objects = [one.instances for one in scores if one.instances is not None]
    pixels, instances = reduce(add, masks) if masks else None, reduce(add, objects) if objects else None
    return ClassSummary(
        dice=None if pixels is None else pixels.dice,
        iou=None if pixels is None else pixels.iou,
        f1=None if instances is None else instances.f1,
    )
