"""List the heads: the outputs of a network, the loss that trains them, and the decoder of the trained model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cellseg_batch.trainer.card import DECODER_OUTPUTS
from cellseg_batch.trainer.losses import outline, sum_class_terms, sum_terms, touching_border

if TYPE_CHECKING:
    from cellseg_batch.trainer.augment import Batch


@dataclass(frozen=True)
class Head:
    """The meaning of a network's outputs.

    Attributes:
        name: name in a recipe.
        outputs: meaning of each logit, in the network's order; behind them are those of the classes, if it has any.
        loss: returns the loss from logits (N, K, S, S), the batch, and the names of terms in `losses.LOSSES`.
        decoder: decoder in the trained model's card, which takes these outputs; see `card.DECODER_OUTPUTS`.
        has_classes: whether the network tells the classes of the data apart.
    """

    name: str
    outputs: tuple[str, ...]
    loss: Callable[[Tensor, Batch, Sequence[str]], Tensor]
    decoder: str
    has_classes: bool = False


def _semantic_loss(logits: Tensor, batch: Batch, terms: Sequence[str]) -> Tensor:
    foreground = (batch.labels > 0).float()
    return sum_terms(terms, logits.float()[:, 0], foreground, torch.ones_like(foreground))


def _instance_loss(logits: Tensor, batch: Batch, terms: Sequence[str]) -> Tensor:
    """The terms of foreground and border, and a squared error of the distance, which counts most at borders.

    In the foreground's terms pixels between touching instances count five times, and those along outlines three times.
    """
    z = logits.float()
    foreground = (batch.labels > 0).float()
    border = touching_border(batch.labels).float()
    loss = sum_terms(terms, z[:, 0], foreground, 1 + 4 * border + 2 * outline(batch.labels).float())
    loss = loss + sum_terms(terms, z[:, 1], border, 1 + 2 * border)
    error = (z[:, 2].sigmoid() - batch.distance) ** 2
    return loss + 4 * (error * (1 + 4 * border + 2 * foreground)).mean()


def _class_loss(logits: Tensor, batch: Batch, terms: Sequence[str]) -> Tensor:
    return sum_class_terms(terms, logits.float(), batch.classes)


HEADS: dict[str, Head] = {
    head.name: head
    for head in (
        Head("semantic", ("foreground",), _semantic_loss, decoder="mask"),
        Head("instance", ("foreground", "border", "distance"), _instance_loss, decoder="seeds"),
        Head("classes", DECODER_OUTPUTS["classes"], _class_loss, decoder="classes", has_classes=True),
    )
}
"""Name in a recipe -> head."""
