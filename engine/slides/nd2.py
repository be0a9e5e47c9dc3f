"""Read ND2 files of Nikon with the library nd2: each position of the stage is an image of one level.

Sources: the documentation of nd2 (tlambert03.github.io/nd2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.errors import ReadError
from cellseg_batch.engine.geometry import Box
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

# nd2's letters of axes -> ours; S is colours. P, positions of the stage, are images.
_AXIS_OF = {"T": "t", "Z": "z", "C": "c", "Y": "y", "X": "x"}
_POSITIONS, _COLOURS = "P", "S"


class Nd2(ImageFormat):
    """Format of ND2. A frame has all channels of a plane; it is mapped into memory, or decoded whole if compressed."""

    name: ClassVar[str] = "nd2"
    title: ClassVar[str] = "ND2"
    suffixes: ClassVar[tuple[str, ...]] = (".nd2",)

    def find(self, path: Path, name: str, search: Search) -> Iterator[Slide | UnreadableImage]:
        """Find the positions of a file, from its metadata.

        Raises:
            ReadError: the library is not installed, or cannot read the file.
        """
        with reading_by("nd2", path), _open(path) as document:
            count = document.sizes.get(_POSITIONS, 1)
            for number in range(count):
                describe = partial(_describe, document, path, number, search)
                yield image_in_series(path, name, number, count, describe)

    def open_level(self, slide: Slide, level: int) -> PositionPixels:
        """Open the level, whose file stays open."""
        return PositionPixels(slide)

    def close(self, array: PositionPixels) -> None:
        """Close the file."""
        array.close()


class PositionPixels(PlaneReader):
    """Pixels of a position; a lock keeps threads apart while the library reads a frame.

    Args:
        slide: the position.
    """

    def __init__(self, slide: Slide) -> None:
        super().__init__(slide.axes)
        self._document, self._lock = _open(slide.store), Lock()
        self._position = slide.series or 0
        self._in_colour = slide.rgb
        self._last: tuple[int, NDArray[Any]] | None = None

    def read_plane(self, plane: Mapping[str, int], box: Box) -> NDArray[Any]:
        """Read a box of a plane."""
        at = {letter: plane.get(axis, 0) for letter, axis in _AXIS_OF.items()} | {_POSITIONS: self._position}
        number = 0
        for letter, length in _loops_of(self._document.sizes).items():
            number = number * length + at[letter]
        with self._lock:
            if self._last is None or self._last[0] != number:
                self._last = number, self._frame(number)
            frame = self._last[1]
            part = frame[0] if self._in_colour else frame[plane.get("c", 0), ..., 0]
            return np.array(part[box.slices()])

    def close(self) -> None:
        """Close the file, and forget the frame that is mapped into memory."""
        with self._lock:
            self._last = None
            self._document.close()

    def _frame(self, number: int) -> NDArray[Any]:
        """A frame, (channels, height, width, colours)."""
        about = self._document.attributes
        channels = about.channelCount or 1
        shape = channels, about.heightPx, about.widthPx, about.componentCount // channels
        frame: NDArray[Any] = self._document.read_frame(number).reshape(shape)
        if self._in_colour:
            return frame[..., ::-1]  # stored, and given by the library, with blue first
        # Components that are no colours are channels, too.
        return np.moveaxis(frame, -1, 1).reshape(-1, *shape[1:3], 1)


def _open(path: Path) -> Any:
    """A file, an ``nd2.ND2File``."""
    return optional_library("nd2", "cellseg-batch[nd2]").ND2File(local_file(path))


def _loops_of(sizes: Mapping[str, int]) -> dict[str, int]:
    """Letter -> length of the loops of an acquisition, which number its frames; the last runs fastest."""
    return {letter: length for letter, length in sizes.items() if letter not in ("C", "Y", "X", _COLOURS)}


def _describe(document: Any, path: Path, number: int, search: Search, name: str, inside: str) -> Slide:
    """The slide of a position.

    Raises:
        ReadError: it has axes that are none of a slide, several channels in colour, or frames are missing.
    """
    sizes, about = document.sizes, document.attributes
    in_colour = _COLOURS in sizes
    if not {*sizes} <= {*_AXIS_OF, _POSITIONS, _COLOURS} or (in_colour and "C" in sizes):
        raise ReadError(
            str(path),
            expected="axes out of t, c, z, y, x, with one channel in colour or several in grey",
            found=", ".join(f"{letter} ({length})" for letter, length in sizes.items()),
            remedy="export them apart",
        )
    frames = math.prod(_loops_of(sizes).values())
    if about.sequenceCount < frames:
        raise ReadError(
            str(path),
            expected=f"all {frames} frames that its loops promise",
            found=str(about.sequenceCount),
            cause="an acquisition that was stopped",
            remedy="export it again, with the frames that are there",
        )
    lengths = {axis: sizes.get(letter, 1) for letter, axis in _AXIS_OF.items()} | {"y": about.heightPx}
    lengths["x"] = about.widthPx
    axes = axes_of(lengths, in_colour)
    channels = getattr(document.metadata, "channels", None) or []
    volume = channels[0].volume if channels else None
    known = zip("xyz", volume.axesCalibration, volume.axesCalibrated, strict=True) if volume else ()
    size = settle_pixel_size({axis: (um, "µm") for axis, um, is_known in known if is_known and axis in axes})
    names = tuple(str(channel.channel.name) for channel in channels)
    # A compressed frame is decoded whole; of others, rows are read.
    rows = 1 if about.compressionType is None and not document.is_legacy else about.heightPx
    lengths |= {"c": 3} if in_colour else {}
    chunk = {"c": lengths["c"], "y": rows, "x": about.widthPx}
    shape, chunks = tuple(lengths[axis] for axis in axes), tuple(chunk.get(axis, 1) for axis in axes)
    level = Level("0", shape, chunks, tuple(size.um.get(axis, 1.0) for axis in axes), (0.0,) * len(axes))
    return Slide(
        name=name,
        store=path,
        path=inside,
        format=Nd2.name,
        axes=axes,
        dtype=document.dtype.name,
        levels=(level,),
        units=tuple("micrometer" if axis in size.um else None for axis in axes),
        channels=() if in_colour else names,
        rgb=in_colour,
        series=number,
        notes=search.check_axes(axes, str(path)) + size.notes,
    )
