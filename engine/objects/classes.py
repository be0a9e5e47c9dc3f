"""Say which outputs of a model tell the class of an object, such as the type of a cell, and what the classes are.

An object is of the class that most of its pixels are of.  This module knows cards; it does not know pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

from cellseg_batch.trainer.card import DECODER_OUTPUTS, NO_CLASS, Card


@dataclass(frozen=True)
class ClassRule:
    """The class map of a model.

    Attributes:
        names: name of each class, in the order of their codes 1, 2, ...
        colours: colour of each class, ``#rrggbb``.
        first: index of the first logit of the map; all that follow belong to it too.
        background: whether that one is of no class.
    """

    names: tuple[str, ...]
    colours: tuple[str, ...]
    first: int
    background: bool


def class_rule(card: Card) -> ClassRule | None:
    """Return the class map of a model; None if it has none."""
    if not card.classes:
        return None
    first = len(DECODER_OUTPUTS[card.decoder])
    names, colours = (tuple(getattr(one, field) for one in card.classes) for field in ("name", "colour"))
    return ClassRule(names, colours, first, card.decoded[first] == NO_CLASS)
