"""Read PNG, JPEG and BMP files, which are small enough to be read whole.

Pixels are taken as stored: a rotation in the EXIF metadata is left to viewers, for image and labels alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.MpoImagePlugin import MpoImageFile

from cellseg_batch.engine.errors import ReadError
from cellseg_batch.engine.slides.image_format import WRITTEN_BY, ImageFormat, Search, optional_library
from cellseg_batch.engine.slides.slide import Level, Slide, UnreadableImage
from cellseg_batch.engine.storage.paths import readable

# Pillow refuses pictures above 179 Mpx as a possible attack; a slide may be larger.
Image.MAX_IMAGE_PIXELS = 1 << 30
# Pillow's modes in which pictures are read -> pixel type.
_MODES_KEPT = {"L": "uint8", "RGB": "uint8", "RGBA": "uint8", "I;16": "uint16", "F": "float32", "I": "int32"}
# MIME types of the pictures that are read; of others Pillow may keep 8 bits of 16.
_KINDS = ("image/png", "image/apng", "image/jpeg", "image/mpo", "image/bmp")
_PNG = b"\x89PNG\r\n\x1a\n"
# Colour types of PNGs of which Pillow keeps 8 of 16 bits -> the mode of their channels, without the alpha of grey.
_DEEP_MODES = {2: "RGB", 4: "L", 6: "RGBA"}


class Pictures(ImageFormat):
    """Format of pictures: a file holds one image with one level and without a pixel size."""

    name: ClassVar[str] = "picture"
    title: ClassVar[str] = "PNG, JPEG, BMP"
    suffixes: ClassVar[tuple[str, ...]] = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp")

    def find(self, path: Path, name: str, search: Search) -> Iterator[Slide | UnreadableImage]:
        """Find the image of a file, from its header, and name the other frames of an animation; a preview is none.

        Raises:
            ReadError: the file has another format than its name says.
            OSError: the file has no format of pictures.
        """
        deep = _deep_mode(path)
        with Image.open(readable(path)) as picture:
            if picture.info.get("Software") == WRITTEN_BY:
                return
            kind = picture.get_format_mimetype()
            if kind not in _KINDS:
                raise ReadError(
                    str(path),
                    expected="PNG, JPEG or BMP, as its name says",
                    found=str(kind),
                    remedy="give the file the suffix of its format, or save it as PNG",
                )
            width, height = picture.size
            mode = deep or _mode(picture)
            frames, is_animation = getattr(picture, "n_frames", 1), not isinstance(picture, MpoImageFile)
        colour = mode in ("RGB", "RGBA")
        shape = (height, width, len(mode)) if colour else (height, width)
        axes = "yxc" if colour else "yx"
        others = f"{frames - 1} more pictures in the file are left out" if frames > 1 else ""
        yield Slide(
            name=name,
            store=path,
            path="",
            format=self.name,
            axes=axes,
            dtype="uint16" if deep else _MODES_KEPT[mode],
            levels=(Level("0", shape, shape, (1.0,) * len(shape), (0.0,) * len(shape)),),
            units=(None,) * len(shape),
            rgb=colour,
            alpha=mode == "RGBA",
            notes=((others,) if others and not is_animation else ()) + search.check_axes(axes, str(path)),
        )
        if others and is_animation:
            yield UnreadableImage(f"{name}/1", str(path / "1"), f"{others}; save the animation as a TIFF")

    def open_level(self, slide: Slide, level: int) -> NDArray[Any]:
        """Read all pixels, (H, W) or (H, W, C); raises ReadError without imagecodecs for a PNG of 16 bits."""
        deep = _deep_mode(slide.store)
        if deep is not None:
            codecs = optional_library("imagecodecs", "imagecodecs")
            pixels: NDArray[Any] = codecs.png_decode(slide.store.read_bytes())
            return pixels if len(deep) > 1 else pixels[..., 0]
        with Image.open(readable(slide.store)) as picture:
            picture.info.pop("transparency", None)  # changes no pixel, but Pillow would warn of it
            return np.asarray(picture.convert(_mode(picture)))


def _deep_mode(path: Path) -> str | None:
    """Mode of a PNG's channels if it has 16 bits that Pillow would not keep, else None."""
    source = readable(path)
    with source.open("rb") if isinstance(source, Path) else source as stream:
        header = stream.read(26)
    return _DEEP_MODES.get(header[25]) if header.startswith(_PNG) and header[24:25] == b"\x10" else None


def _mode(picture: Image.Image) -> str:
    """Pillow's mode to read a picture in: palettes, bilevel and CMYK become RGB or grey."""
    if picture.mode in _MODES_KEPT:
        return picture.mode
    return "L" if picture.mode in ("1", "LA") else "RGB"
