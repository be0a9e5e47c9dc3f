"""Read PNG and JPEG files, which are small enough to be read whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cellseg_batch.engine.slides.image_format import ImageFormat, Search
from cellseg_batch.engine.slides.slide import Level, Slide
from cellseg_batch.engine.storage.paths import readable

# Pillow refuses pictures above 179 Mpx as a possible attack; a slide may be larger.
Image.MAX_IMAGE_PIXELS = 1 << 30
_MODES_KEPT = {"L": "uint8", "RGB": "uint8", "RGBA": "uint8", "I;16": "uint16", "F": "float32", "I": "int32"}


class Pictures(ImageFormat):
    """Format of pictures: a file holds one image with one level and without a pixel size."""

    name: ClassVar[str] = "picture"
    title: ClassVar[str] = "PNG, JPEG"
    suffixes: ClassVar[tuple[str, ...]] = (".png", ".jpg", ".jpeg")

    def find(self, path: Path, name: str, search: Search) -> list[Slide]:
        """Find the image of a file, from its header.

        Raises:
            OSError: the file has not the format that its name says.
        """
        with Image.open(readable(path)) as picture:
            width, height = picture.size
            mode = _mode(picture)
        colour = mode in ("RGB", "RGBA")
        shape = (height, width, len(mode)) if colour else (height, width)
        axes = "yxc" if colour else "yx"
        level = Level("0", shape, shape, (1.0,) * len(shape), (0.0,) * len(shape))
        units = (None,) * len(shape)
        return [Slide(name, path, "", self.name, axes, _MODES_KEPT[mode], (level,), units, rgb=colour)]

    def open_level(self, slide: Slide, level: int) -> NDArray[Any]:
        """Read all pixels, (H, W) or (H, W, C)."""
        with Image.open(readable(slide.store)) as picture:
            return np.asarray(picture.convert(_mode(picture)))


def _mode(picture: Image.Image) -> str:
    """Pillow's mode to read a picture in: palettes, bilevel and CMYK become RGB or grey."""
    if picture.mode in _MODES_KEPT:
        return picture.mode
    return "L" if picture.mode in ("1", "LA") else "RGB"
