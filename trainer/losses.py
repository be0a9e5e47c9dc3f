"""Targets and losses: foreground, touching border, distance.

Shapes are (N, S, S) throughout, logits (N, 3, S, S).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cellseg_batch.trainer.augment import Batch

OUTPUTS = ("foreground", "border", "distance")


def touching_border(labels: Tensor) -> Tensor:
    """True where a 5 x 5 px window holds pixels of two instances: the seam that keeps neighbours apart."""
    ids = labels.float()[:, None]
    nothing = float(ids.max()) + 1
    largest = F.max_pool2d(ids, 5, 1, 2)
    smallest = -F.max_pool2d(-torch.where(ids > 0, ids, nothing), 5, 1, 2)
    return ((largest > 0) & (smallest < largest))[:, 0]


def _dice_loss(probability: Tensor, target: Tensor) -> Tensor:
    overlap = (probability * target).sum(dim=(1, 2))
    total = probability.sum(dim=(1, 2)) + target.sum(dim=(1, 2))
    return 1 - ((2 * overlap + 1) / (total + 1)).mean()


def segmentation_loss(logits: Tensor, batch: Batch) -> Tensor:
    """BCE + Dice for foreground and border, squared error for the distance; touching pixels count five times."""
    foreground = (batch.labels > 0).float()
    border = touching_border(batch.labels).float()
    weight = 1 + 4 * border
    z = logits.float()
    loss = F.binary_cross_entropy_with_logits(z[:, 0], foreground, weight=weight)
    loss = loss + _dice_loss(z[:, 0].sigmoid(), foreground)
    loss = loss + F.binary_cross_entropy_with_logits(z[:, 1], border, weight=1 + 2 * border)
    loss = loss + _dice_loss(z[:, 1].sigmoid(), border)
    return loss + 4 * ((z[:, 2].sigmoid() - batch.distance) ** 2 * (weight + 2 * foreground)).mean()
