"""What is known about one image before any of its pixels is read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.slides.plate import PlatePosition

AXES = "tczyx"
# Names of the pixel types that can be segmented.
NUMBERS = re.compile(r"bool|u?int(8|16|32|64)|float(16|32|64)")


def fits_axes(axes: str, ndim: int) -> bool:
    """Whether ``axes`` names ``ndim`` different axes out of t, c, z, y, x, with y and x among them."""
    return len(axes) == len(set(axes)) == ndim and set("yx") <= set(axes) <= set(AXES)


def unravel_plane(plane: int, grid: tuple[int, ...]) -> tuple[int, ...]:
    """Index of t/z plane number ``plane`` along each plane axis.

    Args:
        plane: counted in raster order.
        grid: length of each plane axis, () where there is but one plane.
    """
    return tuple(int(index) for index in np.unravel_index(plane, grid))


@dataclass(frozen=True)
class Level:
    """One resolution of a slide.

    Attributes:
        path: path of a zarr array inside the slide's group; elsewhere the number of the level.
        shape: length of each of the slide's axes in px.
        chunks: shape of what is decoded as a whole.
        scale: size of a pixel along each axis, in the axis' unit (µm for y and x where ``units`` says so).
        translation: position of the first pixel along each axis, in the same unit.
        origin: (y, x) of the stored pixel that is the level's first; not (0, 0) in a part of a slide only.
    """

    path: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    scale: tuple[float, ...]
    translation: tuple[float, ...]
    origin: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Slide:
    """One image to segment.

    Attributes:
        name: its path below the input that the user gave, the input's own name first.
        store: the file, or the outermost zarr hierarchy, that holds it.
        path: path of the image inside its store, "" for the whole store.
        format: name of its `ImageFormat`; `formats.format_of` looks that up.
        axes: order of the array's axes, of the letters t c z y x.
        dtype: numpy name of the pixel type.
        levels: full resolution first.
        units: unit of each axis in the metadata, None where there is none.
        channels: names from the metadata, () when there are none.
        rgb: the channels are red, green, blue (and perhaps alpha).
        series: number of the image in a file of several.
        plate_position: where it lies on a plate, None if it does not.
        zarr_format: version of zarr that its pixels are stored in, None if they are in no zarr array.
        holds_labels: whether labels can be written into the image's own group.
    """

    name: str
    store: Path
    path: str
    format: str
    axes: str
    dtype: str
    levels: tuple[Level, ...]
    units: tuple[str | None, ...]
    channels: tuple[str, ...] = ()
    rgb: bool = False
    series: int = 0
    plate_position: PlatePosition | None = None
    zarr_format: Literal[2, 3] | None = None
    holds_labels: bool = False

    @property
    def location(self) -> str:
        """Path of the image as a user would type it."""
        return str(self.store / self.path)

    @property
    def plane_axes(self) -> str:
        """The axes that are segmented plane by plane: t and z, as far as there are any, in this order."""
        return "".join(axis for axis in "tz" if axis in self.axes)

    def extent(self, axis: str, level: int) -> int:
        """Length of an axis in pixels at a level, 1 if the image does not have it."""
        return self.levels[level].shape[self.axes.index(axis)] if axis in self.axes else 1

    def plane_shape(self, level: int) -> tuple[int, int]:
        """(height, width) in px at a level."""
        return self.extent("y", level), self.extent("x", level)

    def plane_grid(self, level: int) -> tuple[int, ...]:
        """Length of each of the plane axes at a level."""
        return tuple(self.extent(axis, level) for axis in self.plane_axes)

    def planes(self, level: int) -> int:
        """Number of t/z planes at a level."""
        return math.prod(self.plane_grid(level))

    def plane_index(self, level: int, plane: int) -> dict[str, int]:
        """Index of t/z plane number ``plane`` along each of the plane axes."""
        return dict(zip(self.plane_axes, unravel_plane(plane, self.plane_grid(level)), strict=True))

    def pixel_size_um(self, level: int) -> float | None:
        """µm per px along x, None when the metadata do not say."""
        index = self.axes.index("x")
        factor = _UM_PER_UNIT.get(self.units[index] or "")
        return None if factor is None else self.levels[level].scale[index] * factor

    def channel_names(self, indices: Iterable[int]) -> tuple[str, ...]:
        """Names of some channels; the indices as text of those that have none."""
        return tuple(self.channels[index] if index < len(self.channels) else str(index) for index in indices)

    def cropped(self, level: int, box: Box) -> Slide:
        """The part of this slide that ``box``, in px of ``level``, shows: a slide like any other, with every level."""
        shape = self.plane_shape(level)
        return replace(self, levels=tuple(self._crop(other, shape, box) for other in self.levels))

    def first_plane(self) -> Slide:
        """The first t/z plane of this slide: a slide like any other."""

        def shape(level: Level) -> tuple[int, ...]:
            return tuple(1 if axis in "tz" else length for axis, length in zip(self.axes, level.shape, strict=True))

        return replace(self, levels=tuple(replace(level, shape=shape(level)) for level in self.levels))

    def _crop(self, level: Level, shape: tuple[int, int], box: Box) -> Level:
        sides, translation = list(level.shape), list(level.translation)
        origin = dict(zip("yx", level.origin, strict=True))
        for axis, length, start, side in zip("yx", shape, (box.y0, box.x0), box.shape, strict=True):
            index = self.axes.index(axis)
            first = start * level.shape[index] // length
            sides[index] = min(max(1, round(side * level.shape[index] / length)), level.shape[index] - first)
            translation[index] += first * level.scale[index]
            origin[axis] += first
        return replace(level, shape=tuple(sides), translation=tuple(translation), origin=(origin["y"], origin["x"]))


_UM_PER_UNIT = {
    "micrometer": 1.0,
    "nanometer": 1e-3,
    "millimeter": 1e3,
    "centimeter": 1e4,
    "meter": 1e6,
    "inch": 25400.0,
}


@dataclass(frozen=True)
class UnreadableImage:
    """A file or node that looks like an image but cannot be used as one.

    Attributes:
        name: its name as `Slide.name`.
        path: where it lies.
        reason: why it cannot be used, one line.
        plate_position: where it lies on a plate; a well that cannot be read has no field's name.
    """

    name: str
    path: str
    reason: str
    plate_position: PlatePosition | None = None
