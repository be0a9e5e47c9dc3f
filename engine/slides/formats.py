"""List the image formats that can be read. To add a format, write its module and add an entry to `FORMATS`."""

from __future__ import annotations

from pathlib import Path

from cellseg_batch.engine.slides.arrays import Arrays
from cellseg_batch.engine.slides.image_format import ImageFormat
from cellseg_batch.engine.slides.ome_zarr import Zarr
from cellseg_batch.engine.slides.pictures import Pictures
from cellseg_batch.engine.slides.slide import Slide
from cellseg_batch.engine.slides.tiff import Tiff

# The first format that can open a path gets it.
FORMATS: tuple[ImageFormat, ...] = (Zarr(), Tiff(), Pictures(), Arrays())
# Microscopy files that users may try. Each is reported as unreadable instead of being skipped in silence.
UNSUPPORTED_SUFFIXES = (".dcm", ".czi", ".nd2", ".lif", ".mrxs", ".vsi", ".oib", ".oif", ".ims", ".h5", ".jp2")


def format_at(path: Path) -> ImageFormat | None:
    """The format that can open ``path``; None if no format can."""
    return next((image_format for image_format in FORMATS if image_format.can_open(path)), None)


def format_of(slide: Slide) -> ImageFormat:
    """The format of a slide.

    Raises:
        KeyError: this process does not know a format of that name.
    """
    return {image_format.name: image_format for image_format in FORMATS}[slide.format]
