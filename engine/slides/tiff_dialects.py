"""Read what the dialects of TIFF say about a series besides its shape: pixel size, channel names, colours.

tifffile recognises the dialects and parses their metadata, with values of any type; OME-XML has its own module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile
from numpy.typing import NDArray
from tifffile import COMPRESSION, EXTRASAMPLE, PHOTOMETRIC, RESUNIT

from cellseg_batch.engine.errors import ReadError
from cellseg_batch.engine.slides.pixel_size import UM_PER_UNIT

Stated = dict[str, tuple[object, object]]
# Programs write 72, 96 or 300 dpi if they do not know the size; no slide has pixels of 84 µm and more.
_MOST_UM_BY_RESOLUTION = 20
# Units of ImageJ that it takes from the same tags.
_PRINTED = ("in", "inch", "inches")
_UNITS = {RESUNIT.INCH: "inch", RESUNIT.CENTIMETER: "cm", RESUNIT.MILLIMETER: "mm", RESUNIT.MICROMETER: "µm"}
# Codecs whose decoders turn YCbCr into RGB.
_COLOUR_CODECS = (
    *(COMPRESSION.OJPEG, COMPRESSION.JPEG, COMPRESSION.ALT_JPEG, COMPRESSION.JPEG_LOSSY, COMPRESSION.JPEG2000),
    *(COMPRESSION.APERIO_JP2000_YCBC, COMPRESSION.APERIO_JP2000_RGB, COMPRESSION.JPEG_2000_LOSSY),
    *(COMPRESSION.JPEGXL, COMPRESSION.JPEGXL_DNG, COMPRESSION.JPEGXR, COMPRESSION.JPEGXR_NDPI, COMPRESSION.WEBP),
)
# Dialects of intensities, with which a colour table says only how to show them.
_INTENSITIES = ("ome", "imagej", "lsm", "fluoview", "sis", "stk")
# Thousandths of red, green and blue in the brightness of a colour.
_BRIGHTNESS = (299, 587, 114)
_ALPHA = ((EXTRASAMPLE.ASSOCALPHA,), (EXTRASAMPLE.UNASSALPHA,))
_PHOTOMETRIC_NAMES = {kind.value: kind.name for kind in PHOTOMETRIC}


@dataclass(frozen=True)
class Facts:
    """What the metadata of a dialect say about a series.

    Attributes:
        stated: axis -> (size of a pixel, unit), as written.
        channels: names of the channels; () if they have none.
        colours: RRGGBB of each channel; () if the dialect has no colours.
        is_overview: the series shows the glass, not the sample.
    """

    stated: Stated = field(default_factory=dict)
    channels: tuple[str, ...] = ()
    colours: tuple[str, ...] = ()
    is_overview: bool = False


def facts_of(tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> Facts:
    """What the metadata of the file's dialect say about a series."""
    for dialect, read in _DIALECTS.items():
        if getattr(tiff, f"is_{dialect}"):
            return read(tiff, series)
    return Facts(_by_resolution(series))


