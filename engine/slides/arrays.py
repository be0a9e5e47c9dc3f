"""Present an array in memory as a slide of one level, for the Python API."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.errors import UsageError
from cellseg_batch.engine.slides.image_format import ImageFormat, Search
from cellseg_batch.engine.slides.slide import NUMBERS, Level, Slide, UnreadableImage

_RGB = (3, 4)


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
        pixels = np.asarray(pixels)
        if pixels.ndim not in (2, 3) or not pixels.size or not NUMBERS.fullmatch(pixels.dtype.name):
            raise UsageError(
                "array",
                expected="numbers with axes (Y, X) or (Y, X, C)",
                found=f"{pixels.dtype.name} of shape {pixels.shape}",
                remedy="choose one plane, and move the channels last",
            )
        self._pixels = pixels
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
