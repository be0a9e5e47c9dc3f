"""Read images in TIFF, OME-TIFF, SVS and other files that tifffile reads, pyramids included."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from typing import Any, ClassVar

import tifffile
import zarr

from cellseg_batch.engine.errors import ReadError
from cellseg_batch.engine.slides.image_format import ImageFormat, Search, name_in_series
from cellseg_batch.engine.slides.slide import Level, Slide, fits_axes
from cellseg_batch.engine.storage.paths import readable

# tifffile's letters of axes -> ours. S is samples, I images in a sequence; Q, an axis that it cannot name, is missing.
_AXIS_OF = {"S": "c", "C": "c", "Y": "y", "X": "x", "Z": "z", "T": "t", "I": "t"}
_OTHER_FILE = re.compile(r"""FileName\s*=\s*["']([^"']*)["']""")
_CENTIMETRE, _INCH = 3, 2
_UM_PER_OME_UNIT = {"µm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4}


class Tiff(ImageFormat):
    """Format of TIFF and its relatives; a level is opened as a zarr array that tifffile decodes."""

    name: ClassVar[str] = "tiff"
    title: ClassVar[str] = "TIFF, SVS"
    suffixes: ClassVar[tuple[str, ...]] = (".tif", ".tiff", ".svs", ".ndpi", ".scn", ".bif", ".qptiff")

    def find(self, path: Path, name: str, search: Search) -> list[Slide]:
        """Find every series of an OME-TIFF, or the main series of other files (thumbnails are not slides).

        Raises:
            ReadError: an axis cannot be named.
            tifffile.TiffFileError: the file is no TIFF.
        """
        with tifffile.TiffFile(readable(path)) as tiff:
            _refuse_files_elsewhere(tiff, path)
            count = len(tiff.series) if tiff.is_ome else min(1, len(tiff.series))
            return [_slide(tiff, number, path, *name_in_series(name, number, count), search) for number in range(count)]

    def open_level(self, slide: Slide, level: int) -> zarr.Array[Any]:
        """Open a level as a zarr array."""
        store = tifffile.imread(readable(slide.store), aszarr=True, series=slide.series, level=level)
        return zarr.open_array(store, mode="r")

    def close(self, array: zarr.Array[Any]) -> None:
        """Close the file."""
        array.store.close()


def _slide(tiff: tifffile.TiffFile, number: int, file: Path, name: str, path: str, search: Search) -> Slide:
    series = tiff.series[number]
    axes = "".join(_AXIS_OF.get(letter, "?") for letter in series.axes)
    axes = search.axes if "?" in axes and search.axes else axes
    if not fits_axes(axes, series.ndim):
        raise ReadError(
            str(file),
            expected="axes out of time, channel, z, y, x",
            found=f"{series.axes} of shape {series.shape}",
            cause="a TIFF without metadata about its axes",
            remedy="name them, for example `axes=zyx`",
        )
    pixel_size = _pixel_size_um(tiff, number)
    sizes = {"y": pixel_size, "x": pixel_size, "z": _ome_size_um(_ome_pixels(tiff, number), "Z")}
    levels = []
    for index, level in enumerate(series.levels):
        factor = series.shape[axes.index("x")] / level.shape[axes.index("x")]
        scale = tuple((sizes.get(axis) or 1.0) * (factor if axis in "yx" else 1.0) for axis in axes)
        page = level.keyframe
        chunk = {"y": page.chunks[0], "x": page.chunks[1]} if len(page.chunks) >= 2 else {}
        chunk["c"] = page.samplesperpixel if "S" in series.axes else 1
        chunks = tuple(chunk.get(axis, 1) for axis in axes)
        levels.append(Level(str(index), tuple(level.shape), chunks, scale, (0.0,) * len(axes)))
    rgb = "S" in series.axes and series.keyframe.samplesperpixel >= 3
    units = tuple("micrometer" if sizes.get(axis) else None for axis in axes)
    return Slide(
        name=name,
        store=file,
        path=path,
        format=Tiff.name,
        axes=axes,
        dtype=series.dtype.name,
        levels=tuple(levels),
        units=units,
        channels=_channel_names(tiff, number),
        rgb=rgb,
        series=number,
    )


def _refuse_files_elsewhere(tiff: tifffile.TiffFile, path: Path) -> None:
    """Refuse an OME-TIFF with pixels in files that do not lie beside it, because reading its series would open them.

    Raises:
        ReadError: the metadata name a file in another folder.
    """
    for name in _OTHER_FILE.findall(tiff.ome_metadata or ""):
        if set(unescape(name)) & set("/\\"):
            raise ReadError(
                str(path),
                expected="an OME-TIFF whose parts lie beside it",
                found=f"one in {name}",
                remedy="put the files into one folder and write their names without folders into the metadata",
            )


def _pixel_size_um(tiff: tifffile.TiffFile, number: int) -> float | None:
    """µm per px from Aperio's description, OME-XML or the resolution tags; None if they do not say."""
    page = tiff.series[number].keyframe
    if tiff.is_svs:
        um = tifffile.tifffile.svs_description_metadata(page.description).get("MPP")
        return float(um) if um else None
    if tiff.is_ome:
        return _ome_size_um(_ome_pixels(tiff, number), "X")
    resolution, unit = page.tags.get("XResolution"), page.tags.get("ResolutionUnit")
    if resolution is None or unit is None or not resolution.value[0]:
        return None
    um_per_unit = {_CENTIMETRE: 1e4, _INCH: 25.4e3}.get(int(unit.value))
    pixels_per_unit = resolution.value[0] / resolution.value[1]
    if um_per_unit is None:
        return None
    size = um_per_unit / pixels_per_unit
    # Programs write 72, 96 or 300 dpi if they do not know the size; no slide has pixels of 84 µm and more.
    return size if size < 20 else None


def _ome_size_um(pixels: dict[str, Any], axis: str) -> float | None:
    factor = _UM_PER_OME_UNIT.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
    size = pixels.get(f"PhysicalSize{axis}")
    return float(size) * factor if size and factor else None


def _ome_pixels(tiff: tifffile.TiffFile, number: int) -> dict[str, Any]:
    if tiff.ome_metadata is None:
        return {}
    images = tifffile.xml2dict(tiff.ome_metadata).get("OME", {}).get("Image", [])
    images = images if isinstance(images, list) else [images]
    pixels: dict[str, Any] = images[number].get("Pixels", {}) if number < len(images) else {}
    return pixels


def _channel_names(tiff: tifffile.TiffFile, number: int) -> tuple[str, ...]:
    channels = _ome_pixels(tiff, number).get("Channel", [])
    channels = channels if isinstance(channels, list) else [channels]
    names = tuple(str(channel.get("Name", "")) for channel in channels)
    return names if any(names) else ()
