"""Decode masks and instances from a network's logits for scoring, by the decoder of the model's card."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.segmentation import relabel_sequential, watershed

from cellseg_batch.trainer.card import Hover, Instances

Rule = Instances | Hover


def foreground_mask(logits: NDArray[np.float32], decoder: str, threshold: float) -> NDArray[np.bool_]:
    """Decode the mask (H, W) from logits (K, H, W).

    Args:
        logits: (K, H, W) logits of the image.
        decoder: name of the decoder in the model's card.
        threshold: probability above which a pixel is foreground.
    """
    return class_map(logits, threshold) > 0 if decoder == "classes" else _foreground(logits, threshold)


def class_map(logits: NDArray[np.float32], threshold: float) -> NDArray[np.uint8]:
    """Decode the classes (H, W) from logits (1 + K, H, W) of background and K classes; 0 is background.

    A pixel is of its likeliest class, unless that one's probability beside the background's is below the threshold.
    """
    classes = logits[1:]
    inside = classes.max(axis=0) - logits[0] > _logit(threshold)
    return np.where(inside, 1 + classes.argmax(axis=0), 0).astype(np.uint8)


def _foreground(logits: NDArray[np.float32], threshold: float) -> NDArray[np.bool_]:
    """The mask of all decoders but that of classes, whose first output is the foreground's."""
    mask: NDArray[np.bool_] = logits[0] > _logit(threshold)
    return mask


def _logit(probability: float) -> float:
    return float(np.log(probability / (1 - probability)))


def decode_instances(
    logits: NDArray[np.float32], decoder: str, threshold: float, rule: Rule, downscale: int = 1
) -> NDArray[np.int32]:
    """Decode the instances of one image.

    Args:
        logits: (K, H, W) logits, or maps, of the image: the outputs that the decoder takes.
        decoder: name of the decoder in the model's card.
        threshold: probability above which a pixel is foreground.
        rule: the decoder's rule for instances in the model's card.
        downscale: factor by which the image was downscaled for the model.

    Returns:
        (H, W) int32 ids, 0 for background.
    """
    return DECODERS[decoder](logits, threshold, rule, downscale)


def _components(logits: NDArray[np.float32], threshold: float, rule: Rule, downscale: int) -> NDArray[np.int32]:
    """Every connected component of the foreground is an instance."""
    return _number_seeds(_foreground(logits, threshold), rule.smallest_seed * downscale**2)


def _grown_seeds(logits: NDArray[np.float32], threshold: float, rule: Rule, downscale: int) -> NDArray[np.int32]:
    """Seeds are the high parts of the seed map, and grow by a watershed."""
    assert isinstance(rule, Instances)
    border, distance = 0.5 * (1 + np.tanh(0.5 * logits[1:3]))
    seed_map = ndimage.gaussian_filter(distance - rule.border_weight * border, rule.smoothing * downscale)
    return _grow(seed_map, _foreground(logits, threshold), rule, downscale)


def _grown_maps(logits: NDArray[np.float32], threshold: float, rule: Rule, downscale: int) -> NDArray[np.int32]:
    """Seeds are where the horizontal and the vertical map rise, and grow by a watershed.

    The Sobel kernel has 21 taps, as in Graham et al. 2019 (doi 10.1016/j.media.2019.101563).
    """
    smooth, slope = np.ones(1), np.array([-1.0, 1.0])
    for _ in range(20):
        smooth = np.convolve(smooth, [0.5, 0.5])
    for _ in range(19):
        slope = np.convolve(slope, [0.5, 0.5])
    slope /= np.abs(slope).sum()
    kernels = [np.zeros(20 * downscale + 1) for _ in range(2)]
    kernels[0][::downscale], kernels[1][::downscale] = smooth, slope
    maps = np.clip(logits[1:3].astype(np.float64), -1, 1)
    gradients = [
        ndimage.correlate1d(ndimage.correlate1d(values, kernels[1], axis), kernels[0], 1 - axis)
        for values, axis in zip(maps, (1, 0), strict=True)
    ]
    return _grow(np.minimum(*gradients), _foreground(logits, threshold), rule, downscale)


def _grow(
    seed_map: NDArray[np.floating], foreground: NDArray[np.bool_], rule: Rule, downscale: int
) -> NDArray[np.int32]:
    seeds = _number_seeds(foreground & (seed_map > rule.seed_level), rule.smallest_seed * downscale**2)
    labels: NDArray[np.int32] = watershed(-seed_map, seeds, mask=foreground)
    return labels


def _components_of_classes(
    logits: NDArray[np.float32], threshold: float, rule: Rule, downscale: int
) -> NDArray[np.int32]:
    """Every connected component of what is likelier some class than background is an instance."""
    return _number_seeds(class_map(logits, threshold) > 0, rule.smallest_seed * downscale**2)


DECODERS: dict[str, Callable[[NDArray[np.float32], float, Rule, int], NDArray[np.int32]]] = {
    "mask": _components,
    "seeds": _grown_seeds,
    "classes": _components_of_classes,
    "hover": _grown_maps,
}
"""Name in a card -> function that decodes instances; arguments as `decode_instances`."""


def _number_seeds(mask: NDArray[np.bool_], smallest: int) -> NDArray[np.int32]:
    """Number the 4-connected components of at least ``smallest`` px: (H, W) int32, 0 for background."""
    components = ndimage.label(mask)[0]
    seeds = np.where(np.bincount(components.ravel())[components] >= smallest, components, 0)
    numbered: NDArray[np.int32] = relabel_sequential(seeds)[0].astype(np.int32)
    return numbered
