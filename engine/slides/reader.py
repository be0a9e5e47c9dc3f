"""Pixels of one level of a slide, box by box, straight from its store; no cache."""

from __future__ import annotations

import warnings
from copy import copy
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.storage import LocalStore
from zarrs import ZarrsCodecPipeline

from cellseg_batch.engine.errors import ReadError
from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.machine import cores
from cellseg_batch.engine.slides.formats import format_of
from cellseg_batch.engine.slides.slide import Slide

# More threads than cores read no faster, and each keeps freed memory of its own.
zarr.config.set({"threading.max_workers": min(32, cores())})

# Of codecs that zarrs leaves to zarr.
warnings.filterwarnings("ignore", message="Array is unsupported by ZarrsCodecPipeline")


class SlideReader:
    """Reads boxes of a level, as stored, for the chosen channels only.

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
        try:
            self.array: Any = format_of(slide).open_level(slide, level)
        except ReadError:
            raise
        except Exception as error:
            raise _unreadable(slide, "its pixels", error) from error

    def __enter__(self) -> SlideReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        format_of(self.slide).close(self.array)

    def of_channels(self, channels: tuple[int, ...]) -> SlideReader:
        """A reader of other channels of the same open level."""
        other = copy(self)
        other.channels = channels
        return other

    def read(self, plane: int, box: Box) -> NDArray[Any]:
        """Pixels of ``box`` in t/z plane number ``plane``: (C, h, w) in any memory layout.

        Raises:
            ReadError: a chunk is missing its data, damaged or of an unknown codec.
        """
        axes = self.slide.axes
        rows, columns = box.shifted(self.slide.levels[self.level].origin).slices()
        # Neighbouring channels are one slice, which every store can read; a list of indices is not.
        channels = slice(self.channels[0], self.channels[-1] + 1)
        index = {"y": rows, "x": columns, "c": channels}
        # A number in place of a slice would be too much for zarrs.
        index |= {axis: slice(number, number + 1) for axis, number in self.slide.plane_index(self.level, plane).items()}
        try:
            _decode_in_rust(self.array)
            pixels = np.asarray(self.array[tuple(index[axis] for axis in axes)])
        except Exception as error:
            raise _unreadable(
                self.slide, f"plane {plane}, rows {box.y0}-{box.y1}, columns {box.x0}-{box.x1}", error
            ) from error
        kept = [axis for axis in axes if axis in "cyx"]
        pixels = _computable(pixels).reshape([pixels.shape[axes.index(axis)] for axis in kept])
        if "c" not in kept:
            return pixels.transpose([kept.index(axis) for axis in "yx"])[None]
        return pixels.transpose([kept.index(axis) for axis in "cyx"])


def _computable(pixels: NDArray[Any]) -> NDArray[Any]:
    """The pixels in a type that kernels are compiled for: native byte order, floats of 32 or 64 bits."""
    kind, size = pixels.dtype.kind, pixels.dtype.itemsize
    if kind == "f" and size not in (4, 8):
        return pixels.astype(np.float32 if size < 4 else np.float64)
    return pixels if pixels.dtype.isnative else pixels.astype(pixels.dtype.newbyteorder("="))


def _decode_in_rust(array: Any) -> None:
    """Have the next read of a local zarr array decoded by zarrs, if zarrs knows how.

    At 8192 px with chunks of 512 px reading takes a third less time and an int8 run 4 % less, as zarrs decodes all
    chunks of a read at once, without Python's lock.
    """
    local = isinstance(array, zarr.Array) and isinstance(array.store, LocalStore)
    if local and array.dtype.isnative and array.order == "C":
        # A pipeline keeps some 300 bytes for every chunk that it has read, so each read gets one of its own (30 µs).
        pipeline = ZarrsCodecPipeline.from_array_metadata_and_store(array.metadata, array.store)
        # zarr's public way to choose a pipeline is a setting of the whole process, and other threads open other stores.
        object.__setattr__(array.async_array, "codec_pipeline", pipeline)


def _unreadable(slide: Slide, where: str, error: Exception) -> ReadError:
    detail = (str(error) or type(error).__name__).splitlines()[0]
    return ReadError(
        slide.location,
        expected=f"readable pixels in {where}",
        found=f"{type(error).__name__}: {detail}",
        cause="a truncated or damaged file",
        remedy="copy or export it again; every other slide goes on",
    )
