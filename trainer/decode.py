"""Decode instances from a network's logits for scoring: seeds from distance and border, grown by a watershed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.segmentation import relabel_sequential, watershed

from cellseg_batch.trainer.bundle import Instances


def decode_instances(
    logits: NDArray[np.float32], threshold: float, rule: Instances, downscale: int = 1
) -> NDArray[np.int32]:
    """Decode the instances of one image.

    With three outputs (foreground, border, distance) seeds are the high parts of the seed map; with a single output,
    every connected component of the foreground is a seed.

    Args:
        logits: (K, H, W) logits of the image.
        threshold: probability above which a pixel is foreground.
        rule: rule for instances in the model's card.
        downscale: factor by which the image was downscaled for the model.

    Returns:
        (H, W) int32 ids, 0 for background.
    """
    probability = 0.5 * (1 + np.tanh(0.5 * logits))
    foreground: NDArray[np.bool_] = probability[0] > threshold
    if len(logits) == 1:
        return _number_seeds(foreground, rule.smallest_seed * downscale**2)
    seed_map = ndimage.gaussian_filter(probability[2] - rule.border_weight * probability[1], rule.smoothing * downscale)
    seeds = _number_seeds(foreground & (seed_map > rule.seed_level), rule.smallest_seed * downscale**2)
    labels: NDArray[np.int32] = watershed(-seed_map, seeds, mask=foreground)
    return labels


def _number_seeds(mask: NDArray[np.bool_], smallest: int) -> NDArray[np.int32]:
    """Number the 4-connected components of at least ``smallest`` px: (H, W) int32, 0 for background."""
    components = ndimage.label(mask)[0]
    seeds = np.where(np.bincount(components.ravel())[components] >= smallest, components, 0)
    numbered: NDArray[np.int32] = relabel_sequential(seeds)[0].astype(np.int32)
    return numbered
