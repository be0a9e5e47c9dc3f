"""Instances from a network's logits, for scoring: seeds from distance and border, grown by a watershed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.segmentation import relabel_sequential, watershed


@dataclass(frozen=True)
class Decoding:
    """How logits become instances.

    Attributes:
        threshold: probability above which a pixel is foreground.
        border_weight: how much of the border's probability is taken off the distance.
        smoothing: standard deviation in px of the Gaussian over the seed map.
        seed_threshold: of the smoothed seed map.
        smallest: instances of fewer pixels are dropped.
    """

    threshold: float = 0.5
    border_weight: float = 0.75
    smoothing: float = 1.4
    seed_threshold: float = 0.25
    smallest: int = 20


def decode_instances(logits: NDArray[np.float32], decoding: Decoding) -> NDArray[np.int32]:
    """Instance map (H, W) int32, 0 background, from logits (K, H, W).

    With three outputs (foreground, border, distance) seeds are the cores of the distance map; with one, every
    connected component of the foreground is an instance.
    """
    probability = 0.5 * (1 + np.tanh(0.5 * logits))
    foreground = probability[0] > decoding.threshold
    if len(logits) == 1:
        labels = ndimage.label(foreground)[0]
    else:
        seed_map = ndimage.gaussian_filter(probability[2] - decoding.border_weight * probability[1], decoding.smoothing)
        seeds = ndimage.label(seed_map > decoding.seed_threshold)[0]
        labels = watershed(-seed_map, seeds, mask=foreground)
    sizes = np.bincount(labels.ravel())
    kept: NDArray[np.int32] = np.where(sizes[labels] >= decoding.smallest, labels, 0).astype(np.int32)
    numbered: NDArray[np.int32] = relabel_sequential(kept)[0].astype(np.int32)
    return numbered
