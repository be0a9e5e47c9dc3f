"""Decode masks and instances from a network's logits for scoring, by the decoder of the model's card."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.segmentation import relabel_sequential, watershed

from cellseg_batch.trainer.card import Instances


def foreground_mask(logits: NDArray[np.float32], threshold: float) -> NDArray[np.bool_]:
    """Decode the mask (H, W) from logits (K, H, W); the foreground is the first output of every decoder.

    Args:
        logits: (K, H, W) logits of the image.
        threshold: probability above which a pixel is foreground.
    """
    mask: NDArray[np.bool_] = logits[0] > float(np.log(threshold / (1 - threshold)))
    return mask


def decode_instances(
    logits: NDArray[np.float32], decoder: str, threshold: float, rule: Instances, downscale: int = 1
) -> NDArray[np.int32]:
    """Decode the instances of one image.

    Args:
        logits: (K, H, W) logits of the image.
        decoder: name of the decoder in the model's card.
        threshold: probability above which a pixel is foreground.
        rule: rule for instances in the model's card.
        downscale: factor by which the image was downscaled for the model.

    Returns:
        (H, W) int32 ids, 0 for background.
    """
    probability = 0.5 * (1 + np.tanh(0.5 * logits))
    return DECODERS[decoder](probability, threshold, rule, downscale)


def _components(
    probability: NDArray[np.float32], threshold: float, rule: Instances, downscale: int
) -> NDArray[np.int32]:
    """Every connected component of the foreground is an instance."""
    return _number_seeds(probability[0] > threshold, rule.smallest_seed * downscale**2)


def _grown_seeds(
    probability: NDArray[np.float32], threshold: float, rule: Instances, downscale: int
) -> NDArray[np.int32]:
    """Seeds are the high parts of the seed map, and grow by a watershed."""
    foreground = probability[0] > threshold
    seed_map = ndimage.gaussian_filter(probability[2] - rule.border_weight * probability[1], rule.smoothing * downscale)
    seeds = _number_seeds(foreground & (seed_map > rule.seed_level), rule.smallest_seed * downscale**2)
    labels: NDArray[np.int32] = watershed(-seed_map, seeds, mask=foreground)
    return labels


def _components_of_classes(
    probability: NDArray[np.float32], threshold: float, rule: Instances, downscale: int
) -> NDArray[np.int32]:
    """Every connected component of what is likelier some class than background is an instance."""
    return _number_seeds(probability[1:].max(axis=0) > probability[0], rule.smallest_seed * downscale**2)


DECODERS: dict[str, Callable[[NDArray[np.float32], float, Instances, int], NDArray[np.int32]]] = {
    "mask": _components,
    "seeds": _grown_seeds,
    "classes": _components_of_classes,
}
"""Name in a card -> function that decodes instances from probabilities (K, H, W); arguments as `decode_instances`."""


def _number_seeds(mask: NDArray[np.bool_], smallest: int) -> NDArray[np.int32]:
    """Number the 4-connected components of at least ``smallest`` px: (H, W) int32, 0 for background."""
    components = ndimage.label(mask)[0]
    seeds = np.where(np.bincount(components.ravel())[components] >= smallest, components, 0)
    numbered: NDArray[np.int32] = relabel_sequential(seeds)[0].astype(np.int32)
    return numbered