def _svs(tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> Facts:
    """Aperio: µm per px in the description of the first page."""
    um = tifffile.tifffile.svs_description_metadata(tiff.pages.first.description).get("MPP")
    return Facts({"x": (um, "µm")})


def _scn(tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> Facts:
    """Leica: nm of each image's view, in the XML of the first page; the overview's view is the whole glass."""
    for collection in _elements(tiff.pages.first.description, "collection"):
        glass = _numbers(collection, "sizeX", "sizeY")
        for image in _elements(collection, "image"):
            pixels, view = (next(_elements(image, tag), None) for tag in ("pixels", "view"))
            pages = [element.get("ifd") for element in _elements(image, "dimension")]
            if pixels is None or view is None or str(series.keyframe.index) not in pages:
                continue
            (width, height), (nm_x, nm_y) = _numbers(pixels, "sizeX", "sizeY"), _numbers(view, "sizeX", "sizeY")
            names = tuple(element.get("name", "") for element in _elements(image, "channel"))
            return Facts(
                {"x": (nm_x / width if width else 0, "nm"), "y": (nm_y / height if height else 0, "nm")},
                names if any(names) else (),
                is_overview=(nm_x, nm_y) == glass and _numbers(view, "offsetX", "offsetY") == (0, 0),
            )
    return Facts()


def _philips(tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> Facts:
    """Philips: mm per px of the scan, along y and x, in the XML of the first page; other pages say what they are."""
    if series.keyframe.description.startswith(("Macro", "Label")):
        return Facts(is_overview=True)
    for attribute in _elements(tiff.pages.first.description, "Attribute"):
        sizes = (attribute.text or "").replace('"', "").split()
        if attribute.get("Name") == "DICOM_PIXEL_SPACING" and len(sizes) == 2:
            return Facts({axis: (size, "mm") for axis, size in zip("yx", sizes, strict=True)})
    return Facts()


def _bif(tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> Facts:
    """Ventana: µm per px in the XMP of the first page."""
    xmp = tiff.pages.first.tags.valueof("XMP", b"")
    text = xmp.decode("utf-8", "replace").strip("\0 \r\n") if isinstance(xmp, bytes) else str(xmp)
    return Facts({"x": (next((scan.get("ScanRes") for scan in _elements(text, "iScan")), None), "µm")})


def _metaseries(tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> Facts:
    """MetaXpress: the calibration in the XML of the first page, if it is on."""
    about = {element.get("id"): element.get("value") for element in _elements(tiff.pages.first.description, "prop")}
    if about.get("spatial-calibration-state") not in ("on", "true"):
        return Facts()
    unit = about.get("spatial-calibration-units")
    return Facts({axis: (about.get(f"spatial-calibration-{axis}"), unit) for axis in "yx"})


def _qpi(tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> Facts:
    """PerkinElmer: the name of each channel in the XML of its page."""
    descriptions = [page.description if isinstance(page, tifffile.TiffPage) else "" for page in series]
    names = tuple(next((element.text or "" for element in _elements(text, "Name")), "") for text in descriptions)
    return Facts(_by_resolution(series), names if "C" in series.axes and any(names) else ())


def _lsm(tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> Facts:
    """Zeiss LSM: m per voxel, and the names of the channels' colours."""
    about: dict[str, Any] = tiff.lsm_metadata or {}
    names = (about.get("ChannelColors") or {}).get("ColorNames") or ()
    return Facts({axis.lower(): (about.get(f"VoxelSize{axis}"), "m") for axis in "XYZ"}, tuple(map(str, names)))


def _imagej(tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> Facts:
    """ImageJ: unit, distance of planes and labels of planes in its comment, px per unit in the resolution tags."""
    about: dict[str, Any] = tiff.imagej_metadata or {}
    unit = about.get("unit")
    stated = _by_resolution(series, str(unit)) if unit else _by_resolution(series)
    if stated:
        stated["z"] = (about.get("spacing"), unit)
    return Facts(stated, _imagej_channels(about.get("Labels"), series))


def _imagej_channels(labels: Any, series: tifffile.TiffPageSeries) -> tuple[str, ...]:
    """Names of the channels by the labels of the first plane of each; () if they name no channels."""
    planes = [length for axis, length in zip(series.axes, series.shape, strict=True) if axis not in "YXS"]
    letters = [axis for axis in series.axes if axis not in "YXS"]
    if not isinstance(labels, list | tuple) or len(labels) != prod(planes) or "C" not in letters:
        return ()
    first = tuple(slice(None) if axis == "C" else 0 for axis in letters)
    # ImageJ writes "c:1/3 z:1/9 - DAPI" in hyperstacks, where the channel has a name.
    names = [re.sub(r"^([czt]:\d+/\d+\s*)+(-\s*)?", "", str(label)) for label in np.reshape(labels, planes)[first]]
    return tuple(names) if any(names) and len(set(names)) == len(names) else ()


_DIALECTS: dict[str, Callable[[tifffile.TiffFile, tifffile.TiffPageSeries], Facts]] = {
    "svs": _svs,
    "scn": _scn,
    "philips": _philips,
    "bif": _bif,
    "metaseries": _metaseries,
    "qpi": _qpi,
    "lsm": _lsm,
    "imagej": _imagej,
}


def _by_resolution(series: tifffile.TiffPageSeries, unit: str | None = None) -> Stated:
    """The pixel size by the resolution tags: px per unit, which is that of the tags unless ``unit`` is given."""
    tags = series.keyframe.tags
    is_explicit = unit not in (None, *_PRINTED)
    unit = unit or _UNITS.get(tags.valueof("ResolutionUnit"), "")
    stated: Stated = {}
    for axis in "yx":
        resolution = tags.valueof(f"{axis.upper()}Resolution")
        if resolution is not None:
            try:
                um = UM_PER_UNIT[unit] / (resolution[0] / resolution[1])
            except (KeyError, TypeError, IndexError, ZeroDivisionError):
                stated[axis] = f"1/{resolution}", unit
            else:
                stated |= {axis: (um, "µm")} if is_explicit or um < _MOST_UM_BY_RESOLUTION else {}
    return stated


def listed_planes(series: tifffile.TiffPageSeries) -> int:
    """Number of planes that the metadata list; tifffile takes a file of ImageJ that was cut short for a plain one."""
    about: dict[str, Any] = (series.parent and series.parent.imagej_metadata) or {}
    images = about.get("images") if series.kind in ("generic", "uniform") else None
    return max(len(series), images) if isinstance(images, int) else len(series)


def colours_of(series: tifffile.TiffPageSeries, location: str) -> tuple[bool, bool]:
    """(whether the first samples are red, green, blue; whether the last sample is alpha) of a series.

    Raises:
        ReadError: the samples are neither grey values nor RGB once they are decoded.
    """
    page = series.keyframe
    samples = page.samplesperpixel if "S" in series.axes else 1
    alpha = samples > 1 and page.extrasamples[-1:] in _ALPHA
    kind = page.photometric
    if kind == PHOTOMETRIC.RGB or (kind == PHOTOMETRIC.YCBCR and page.compression in _COLOUR_CODECS):
        return samples - alpha >= 3, alpha
    if kind == PHOTOMETRIC.MINISWHITE and series.dtype.kind not in "ub":
        raise ReadError(
            location,
            expected="unsigned integers, as 0 is white",
            found=series.dtype.name,
            cause="an inverted colour table",
            remedy="save it with 0 as black",
        )
    if kind in (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.LINEAR_RAW):
        return False, alpha
    if kind == PHOTOMETRIC.PALETTE:
        if any(getattr(page.parent, f"is_{dialect}") for dialect in _INTENSITIES) or _brightens(page.colormap):
            return False, False
        raise ReadError(
            location,
            expected="values that say how bright a pixel is",
            found="a colour table whose brightness rises and falls",
            cause="an image of indexed colours",
            remedy="save it as RGB, or as grey values if they are intensities",
        )
    raise ReadError(
        location,
        expected="grey values or RGB",
        found=f"{_PHOTOMETRIC_NAMES.get(kind, kind)} with {samples} samples per pixel",
        remedy="save it as RGB",
    )


def notes_on_values(series: tifffile.TiffPageSeries) -> tuple[str, ...]:
    """Remarks on values that are not what their numbers seem to say."""
    page = series.keyframe
    if is_inverted(series):
        return ("0 is white in the file: its values are read inverted, as viewers show them",)
    if page.photometric == PHOTOMETRIC.PALETTE and not _is_grey(page.colormap):
        return ("its colour table is not applied: its values are taken for intensities",)
    return ()


def is_inverted(series: tifffile.TiffPageSeries) -> bool:
    """Whether the largest value of a series is black; tifffile reads the values as stored."""
    return bool(series.keyframe.photometric == PHOTOMETRIC.MINISWHITE)


def _brightens(colormap: NDArray[Any] | None) -> bool:
    """Whether larger values are never darker by a colour table (3, N), so that they are intensities."""
    return colormap is None or bool((np.diff(np.tensordot(_BRIGHTNESS, colormap.astype(np.int64), 1)) >= 0).all())


def _is_grey(colormap: NDArray[Any] | None) -> bool:
    """Whether a colour table (3, N) has no colours and larger values are never darker by it."""
    return colormap is None or (bool((colormap == colormap[0]).all()) and _brightens(colormap))


def _elements(parent: str | ElementTree.Element, tag: str) -> Iterator[ElementTree.Element]:
    """The elements of a tag, without its namespace, in an element or a text; none if the text is no XML."""
    if isinstance(parent, str):
        try:
            parent = ElementTree.fromstring(parent)
        except ElementTree.ParseError:
            return iter(())
    return (element for element in parent.iter() if element.tag.rpartition("}")[2] == tag)


def _numbers(element: ElementTree.Element, *names: str) -> tuple[float, ...]:
    """Attributes of an element as numbers; NaN where there is none."""

    def number(text: str | None) -> float:
        try:
            return float(text or "nan")
        except ValueError:
            return float("nan")

    return tuple(number(element.get(name)) for name in names)
