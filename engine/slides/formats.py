"""List the image formats that can be read. To add a format, write its module and add an entry to `FORMATS`."""

from __future__ import annotations

from pathlib import Path, PurePath

from cellseg_batch.engine.slides.arrays import Arrays
from cellseg_batch.engine.slides.czi import Czi
from cellseg_batch.engine.slides.image_format import ImageFormat
from cellseg_batch.engine.slides.lif import Lif
from cellseg_batch.engine.slides.nd2 import Nd2
from cellseg_batch.engine.slides.ome_zarr import Zarr
from cellseg_batch.engine.slides.openslide import OpenSlides
from cellseg_batch.engine.slides.pictures import Pictures
from cellseg_batch.engine.slides.slide import Slide
from cellseg_batch.engine.slides.tiff import Tiff
from cellseg_batch.engine.slides.zipped_zarr import ZippedZarr

# The first format that can open a path gets it.
FORMATS: tuple[ImageFormat, ...] = (
    Zarr(),
    ZippedZarr(),
    Tiff(),
    OpenSlides(),
    Czi(),
    Nd2(),
    Lif(),
    Pictures(),
    Arrays(),
)
_CONVERT = "{} files are not supported; convert it to OME-Zarr or OME-TIFF (bioformats2raw)"
_SAVE_AS = "{} files are not supported; save it as PNG or TIFF"
_UNPACK = "{} files are not supported; unpack it"
_COPY = "a {} file is an unfinished copy; copy it again"
# Suffixes of images that no format reads -> why not. Each is reported as unreadable instead of skipped in silence.
_UNSUPPORTED = {
    **dict.fromkeys((".lof", ".xlef", ".vsi", ".oib", ".oif", ".oir"), _CONVERT),
    **dict.fromkeys((".ims", ".zvi", ".dv", ".r3d", ".ics", ".mrc", ".sld", ".sldy"), _CONVERT),
    **dict.fromkeys((".isyntax", ".i2syntax", ".vms", ".vmu", ".kfb", ".sdpc", ".tmap"), _CONVERT),
    **dict.fromkeys((".flex", ".mvd2", ".ipw", ".eer", ".nii", ".nrrd", ".mha", ".mhd", ".fits"), _CONVERT),
    **dict.fromkeys((".h5", ".hdf5", ".n5", ".klb"), _CONVERT),
    **dict.fromkeys((".jp2", ".j2k", ".jpx", ".jpf", ".jxl", ".jxr", ".gif", ".webp", ".avif", ".heic"), _SAVE_AS),
    **dict.fromkeys((".heif", ".pgm", ".ppm", ".pnm", ".pbm", ".tga", ".psd", ".dng", ".gel", ".exr"), _SAVE_AS),
    ".zarr": "it has no zarr metadata (zarr.json, .zgroup or .zarray) although it is named {}; copy or export it again",
}
# Suffixes that are added to the name of a file of any format.
_ADDED = {
    **dict.fromkeys((".zip", ".gz", ".bz2", ".xz", ".zst", ".7z", ".tar", ".tgz", ".rar"), _UNPACK),
    **dict.fromkeys((".part", ".partial", ".crdownload", ".download", ".filepart", ".tmp"), _COPY),
}


def format_at(path: Path) -> ImageFormat | None:
    """The format that can open ``path``; None if no format can."""
    return next((image_format for image_format in FORMATS if image_format.can_open(path)), None)


def format_of(slide: Slide) -> ImageFormat:
    """The format of a slide.

    Raises:
        KeyError: this process does not know a format of that name.
    """
    return {image_format.name: image_format for image_format in FORMATS}[slide.format]


def why_unsupported(name: str) -> str | None:
    """Why a file or folder that is named like an image cannot be read; None if it is not named so."""
    stem, suffix = PurePath(name).stem, PurePath(name).suffix.lower()
    reason = _UNSUPPORTED.get(suffix)
    if suffix in _ADDED and is_named_like_an_image(stem):
        reason = _ADDED[suffix]
    return None if reason is None else reason.format(suffix)


def is_named_like_an_image(name: str) -> bool:
    """Whether a file of this name is an image by its suffix, read or not."""
    suffixes = tuple(suffix for image_format in FORMATS for suffix in image_format.suffixes)
    return name.lower().endswith((*suffixes, *_UNSUPPORTED)) or why_unsupported(name) is not None
