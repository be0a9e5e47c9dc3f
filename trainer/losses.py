"""Compute targets and terms of losses, from which a head makes its loss.

All shapes are (N, S, S), but for the logits (N, K, S, S) of classes that exclude each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

_FOCUS = 2.0


def touching_border(labels: Tensor) -> Tensor:
    """Where a 5 x 5 px window holds pixels of two instances: the seam that separates neighbours; bool."""
    ids = labels.float()[:, None]
    nothing = float(ids.max()) + 1
    largest = _largest_near(ids)
    smallest = -_largest_near(-torch.where(ids > 0, ids, nothing))
    return ((largest > 0) & (smallest < largest))[:, 0]


def outline(labels: Tensor) -> Tensor:
    """Where a 5 x 5 px window holds foreground and background: the pixels on which masks usually err; bool."""
    foreground = (labels > 0).float()[:, None]
    return (_largest_near(foreground) + _largest_near(1 - foreground) > 1)[:, 0]


def _largest_near(values: Tensor) -> Tensor:
    """The largest value of each 5 x 5 px window."""
    return F.max_pool2d(F.max_pool2d(values, (5, 1), 1, (2, 0)), (1, 5), 1, (0, 2))


def bce_loss(z: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Binary cross-entropy, weighted per pixel."""
    return F.binary_cross_entropy_with_logits(z, target, weight=weight)


def focal_loss(z: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Cross-entropy times ``(1 - p of the truth) ** 2`` (Lin et al. 2017, arXiv:1708.02002), weighted per pixel."""
    truth = torch.where(target > 0, z, -z).sigmoid()
    return (weight * (1 - truth) ** _FOCUS * -truth.clamp(min=1e-6).log()).mean()


def dice_loss(z: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """One minus the mean soft Dice of the pictures (Milletari et al. 2016, arXiv:1606.04797); ignores the weights."""
    return _lack_of_overlap(z.sigmoid(), target)


def _lack_of_overlap(probability: Tensor, target: Tensor) -> Tensor:
    overlap = (probability * target).sum(dim=(1, 2))
    total = probability.sum(dim=(1, 2)) + target.sum(dim=(1, 2))
    return 1 - ((2 * overlap + 1) / (total + 1)).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "bce": bce_loss,
    "dice": dice_loss,
    "focal": focal_loss,
}
"""Name in a recipe -> loss of (logits, target, weight of each pixel), each (N, S, S)."""


def sum_terms(terms: Sequence[str], z: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The sum of ``terms`` of `LOSSES` for one output."""
    return torch.stack([LOSSES[term](z, target, weight) for term in terms]).sum()


def class_cross_entropy(z: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy of the softmax of ``z`` (N, K, S, S) and the true classes, from 0 to K - 1."""
    return F.cross_entropy(z, classes)


def class_focal(z: Tensor, classes: Tensor) -> Tensor:
    """`class_cross_entropy` times ``(1 - p of the truth) ** 2``, as `focal_loss`."""
    truth = z.log_softmax(dim=1).gather(1, classes[:, None])
    return -((1 - truth.exp()) ** _FOCUS * truth).mean()


def class_dice(z: Tensor, classes: Tensor) -> Tensor:
    """The mean over all classes of `dice_loss`, with the probabilities of a softmax."""
    probability = z.softmax(dim=1)
    parts = [_lack_of_overlap(probability[:, number], (classes == number).float()) for number in range(z.shape[1])]
    return torch.stack(parts).mean()


CLASS_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bce": class_cross_entropy,
    "dice": class_dice,
    "focal": class_focal,
}
"""Name in a recipe -> loss of (logits, true classes) that is its counterpart in `LOSSES` for several classes."""


def sum_class_terms(terms: Sequence[str], z: Tensor, classes: Tensor) -> Tensor:
    """The sum of ``terms`` of `CLASS_LOSSES`."""
    return torch.stack([CLASS_LOSSES[term](z, classes) for term in terms]).sum()
