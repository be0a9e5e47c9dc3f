"""Segmentation metrics by their published definitions, on plain arrays.

The competition metric is the mean over IoU 0.50, 0.55, ... 0.95 of TP / (TP + FP + FN), averaged over images
(2018 Data Science Bowl; Caicedo et al. 2019, doi 10.1038/s41592-019-0612-7).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IOU_THRESHOLDS = np.arange(0.5, 1.0, 0.05)


@dataclass(frozen=True)
class PixelScore:
    """Agreement of two masks, each figure in [0, 1]."""

    dice: float
    iou: float
    accuracy: float


def pixel_score(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> PixelScore:
    """Compare two masks of one shape; two empty masks agree perfectly."""
    overlap = int(np.count_nonzero(predicted & truth))
    total = int(np.count_nonzero(predicted)) + int(np.count_nonzero(truth))
    if total == 0:
        return PixelScore(1.0, 1.0, 1.0)
    return PixelScore(2 * overlap / total, overlap / (total - overlap), float(np.mean(predicted == truth)))


def instance_ious(predicted: NDArray[np.integer], truth: NDArray[np.integer]) -> NDArray[np.float64]:
    """IoU of every predicted with every true instance, (predicted, true); labels are 0 and contiguous ids."""
    rows, columns = int(predicted.max(initial=0)) + 1, int(truth.max(initial=0)) + 1
    pairs = np.bincount(predicted.ravel().astype(np.int64) * columns + truth.ravel(), minlength=rows * columns)
    overlap = pairs.reshape(rows, columns).astype(np.float64)
    union = overlap.sum(axis=1, keepdims=True) + overlap.sum(axis=0, keepdims=True) - overlap
    ious: NDArray[np.float64] = overlap / np.maximum(union, 1)
    return ious[1:, 1:]


def matches(ious: NDArray[np.float64], threshold: float) -> tuple[int, int, int]:
    """(TP, FP, FN) at an IoU threshold of at least 0.5, above which a match is unique."""
    found = int(np.count_nonzero(ious > threshold))
    return found, ious.shape[0] - found, ious.shape[1] - found


def competition_metric(ious: NDArray[np.float64]) -> float:
    """Mean over the IoU thresholds of TP / (TP + FP + FN) for one image; 1 if it and its truth are empty."""
    scores = []
    for threshold in IOU_THRESHOLDS:
        counts = matches(ious, float(threshold))
        scores.append(counts[0] / sum(counts) if sum(counts) else 1.0)
    return float(np.mean(scores))
