"""Read boxes plane by plane, for libraries that decode one plane at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.geometry import Box

COLOURS = "c"
"""Last axis of the pixels of a slide in colour, whose planes have red, green, blue in each pixel."""


class PlaneReader(ABC):
    """Pixels of a level, decoded when they are sliced; a library reads a box of a plane.

    Args:
        axes: axes of the slide: those of planes, then y, x, and c for colours.
    """

    def __init__(self, axes: str) -> None:
        self._axes = axes

    @abstractmethod
    def read_plane(self, plane: Mapping[str, int], box: Box) -> NDArray[Any]:
        """Read a box of a plane, (h, w) or (h, w, colours); several threads may do so at once.

        Args:
            plane: axis -> index for each axis before y.
            box: box in px of the level.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the file."""

    def __getitem__(self, index: tuple[slice, ...]) -> NDArray[Any]:
        """Decode the pixels in a slice along each axis."""
        first = self._axes.index("y")
        rows, columns = index[first : first + 2]
        box = Box(rows.start, columns.start, rows.stop, columns.stop)
        numbers = [range(part.start, part.stop) for part in index[:first]]
        planes = [self.read_plane(dict(zip(self._axes, at, strict=False)), box) for at in product(*numbers)]
        pixels = np.stack(planes) if len(planes) > 1 else planes[0]
        pixels = pixels.reshape(*map(len, numbers), *planes[0].shape)
        return pixels[..., index[-1]] if self._axes[-1] == COLOURS else pixels


def axes_of(lengths: Mapping[str, int], in_colour: bool) -> str:
    """Axes of a slide: those of t, z, c that are longer than 1, then y, x, and c for colours."""
    return "".join(axis for axis in "tzc" if lengths.get(axis, 1) > 1) + "yx" + COLOURS * in_colour
