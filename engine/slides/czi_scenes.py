"""List the scenes of a CZI file, and the layers of their pyramids, from the file's list of tiles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.geometry import Box

_SCENE = "S"
# Dimensions that do not tell planes apart: mosaic tiles, and blocks of an acquisition.
_NO_PLANES = ("M", "B", _SCENE)
# Length in px of the longer side of the picture in which gaps between tiles are looked for.
_COARSE = 1024


@dataclass(frozen=True)
class Tile:
    """A tile.

    Attributes:
        at: dimension -> index along it, for those that tell planes and scenes apart.
        box: box on the file's plane, in px of its full resolution.
        step: px of the full resolution along the side of one of its px.
    """

    at: Mapping[str, int]
    box: Box
    step: int

    def lies_in(self, plane: Mapping[str, int]) -> bool:
        """Whether it is a part of a plane."""
        return all(self.at.get(dimension, 0) == index for dimension, index in plane.items())


@dataclass(frozen=True)
class Scene:
    """A scene.

    Attributes:
        number: its number in the file; None if the file has no scenes.
        box: the box around it on the file's plane, in px of its full resolution.
        dimensions: dimension -> length along it.
        missing: number of planes that its dimensions promise, and the file lacks.
        layers: step -> tiles of the layers of its pyramid that cover it, the full resolution first.
        notes: remarks for the user on its tiles.
    """

    number: int | None
    box: Box
    dimensions: Mapping[str, int]
    missing: int
    layers: Mapping[int, list[Tile]]
    notes: tuple[str, ...]


def scenes_of(document: Any) -> list[Scene]:
    """The scenes of a file, from the list of its tiles; one without a number if it has none."""
    tiles: list[Tile] = []

    def add(_: int, tile: Any) -> bool:
        tiles.append(Tile(tile.coordinate.to_dict(), _box(tile.logicalRect), max(1, round(1 / tile.get_zoom()))))
        return True

    document.enumerate_subblocks(add)
    boxes = document.scenes_bounding_rectangle_no_pyramid or {None: document.total_bounding_rectangle_no_pyramid}
    return [
        _scene_of([tile for tile in tiles if number is None or tile.at.get(_SCENE) == number], number, _box(rectangle))
        for number, rectangle in sorted(boxes.items())
    ]


def _box(rectangle: Any) -> Box:
    return Box(rectangle.y, rectangle.x, rectangle.y + rectangle.h, rectangle.x + rectangle.w)


def _scene_of(tiles: list[Tile], number: int | None, box: Box) -> Scene:
    """A scene.

    Args:
        tiles: its tiles.
        number: its number in the file.
        box: the box around it on the file's plane.
    """
    layers: dict[int, list[Tile]] = {1: []}
    for tile in sorted(tiles, key=lambda tile: tile.step):
        layers.setdefault(tile.step, []).append(tile)
    names = sorted({name for tile in layers[1] for name in tile.at} - {*_NO_PLANES})

    def planes(layer: list[Tile]) -> set[tuple[int, ...]]:
        return {tuple(tile.at.get(name, 0) for name in names) for tile in layer}

    there = planes(layers[1])
    lengths = {name: max(indices) + 1 for name, indices in zip(names, zip(*there, strict=True), strict=True)}
    first = dict(zip(names, min(there), strict=True))
    covered = {step: _covered([t for t in layer if t.lies_in(first)], box, step) for step, layer in layers.items()}
    whole = {
        step: layer
        for step, layer in layers.items()
        if planes(layer) == there and not (covered[1] & ~covered[step]).any()
    }
    lost = [str(step) for step in layers if step not in whole]
    notes: tuple[str, ...] = () if covered[1].all() else ("its tiles leave gaps, which read as 0",)
    if lost:
        notes += (f"layers of its pyramid that lack tiles are left out: 1/{', 1/'.join(lost)} of its size",)
    return Scene(number, box, lengths, math.prod(lengths.values()) - len(there), whole, notes)


def _covered(tiles: list[Tile], around: Box, step: int) -> NDArray[np.bool_]:
    """Where tiles cover the box ``around`` them, in a picture of at most `_COARSE` px a side; lesser gaps are missed.

    Tiles may end less than ``step`` px before the box, as sides are rounded.
    """
    scale = max(1, -(-max(around.shape) // _COARSE))
    covered = np.zeros([-(-side // scale) for side in around.shape], bool)
    for tile in tiles:
        y0, x0, y1, x1 = (
            tile.box.y0 - around.y0,
            tile.box.x0 - around.x0,
            tile.box.y1 - around.y0,
            tile.box.x1 - around.x0,
        )
        rows = slice(max(0, y0) // scale, max(0, -(-(y1 + step - 1) // scale)))
        columns = slice(max(0, x0) // scale, max(0, -(-(x1 + step - 1) // scale)))
        covered[rows, columns] = True
    return covered
