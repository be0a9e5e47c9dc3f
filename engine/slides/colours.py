"""Tell whether the channels of an image are red, green and blue, by what OME's metadata say of them."""

from __future__ import annotations

import re
from collections.abc import Sequence

RGB = ("FF0000", "00FF00", "0000FF")
"""Colours of channels that are red, green and blue."""
TAKEN_FOR_RGB = "taken for red, green, blue, as its channels have no names; `channel` chooses one of them instead"
_NAMES = (["r", "g", "b"], ["red", "green", "blue"])
# What programs call a channel without a name.
_NUMBERED = re.compile(r"(channel|ch|c)?[\s:_-]*\d*([:_-]\d+)*", re.IGNORECASE)


def are_rgb(count: int, dtype: str, names: Sequence[str], colours: Sequence[str]) -> bool:
    """Whether channels are named so, or are three of uint8 without names in the colours `RGB`.

    Args:
        count: number of the channels, without alpha.
        dtype: numpy name of the pixel type.
        names: their names; () if they have none.
        colours: RRGGBB of each.
    """
    if are_named_rgb(names):
        return True
    unnamed = all(_NUMBERED.fullmatch(name) for name in names)
    return count == len(RGB) and dtype == "uint8" and unnamed and tuple(colours) == RGB


def are_named_rgb(names: Sequence[str]) -> bool:
    """Whether the names of the channels are red, green, blue, or their initials."""
    return [name.lower() for name in names] in _NAMES
