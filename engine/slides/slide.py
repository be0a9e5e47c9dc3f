"""Describe an image by its metadata, before any of its pixels is read."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.slides.pixel_size import UM_PER_UNIT
from cellseg_batch.engine.slides.plate import PlatePosition

AXES = "tczyx"
# Names of the pixel types that can be segmented.
NUMBERS = re.compile(r"bool|u?int(8|16|32|64)|float(16|32|64)")


def fits_axes(axes: str, ndim: int) -> bool:
    """Whether ``axes`` names ``ndim`` different axes out of t, c, z, y, x, with y and x among them."""
    return len(axes) == len(set(axes)) == ndim and set("yx") <= set(axes) <= set(AXES)


def real_path(location: str) -> str:
    """A path on this machine with links followed; a URL as it is."""
    return location if "://" in location else os.path.realpath(location)


def unravel_plane(plane: int, grid: tuple[int, ...]) -> tuple[int, ...]:
    """Index of t/z plane number ``plane`` along each plane axis.

    Args:
        plane: number of the plane, in raster order.
        grid: length of each plane axis; () if the image has a single plane.
    """
    return tuple(int(index) for index in np.unravel_index(plane, grid))


@dataclass(frozen=True)
class Level:
    """A resolution of a slide.

    Attributes:
        path: path of a zarr array inside the slide's group; in other formats the number of the level.
        shape: length of each of the slide's axes in px.
        chunks: shape of a chunk, which is decoded as a whole.
        scale: size of a pixel along each axis, in the unit of the axis (µm for y and x if ``units`` says so).
        translation: position of the first pixel along each axis, in the same unit.
        origin: (y, x) of the level's first pixel among the stored pixels; other than (0, 0) only in a part of a slide.
    """

    path: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    scale: tuple[float, ...]
    translation: tuple[float, ...]
    origin: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Asked:
    """What the user asks for one image in place of the run's settings; None leaves it to them.

    Attributes:
        level: resolution to process.
        channel: name or index of the channel, as the setting ``channel``.
        pixel_size: µm per px of level 0.
        mask: region, or folder of regions.
    """

    level: int | None = None
    channel: str | None = None
    pixel_size: float | None = None
    mask: Path | None = None


@dataclass(frozen=True)
class Slide:
    """An image to segment.

    Attributes:
        name: path of the image below the user's input; the name of the input comes first.
        store: the file, or the outermost zarr hierarchy, that holds the image.
        path: path of the image inside its store; "" for the whole store.
        format: name of its `ImageFormat`; `formats.format_of` returns the format.
        axes: order of the array's axes, of the letters t c z y x.
        dtype: numpy name of the pixel type.
        levels: resolutions, the full resolution first.
        units: unit of each axis in the metadata; None if it has no unit.
        size_is_doubtful: the scale and unit of y or x are kept as written, but cannot be the size of a pixel.
        channels: names of the channels from the metadata; () if there are none.
        rgb: the first three channels are red, green, blue.
        alpha: the last channel is the opacity, which is no part of the image.
        series: number of the image in its file; None for formats whose files hold a single image.
        plate_position: position on a plate; None if the image lies on no plate.
        zarr_format: zarr version of the stored pixels; None if they are in no zarr array.
        holds_labels: whether labels can be written into the image's own group.
        notes: remarks for the user on what the image's metadata say and what is left out.
        parts: other files that hold planes of the image.
        asked: what the user asks for this image alone.
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
    alpha: bool = False
    series: int | None = None
    plate_position: PlatePosition | None = None
    zarr_format: Literal[2, 3] | None = None
    holds_labels: bool = False
    size_is_doubtful: bool = False
    notes: tuple[str, ...] = ()
    parts: tuple[Path, ...] = ()
    asked: Asked = Asked()

    @property
    def location(self) -> str:
        """Path of the image as a user would type it."""
        return str(self.store / self.path)

    @property
    def identity(self) -> str:
        """The image itself, whichever link leads to it: its location with links followed."""
        return real_path(self.location)

    @property
    def plane_axes(self) -> str:
        """The plane axes, along which planes are segmented separately: those of t and z that the image has."""
        return "".join(axis for axis in "tz" if axis in self.axes)

    def extent(self, axis: str, level: int) -> int:
        """Length of an axis in px at a level; 1 if the image does not have the axis."""
        return self.levels[level].shape[self.axes.index(axis)] if axis in self.axes else 1

    def plane_shape(self, level: int) -> tuple[int, int]:
        """(height, width) in px at a level."""
        return self.extent("y", level), self.extent("x", level)

    def plane_grid(self, level: int) -> tuple[int, ...]:
        """Length of each plane axis at a level."""
        return tuple(self.extent(axis, level) for axis in self.plane_axes)

    def planes(self, level: int) -> int:
        """Number of t/z planes at a level."""
        return math.prod(self.plane_grid(level))

    def plane_index(self, level: int, plane: int) -> dict[str, int]:
        """Plane axis -> index along it of t/z plane number ``plane``."""
        return dict(zip(self.plane_axes, unravel_plane(plane, self.plane_grid(level)), strict=True))

    def pixel_size_um(self, level: int) -> float | None:
        """µm per px along x at a level; None if the metadata do not say, or cannot be true."""
        if self.size_is_doubtful:
            return None
        index = self.axes.index("x")
        factor = UM_PER_UNIT.get(self.units[index] or "")
        return None if factor is None else self.levels[level].scale[index] * factor

    def pixel_aspect(self, level: int) -> float:
        """Height of a pixel divided by its width at a level; 1 for less than 1 % of difference, or if it is unknown."""
        factors = [UM_PER_UNIT.get(self.units[self.axes.index(axis)] or "") for axis in "yx"]
        if self.size_is_doubtful or None in factors:
            return 1.0
        height, width = (
            self.levels[level].scale[self.axes.index(axis)] * (factor or 1.0)
            for axis, factor in zip("yx", factors, strict=True)
        )
        return 1.0 if math.isclose(height, width, rel_tol=0.01) else height / width

    def channel_names(self, indices: Iterable[int]) -> tuple[str, ...]:
        """Names of the channels at ``indices``; a channel without a name gets its index as text."""
        return tuple(self.channels[index] if index < len(self.channels) else str(index) for index in indices)

    def cropped(self, level: int, box: Box) -> Slide:
        """The part of this slide in ``box``, given in px of ``level``: a slide like any other, with every level."""
        shape = self.plane_shape(level)
        return replace(self, levels=tuple(self._crop(resolution, shape, box) for resolution in self.levels))

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


@dataclass(frozen=True)
class UnreadableImage:
    """A file or node that looks like an image but cannot be used as one.

    Attributes:
        name: name as `Slide.name`.
        path: location of the file or node.
        reason: why it cannot be used, in one line.
        plate_position: position on a plate, None if on no plate; an unreadable well has a position without a field.
    """

    name: str
    path: str
    reason: str
    plate_position: PlatePosition | None = None

    @property
    def identity(self) -> str:
        """As `Slide.identity`."""
        return real_path(self.path)
