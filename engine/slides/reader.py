"""Read pixels of a level of a slide box by box, straight from its store; only a small plane is kept."""

from __future__ import annotations

from copy import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.errors import ReadError
from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.slides.formats import format_of
from cellseg_batch.engine.slides.slide import Slide
from cellseg_batch.engine.slides.zarr_codecs import use_zarrs

# A plane of up to this many values is kept once it was read as a whole: it is sampled, looked at and segmented.
_SMALL = 1 << 22


class SlideReader:
    """Reader of boxes of a level, as stored, for the chosen channels only.

    Args:
        slide: the image.
        level: number of the level.
        channels: indices of the channels to read.

    Raises:
        ReadError: the level cannot be opened.
    """

    def __init__(self, slide: Slide, level: int, channels: tuple[int, ...]) -> None:
        self.slide = slide
        self.level = level
        self.channels = channels
        self._kept: tuple[int, NDArray[Any]] | None = None
        try:
            self.array: Any = format_of(slide).open_level(slide, level)
        except ReadError:
            raise
        except Exception as error:
            raise _unreadable(slide, f"level {level}", error) from error

    def __enter__(self) -> SlideReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        format_of(self.slide).close(self.array)

    def of_channels(self, channels: tuple[int, ...]) -> SlideReader:
        """A reader of other channels of the same open level."""
        reader = copy(self)
        reader.channels = channels
        reader._kept = self._kept if channels == self.channels else None
        return reader

    def read(self, plane: int, box: Box) -> NDArray[Any]:
        """Read the pixels of ``box`` in t/z plane number ``plane``: (C, h, w) in any memory layout.

        Raises:
            ReadError: the data of a chunk are missing, damaged or of an unknown codec.
        """
        kept = self._kept  # another thread may replace it meanwhile
        if kept is not None and kept[0] == plane:
            return kept[1][:, *box.slices()]
        pixels = self.decode(plane, box)
        if pixels.size <= _SMALL and box.shape == self.slide.plane_shape(self.level):
            self._kept = plane, pixels
        return pixels

    def decode(self, plane: int, box: Box) -> NDArray[Any]:
        """Read pixels from the store, as `read`, even if the plane is kept."""
        axes = self.slide.axes
        rows, columns = box.shifted(self.slide.levels[self.level].origin).slices()
        # Channels are read as a slice, because not every store can read a list of indices.
        first = min(self.channels)
        channels = slice(first, max(self.channels) + 1)
        index = {"y": rows, "x": columns, "c": channels}
        # A plane is a slice of length 1, because zarrs cannot index by a number.
        index |= {axis: slice(number, number + 1) for axis, number in self.slide.plane_index(self.level, plane).items()}
        try:
            use_zarrs(self.array)
            pixels = np.asarray(self.array[tuple(index[axis] for axis in axes)])
        except Exception as error:
            raise _unreadable(
                self.slide, f"plane {plane}, rows {box.y0}-{box.y1}, columns {box.x0}-{box.x1}", error
            ) from error
        image_axes = [axis for axis in axes if axis in "cyx"]
        pixels = _computable(pixels).reshape([pixels.shape[axes.index(axis)] for axis in image_axes])
        if "c" not in image_axes:
            return pixels.transpose([image_axes.index(axis) for axis in "yx"])[None]
        pixels = pixels.transpose([image_axes.index(axis) for axis in "cyx"])
        wanted = [channel - first for channel in self.channels]
        return pixels if wanted == list(range(len(pixels))) else pixels[wanted]


def _computable(pixels: NDArray[Any]) -> NDArray[Any]:
    """Convert pixels to a type that the kernels are compiled for: native byte order, floats of 32 or 64 bits."""
    kind, size = pixels.dtype.kind, pixels.dtype.itemsize
    if kind == "f" and size not in (4, 8):
        return pixels.astype(np.float32 if size < 4 else np.float64)
    return pixels if pixels.dtype.isnative else pixels.astype(pixels.dtype.newbyteorder("="))


def _unreadable(slide: Slide, where: str, error: Exception) -> ReadError:
    detail = (str(error) or type(error).__name__).splitlines()[0]
    return ReadError(
        slide.location,
        expected=f"readable pixels in {where}",
        found=f"{type(error).__name__}: {detail}",
        cause="a truncated or damaged file",
        remedy="copy or export it again; every other slide goes on",
    )
