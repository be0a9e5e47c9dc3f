"""Read CZI files of ZEISS with pylibCZIrw: each scene is an image, each layer of its pyramid a level.

Sources: the documentation of pylibCZIrw and libCZI (github.com/ZEISS); the XML of CZI files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.errors import ReadError
from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.slides.czi_scenes import Scene, scenes_of
from cellseg_batch.engine.slides.image_format import (
    ImageFormat,
    Search,
    image_in_series,
    local_file,
    optional_library,
    reading_by,
)
from cellseg_batch.engine.slides.pixel_size import settle_pixel_size
from cellseg_batch.engine.slides.planes import PlaneReader, axes_of
from cellseg_batch.engine.slides.slide import Level, Slide, UnreadableImage

# pylibCZIrw's names of pixel types -> numpy's. Those in colour have blue first.
_GREY = {"Gray8": "uint8", "Gray16": "uint16", "Gray32Float": "float32"}
_COLOUR = {"Bgr24": "uint8", "Bgr48": "uint16", "Bgr96Float": "float32"}
# Our axes -> CZI's; others, such as angles, are no axes of a slide.
_DIMENSION = {"t": "T", "z": "Z", "c": "C"}


class Czi(ImageFormat):
    """Format of CZI; a scene is read by boxes, from the layer of its pyramid that has the size of the level."""

    name: ClassVar[str] = "czi"
    title: ClassVar[str] = "CZI"
    suffixes: ClassVar[tuple[str, ...]] = (".czi",)

    def find(self, path: Path, name: str, search: Search) -> Iterator[Slide | UnreadableImage]:
        """Find the scenes of a file, from its metadata and its list of tiles.

        Raises:
            ReadError: the library is not installed, or cannot read the file.
        """
        with reading_by("pylibCZIrw", path), _open(path) as document:
            facts = _facts_of(document)
            scenes = scenes_of(document)
        for number, scene in enumerate(scenes):
            describe = partial(_describe, scene, facts, path, number, search)
            yield image_in_series(path, name, number, len(scenes), describe)

    def open_level(self, slide: Slide, level: int) -> ScenePixels:
        """Open a level, whose file stays open."""
        return ScenePixels(slide, level)

    def close(self, array: ScenePixels) -> None:
        """Close the file."""
        array.close()


class ScenePixels(PlaneReader):
    """Pixels of a level of a scene; a lock keeps threads apart, as pylibCZIrw does not say that they may meet.

    Args:
        slide: the scene.
        level: number of the level.
    """

    def __init__(self, slide: Slide, level: int) -> None:
        super().__init__(slide.axes)
        self._stack, self._lock = ExitStack(), Lock()
        self._document = self._stack.enter_context(_open(slide.store))
        self._scene = scenes_of(self._document)[slide.series or 0]
        self._step = int(slide.levels[level].path)
        self._form = slide.dtype, (3,) * slide.rgb

    def read_plane(self, plane: Mapping[str, int], box: Box) -> NDArray[Any]:
        """Read a box of a plane; gaps between its tiles are 0."""
        corner = self._scene.box
        at = {_DIMENSION[axis]: number for axis, number in plane.items()}
        if self._step == 1:
            return self._read(at, box.shifted((corner.y0, corner.x0)))
        # Where tiles of a lower layer meet, the library may lose a row by rounding, and which depends on the box. So
        # each is read by itself and whole, as it is decoded.
        dtype, colours = self._form
        pixels = np.zeros((*box.shape, *colours), dtype)
        for tile in self._scene.layers[self._step]:
            origin = (tile.box.y0 - corner.y0) // self._step, (tile.box.x0 - corner.x0) // self._step
            height, width = (side // self._step for side in tile.box.shape)
            whole = Box(0, 0, height, width).shifted(origin)
            common = whole.within(box)
            if common.area and tile.lies_in(at):
                part = self._read(at, tile.box)
                pixels[common.seen_from(box).slices()] = part[common.seen_from(whole).slices()]
        return pixels

    def _read(self, at: Mapping[str, int], box: Box) -> NDArray[Any]:
        """Read a box of the file's plane, in px of its full resolution."""
        roi = box.x0, box.y0, box.x1 - box.x0, box.y1 - box.y0
        with self._lock:
            pixels: NDArray[Any] = self._document.read(roi=roi, plane=at, scene=self._scene.number, zoom=1 / self._step)
        return pixels[..., ::-1] if pixels.shape[-1] == 3 else pixels[..., 0]

    def close(self) -> None:
        """Close the file."""
        self._stack.close()


