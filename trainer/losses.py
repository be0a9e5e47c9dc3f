"""Compute the targets and the losses of training: foreground, touching border, distance.

All shapes are (N, S, S), except those of logits, (N, K, S, S) with K 1 or 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from cellseg_batch.trainer.augment import Batch

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
    probability = z.sigmoid()
    overlap = (probability * target).sum(dim=(1, 2))
    total = probability.sum(dim=(1, 2)) + target.sum(dim=(1, 2))
    return 1 - ((2 * overlap + 1) / (total + 1)).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "bce": bce_loss,
    "dice": dice_loss,
    "focal": focal_loss,
}
"""Name in a recipe -> loss of (logits, target, weight of each pixel), each (N, S, S)."""


def segmentation_loss(logits: Tensor, batch: Batch, terms: Sequence[str]) -> Tensor:
    """The sum of ``terms`` of `LOSSES` for the foreground and, with three outputs, for the border; distance added.

    With three outputs, pixels between touching instances count five times and those along outlines three times in the
    foreground's terms.  The distance adds a squared error, which counts most where instances touch.
    """
    z = logits.float()
    foreground = (batch.labels > 0).float()
    if z.shape[1] == 1:
        return _sum(terms, z[:, 0], foreground, torch.ones_like(foreground))
    border = touching_border(batch.labels).float()
    loss = _sum(terms, z[:, 0], foreground, 1 + 4 * border + 2 * outline(batch.labels).float())
    loss = loss + _sum(terms, z[:, 1], border, 1 + 2 * border)
    error = (z[:, 2].sigmoid() - batch.distance) ** 2
    return loss + 4 * (error * (1 + 4 * border + 2 * foreground)).mean()


def _sum(terms: Sequence[str], z: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return torch.stack([LOSSES[term](z, target, weight) for term in terms]).sum()
