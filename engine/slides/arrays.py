"""Present an array in memory as a slide of one level, for the Python API."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, NoReturn
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.errors import UsageError, brief
from cellseg_batch.engine.slides.image_format import ImageFormat, Search
from cellseg_batch.engine.slides.slide import NUMBERS, Level, Slide, UnreadableImage

_RGB = (3, 4)
# Cyclic staining and mass cytometry give up to a hundred.
_MOST_CHANNELS = 128


class Arrays(ImageFormat):
    """Format of arrays in memory; an array lives as long as its `HeldArray`, and in this process only."""

    name: ClassVar[str] = "array"
    title: ClassVar[str] = ""

    def can_open(self, path: Path) -> bool:
        """No path leads to an array."""
        return False

    def find(self, path: Path, name: str, search: Search) -> Iterable[Slide | UnreadableImage]:
        """No path leads to an array."""
        return ()

    def open_level(self, slide: Slide, level: int) -> NDArray[Any]:
        """The array itself, (Y, X) or (Y, X, C)."""
        return _held[slide.store]


class HeldArray:
    """An array that can be segmented as a slide for as long as the context lasts.

    Args:
        pixels: (Y, X), or (Y, X, C) with channels last; three or four channels of uint8 are red, green, blue and alpha.

    Raises:
        UsageError: the array is no image.
    """

    def __init__(self, pixels: NDArray[Any]) -> None:
        self._pixels = pixels = _as_image(pixels)
        rgb = pixels.ndim == 3 and pixels.shape[-1] in _RGB and pixels.dtype == np.uint8
        self.slide = Slide(
            name="array",
            store=Path(f"array-{uuid4().hex}"),
            path="",
            format=Arrays.name,
            axes="yxc"[: pixels.ndim],
            dtype=pixels.dtype.name,
            levels=(Level("0", pixels.shape, pixels.shape, (1.0,) * pixels.ndim, (0.0,) * pixels.ndim),),
            units=(None,) * pixels.ndim,
            rgb=rgb,
            alpha=rgb and pixels.shape[-1] == 4,
        )

    def __enter__(self) -> Slide:
        _held[self.slide.store] = self._pixels
        return self.slide

    def __exit__(self, *error: object) -> None:
        del _held[self.slide.store]


_held: dict[Path, NDArray[Any]] = {}


def _as_image(pixels: object) -> NDArray[Any]:
    """The pixels as an array of numpy.

    Raises:
        UsageError: they are no image.
    """
    try:
        array = np.asarray(pixels)
    except Exception as error:  # each library whose arrays are no arrays of numpy raises errors of its own
        _refuse("an array of numpy, or what numpy takes for one", brief(error), "convert it with numpy.asarray")
    if not NUMBERS.fullmatch(array.dtype.name):
        found = f"{array.dtype.name} of shape {array.shape}" if array.ndim else type(pixels).__name__
        _refuse("an array of integers, booleans or floats of up to 64 bits", found, "convert it with astype")
    if array.ndim not in (2, 3) or not array.size:
        remedy = "choose one plane, and move the channels last" if array.size else "check how it was cut"
        _refuse("pixels with axes (Y, X) or (Y, X, C)", f"shape {array.shape}", remedy)
    if array.ndim == 3 and _are_planes(*array.shape):
        remedy = "move the channels last, as numpy.moveaxis(array, 0, -1) does, or choose a plane of the stack"
        _refuse("axes (Y, X, C)", f"shape {array.shape}, {array.shape[-1]} channels", remedy)
    if np.ma.is_masked(pixels):
        _refuse("a value in every pixel", "a masked array", "fill it with pixels.filled(0), or its mean")
    return array


def _are_planes(height: int, width: int, channels: int) -> bool:
    """Whether an array with axes (Y, X, C) is more likely one with axes (C, Y, X) or (Z, Y, X)."""
    return channels > _RGB[-1] and (channels >= min(height, width) or channels > _MOST_CHANNELS)


def _refuse(expected: str, found: str, remedy: str) -> NoReturn:
    raise UsageError("array", expected=expected, found=found, remedy=remedy)
