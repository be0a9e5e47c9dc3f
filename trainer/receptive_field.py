"""What the outputs of a network can see, from what each column of an input changes.

This module needs no torch, as networks come as graphs too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Footprint:
    """What a network's output pixels can see.

    Attributes:
        total_stride: period in px with which the footprint repeats; tiles, cores and margins are multiples of it.
        exact_margin: smallest multiple of the total stride, in px, such that no output pixel of a core that
            lies on the stride's grid depends on a pixel further than this from the core; None if there is no such
            number.
        reason: why there is none; "" if there is one.
    """

    total_stride: int
    exact_margin: int | None
    reason: str = ""


def footprint_of(seen_by: Sequence[tuple[int, int]]) -> Footprint:
    """Return the footprint of a network along one axis.

    Args:
        seen_by: of the input column at each place in a stride, first to last: px from it to the first and to the last
            output column that sees it.
    """
    stride, margin = len(seen_by), 0
    for place, (before, after) in enumerate(seen_by):
        # The furthest core to the right that sees this column begins at core_start, to the left one ends at core_end.
        core_start = (place + after) // stride * stride
        core_end = (place + before) // stride * stride + stride
        margin = max(margin, core_start - place, place + 1 - core_end)
    return Footprint(stride, -(-margin // stride) * stride)
