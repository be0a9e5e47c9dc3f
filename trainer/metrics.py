"""Compute segmentation metrics by their published definitions, on plain arrays.

AP at an IoU threshold is TP / (TP + FP + FN); the competition metric is its mean over 0.50, 0.55, ... 0.95,
averaged over images (2018 Data Science Bowl; Caicedo et al. 2019, doi 10.1038/s41592-019-0612-7).  AJI: Kumar et
al. 2017, doi 10.1109/TMI.2017.2677499.  PQ: Kirillov et al. 2019, doi 10.1109/CVPR.2019.00963.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IOU_THRESHOLDS = tuple(np.arange(50, 100, 5) / 100)


@dataclass(frozen=True)
class PixelScore:
    """Agreement of two masks: numbers of pixels, and figures in [0, 1] from them; an undefined figure is 1.

    Attributes:
        tp, fp, fn, tn: numbers of pixels that are predicted and true, predicted only, true only, neither.
    """

    tp: int
    fp: int
    fn: int
    tn: int

    def __add__(self, other: PixelScore) -> PixelScore:
        """The score of both pairs of masks together."""
        return PixelScore(self.tp + other.tp, self.fp + other.fp, self.fn + other.fn, self.tn + other.tn)

    @property
    def dice(self) -> float:
        """2 TP / (2 TP + FP + FN)."""
        return _share(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def iou(self) -> float:
        """TP / (TP + FP + FN)."""
        return _share(self.tp, self.tp + self.fp + self.fn)

    @property
    def accuracy(self) -> float:
        """(TP + TN) / all."""
        return _share(self.tp + self.tn, self.tp + self.fp + self.fn + self.tn)

    @property
    def precision(self) -> float:
        """TP / (TP + FP)."""
        return _share(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        """TP / (TP + FN)."""
        return _share(self.tp, self.tp + self.fn)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def pixel_score(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> PixelScore:
    """Compare two masks of the same shape."""
    tp = int(np.count_nonzero(predicted & truth))
    fp, fn = int(np.count_nonzero(predicted)) - tp, int(np.count_nonzero(truth)) - tp
    return PixelScore(tp, fp, fn, truth.size - tp - fp - fn)


def class_scores(predicted: NDArray[np.integer], truth: NDArray[np.integer], count: int) -> list[PixelScore]:
    """Compare two class maps of the same shape: the score of each class's mask, from class 1 to class ``count``."""
    return [pixel_score(predicted == number, truth == number) for number in range(1, 1 + count)]


def majority_classes(labels: NDArray[np.integer], classes: NDArray[np.integer], count: int) -> NDArray[np.int64]:
    """Class of each instance of a map: the one that most of its pixels are of, the first of equal ones, 0 for none.

    Args:
        labels: (H, W) instance map of 0 and contiguous ids.
        classes: (H, W) class of each pixel, 0 for none.
        count: number of classes; higher numbers are classes that do not matter.

    Returns:
        (n,), of instances 1, 2, ..., n.
    """
    pixels = instance_overlaps(labels, classes).pixels[1:, 1:]
    chosen = pixels.argmax(axis=1) if pixels.size else np.zeros(len(pixels), np.int64)
    is_known = (pixels.max(axis=1, initial=0) > 0) & (chosen < count)
    return np.where(is_known, 1 + chosen, 0)


@dataclass(frozen=True)
class Overlaps:
    """Overlaps of the predicted and true instances of one image.

    Attributes:
        pixels: (1 + predicted, 1 + true) numbers of pixels in common; row and column 0 are background.
    """

    pixels: NDArray[np.int64]

    @property
    def ious(self) -> NDArray[np.float64]:
        """IoU of every predicted with every true instance, (predicted, true)."""
        predicted, true = self.pixels.sum(axis=1, keepdims=True), self.pixels.sum(axis=0, keepdims=True)
        ious: NDArray[np.float64] = self.pixels / np.maximum(predicted + true - self.pixels, 1)
        return ious[1:, 1:]


def instance_overlaps(predicted: NDArray[np.integer], truth: NDArray[np.integer]) -> Overlaps:
    """Overlaps of two instance maps of the same shape; labels are 0 and contiguous ids."""
    rows, columns = int(predicted.max(initial=0)) + 1, int(truth.max(initial=0)) + 1
    pairs = np.bincount(predicted.ravel().astype(np.int64) * columns + truth.ravel(), minlength=rows * columns)
    return Overlaps(pairs.reshape(rows, columns))


def matches(ious: NDArray[np.float64], threshold: float) -> tuple[int, int, int]:
    """(TP, FP, FN) at an IoU threshold of at least 0.5, above which a match is unique."""
    matched = int(np.count_nonzero(ious > threshold))
    return matched, ious.shape[0] - matched, ious.shape[1] - matched


def average_precisions(ious: NDArray[np.float64]) -> tuple[float, ...]:
    """AP of one image at each of `IOU_THRESHOLDS`; 1 if prediction and truth are both empty."""
    counts = [matches(ious, threshold) for threshold in IOU_THRESHOLDS]
    return tuple(_share(matched, matched + spurious + missed) for matched, spurious, missed in counts)


def competition_metric(ious: NDArray[np.float64]) -> float:
    """Mean of `average_precisions`."""
    return float(np.mean(average_precisions(ious)))


def panoptic_quality(ious: NDArray[np.float64]) -> float:
    """PQ of one image: the mean IoU of matched instances times F1, both at IoU 0.5; 1 if both maps are empty."""
    matched, spurious, missed = matches(ious, 0.5)
    if not matched + spurious + missed:
        return 1.0
    return float(ious[ious > 0.5].sum()) / (matched + (spurious + missed) / 2)


def aggregated_jaccard(overlaps: Overlaps) -> float:
    """AJI of one image: pooled intersection over union of each true instance with its best match.

    Predicted instances that are no true instance's best match are added to the union.
    """
    ious, common = overlaps.ious, overlaps.pixels[1:, 1:]
    predicted, true = overlaps.pixels.sum(axis=1)[1:], overlaps.pixels.sum(axis=0)[1:]
    intersection, union, used = 0, 0, np.zeros(len(predicted), bool)
    for column in range(len(true)):
        best = int(ious[:, column].argmax()) if len(predicted) else -1
        shared = int(common[best, column]) if best >= 0 else 0
        if shared:
            used[best] = True
            intersection += shared
            union += int(predicted[best] + true[column]) - shared
        else:
            union += int(true[column])
    return _share(intersection, union + int(predicted[~used].sum()))