@dataclass(frozen=True)
class _Facts:
    """What the metadata of a file say about all its scenes.

    Attributes:
        stated: axis -> (size of a pixel, unit), as written.
        channels: names of the channels; () if they have none.
        types: pylibCZIrw's names of the pixel types of the channels.
    """

    stated: Mapping[str, tuple[object, object]]
    channels: tuple[str, ...]
    types: tuple[str, ...]


def _open(path: Path) -> Any:
    """Context of a file, a ``pylibCZIrw.czi.CziReader``."""
    return optional_library("pylibCZIrw.czi", "cellseg-batch[czi]").open_czi(local_file(path))


def _facts_of(document: Any) -> _Facts:
    root = ElementTree.fromstring(document.raw_metadata)
    sizes = {
        item.get("Id", "").lower(): (item.findtext("Value"), "m") for item in root.iterfind(".//Scaling//Distance")
    }
    listed = root.iterfind("./Metadata/Information/Image/Dimensions/Channels/Channel")
    names = tuple(channel.get("Name", "") for channel in listed)
    types = document.pixel_types
    return _Facts(
        {axis: size for axis, size in sizes.items() if axis in "xyz"},
        names if any(names) else (),
        tuple(types[channel] for channel in sorted(types)),
    )


def _describe(scene: Scene, facts: _Facts, path: Path, number: int, search: Search, name: str, inside: str) -> Slide:
    """The slide of a scene.

    Raises:
        ReadError: its planes differ in more than t, c and z, some are missing, or its channels differ in type.
    """
    others = {name: length for name, length in scene.dimensions.items() if name not in _DIMENSION.values()}
    if any(length > 1 for length in others.values()):
        raise ReadError(
            str(path),
            expected="axes out of t, c, z, y, x",
            found=f"dimensions of CZI {', '.join(f'{name} ({length})' for name, length in others.items())}",
            cause="angles, phases or views of one object",
            remedy="export one of them, or a fusion of all",
        )
    if scene.missing:
        raise ReadError(
            str(path),
            expected=f"all {math.prod(scene.dimensions.values())} planes that its dimensions promise",
            found=f"{scene.missing} missing",
            cause="an acquisition that was stopped, or a part of a file",
            remedy="export it again",
        )
    lengths = {axis: scene.dimensions.get(dimension, 1) for axis, dimension in _DIMENSION.items()}
    channels = lengths["c"]
    types = {*facts.types[:channels]}
    in_colour = types <= _COLOUR.keys()
    dtype = ({**_GREY, **_COLOUR}).get(min(types))
    if dtype is None or len(types) > 1 or (in_colour and channels > 1):
        raise ReadError(
            str(path),
            expected="grey channels of one type, or one channel in colour",
            found=f"{channels} of {', '.join(sorted(types))}",
            remedy="export the channels apart, or in one type",
        )
    axes = axes_of(lengths, in_colour)
    size = settle_pixel_size({axis: facts.stated[axis] for axis in axes if axis in facts.stated})
    colours = {"c": 3} if in_colour else {}
    levels = []
    for step, tiles in scene.layers.items():
        sides = dict(zip("yx", (max(1, side // step) for side in scene.box.shape), strict=True))
        tile = dict(zip("yx", np.max([tile.box.shape for tile in tiles], axis=0).tolist(), strict=True))
        chunk = {axis: min(tile[axis] // step, sides[axis]) for axis in "yx"} | colours
        shape = {**lengths, **sides, **colours}
        scale = tuple(size.um.get(axis, 1.0) * (step if axis in "yx" else 1) for axis in axes)
        sizes = tuple(shape[axis] for axis in axes), tuple(chunk.get(axis, 1) for axis in axes)
        levels.append(Level(str(step), *sizes, scale, (0.0,) * len(axes)))
    notes = scene.notes + search.check_axes(axes, str(path))
    return Slide(
        name=name,
        store=path,
        path=inside,
        format=Czi.name,
        axes=axes,
        dtype=dtype,
        levels=tuple(levels),
        units=tuple("micrometer" if axis in size.um else None for axis in axes),
        channels=() if in_colour else facts.channels[:channels],
        rgb=in_colour,
        series=number,
        notes=(*notes, *size.notes),
    )
