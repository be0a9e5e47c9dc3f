"""Read scans of glass slides with OpenSlide, where tifffile does not read them: MIRAX, DICOM, Sakura.

Sources: openslide.org/api for what a handle does; DICOM PS3.3 C.8.12 for the files of a series.
"""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.errors import ReadError
from cellseg_batch.engine.slides.image_format import (
    ImageFormat,
    Search,
    beside,
    left_out,
    local_file,
    optional_library,
    reading_by,
    some_of,
)
from cellseg_batch.engine.slides.pixel_size import settle_pixel_size
from cellseg_batch.engine.slides.slide import Level, Slide, UnreadableImage
from cellseg_batch.engine.storage.paths import version_of

_EXTRA = "cellseg-batch[openslide]"
_MIRAX = ".mrxs"
_DICOM = (".dcm", ".dicom")
_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
# What a file of a DICOM series shows; OpenSlide passes over others.
_SHOWN = ("VOLUME", "LABEL", "OVERVIEW", "THUMBNAIL")
_DICOM_TAGS = ["SOPClassUID", "SeriesInstanceUID", "ImageType", "DimensionOrganizationType"]
# Sides in px of what is read at once of a level that does not lie on the grid of level 0.
_CELL = 512
_UNSCANNED = "what was not scanned reads as #{}"


class OpenSlides(ImageFormat):
    """Format of scans in light that OpenSlide decodes, 8 bits of red, green and blue."""

    name: ClassVar[str] = "openslide"
    title: ClassVar[str] = "MRXS, DICOM, svslide"
    suffixes: ClassVar[tuple[str, ...]] = (_MIRAX, ".svslide", *_DICOM)

    def find(self, path: Path, name: str, search: Search) -> Iterator[Slide | UnreadableImage]:
        """Find the scan of a file, from its metadata; the files of a DICOM series are one scan, found once.

        Raises:
            ReadError: a library is not installed or cannot read the file, files are missing, or a DICOM file is no
                whole slide.
        """
        if path in search.visited:
            return
        library, scan = optional_library("openslide", _EXTRA), _scan_of(path)
        search.visited.update(scan.files)
        with reading_by("OpenSlide", path), library.OpenSlide(local_file(scan.files[0])) as handle:
            properties = handle.properties
            notes = scan.notes + left_out(list(handle.associated_images))
            if scan.is_sparse or "openslide.bounds-width" in properties:
                notes += (_UNSCANNED.format(_background(properties)),)
            notes += _not_read(properties) + search.check_axes("yxc", str(path))
            yield _describe(handle.level_dimensions, properties, scan.files, beside(name, path, scan.files[0]), notes)

    def open_level(self, slide: Slide, level: int) -> ScanPixels:
        """Open a level, whose file stays open."""
        return ScanPixels(local_file(slide.store), level)

    def close(self, array: ScanPixels) -> None:
        """Close the file."""
        array.close()


class ScanPixels:
    """Pixels (Y, X, C) of a level that OpenSlide decodes when they are sliced; its handles may be shared by threads.

    Args:
        path: the file; it stays open until `close`.
        level: number of the level.
    """

    def __init__(self, path: str, level: int) -> None:
        library = optional_library("openslide", _EXTRA)
        self._open = partial(library.OpenSlide, path)
        self._error: type[Exception] = library.OpenSlideError
        self._scan = self._open()
        self._level = level
        self._downsample = float(self._scan.level_downsamples[level])
        colour = _background(self._scan.properties)
        self._background = np.frombuffer(bytes.fromhex(colour), np.uint8).astype(np.uint16)

    def __getitem__(self, index: tuple[slice, ...]) -> NDArray[np.uint8]:
        """Decode a part; what was not scanned has the colour of the background."""
        rows, columns, channels = index
        pixels = np.empty((rows.stop - rows.start, columns.stop - columns.start, 3), np.uint8)
        for top, left in product(self._starts(rows), self._starts(columns)):
            cell = self._cell(top, left, self._end(top, rows) - top, self._end(left, columns) - left)
            y, x = max(top, rows.start), max(left, columns.start)
            part = cell[y - top :, x - left :]
            y, x = y - rows.start, x - columns.start
            pixels[y : y + part.shape[0], x : x + part.shape[1]] = part
        return pixels[..., channels]

    def close(self) -> None:
        """Close the file."""
        self._scan.close()

    def _starts(self, side: slice) -> range:
        """Where cells begin: OpenSlide takes whole px of level 0, and shifts what lies between them by less than a px.

        So that a pixel does not depend on the box, cells begin at the same places for all boxes. Where px of the level
        are whole numbers of px of level 0, a box is one cell.
        """
        if self._downsample.is_integer():
            return range(side.start, side.stop, side.stop - side.start)
        return range(side.start // _CELL * _CELL, side.stop, _CELL)

    def _end(self, start: int, side: slice) -> int:
        return int(side.stop) if self._downsample.is_integer() else min(start + _CELL, side.stop)

    def _cell(self, top: int, left: int, height: int, width: int) -> NDArray[np.uint8]:
        """Decode a box of the level, in its px."""
        location = round(left * self._downsample), round(top * self._downsample)
        try:
            region = self._scan.read_region(location, self._level, (width, height))
        except self._error:
            # A handle that failed fails ever after, for all threads, so the box is read again by a handle of its own.
            scan = self._open()
            region = scan.read_region(location, self._level, (width, height))
            self._scan = scan
        pixels: NDArray[np.uint8] = np.asarray(region)
        colours, opacity = pixels[..., :3], pixels[..., 3:]
        if opacity.min() == 255:
            return colours
        mixed = colours * opacity.astype(np.uint16) + self._background * (255 - opacity)
        return ((mixed + 127) // 255).astype(np.uint8)


def _describe(
    sides: tuple[tuple[int, int], ...],
    properties: Mapping[str, str],
    files: tuple[Path, ...],
    name: str,
    notes: tuple[str, ...],
) -> Slide:
    """The slide of a scan.

    Args:
        sides: (width, height) of each level.
        properties: OpenSlide's properties of the scan.
        files: the files of the scan; the first leads to it.
        name: as `Slide.name`.
        notes: as `Slide.notes`.
    """
    size = settle_pixel_size({axis: (properties.get(f"openslide.mpp-{axis}"), "µm") for axis in "yx"})
    levels = []
    for number, (width, height) in enumerate(sides):
        tile = [int(properties.get(f"openslide.level[{number}].tile-{side}", _CELL)) for side in ("height", "width")]
        factor = sides[0][0] / width
        scale = (*(size.um.get(axis, 1.0) * factor for axis in "yx"), 1.0)
        chunk = min(tile[0], height), min(tile[1], width), 3
        levels.append(Level(str(number), (height, width, 3), chunk, scale, (0.0,) * 3))
    return Slide(
        name=name,
        store=files[0],
        path="",
        format=OpenSlides.name,
        axes="yxc",
        dtype="uint8",
        levels=tuple(levels),
        units=(*("micrometer" if axis in size.um else None for axis in "yx"), None),
        rgb=True,
        notes=(*notes, *size.notes),
        parts=files[1:],
    )


def _not_read(properties: Mapping[str, str]) -> tuple[str, ...]:
    """Notes on the focus levels and filters of a MIRAX scan, of which OpenSlide reads the first alone."""
    notes, about = [], "mirax.HIERARCHICAL.HIER_"
    for number in range(1, int(properties.get(f"{about}COUNT", 0))):
        count, name = (properties.get(f"{about}{number}_{key}", "") for key in ("COUNT", "NAME"))
        if count.isdecimal() and int(count) > 1:
            notes.append(f"only the first of its {count} values of {name} is read")
    return tuple(notes)


def _background(properties: Mapping[str, str]) -> str:
    """RRGGBB of what was not scanned."""
    return properties.get("openslide.background-color", "FFFFFF")


@dataclass(frozen=True)
class _Scan:
    """The files of a scan, the one that leads to it first; notes on them; whether some of its tiles may be missing."""

    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    is_sparse: bool = False


def _scan_of(path: Path) -> _Scan:
    """The scan that a file belongs to.

    Raises:
        ReadError: files are missing, pydicom is not installed or cannot read the file, or it is no whole slide.
    """
    name = path.name.lower()
    return _series_of(path) if name.endswith(_DICOM) else _mirax(path) if name.endswith(_MIRAX) else _sakura(path)


def _mirax(path: Path) -> _Scan:
    """The scan of a MIRAX file, whose pixels lie in a folder beside it."""
    folder = Path(local_file(path.with_suffix("")))
    if not folder.is_dir():
        raise ReadError(
            str(path),
            expected=f"the folder {folder.name} beside it, with its pixels",
            found="none",
            remedy="copy it along",
        )
    return _Scan((path, *sorted(file for file in folder.iterdir() if file.is_file())), is_sparse=True)


def _sakura(path: Path) -> _Scan:
    """The scan of a Sakura file, a database; OpenSlide reads the middle one of its focal planes."""
    with (
        reading_by("sqlite3", path),
        closing(sqlite3.connect(f"{Path(local_file(path)).as_uri()}?mode=ro", uri=True)) as file,
    ):
        (table,) = file.execute("SELECT TableName FROM DataManagerSQLiteConfigXPO").fetchone()
        quoted = '"{}"'.format(table.replace('"', '""'))
        (header,) = file.execute(f"SELECT data FROM {quoted} WHERE id = 'Header'").fetchone()
        (planes,) = struct.unpack_from("<I", header, 16)
    return _Scan((path,), (f"only the middle one of its {planes} focal planes is read",) if planes > 1 else ())


def _series_of(path: Path) -> _Scan:
    """The scan of a DICOM file: the files beside it that are of its series."""
    with reading_by("pydicom", path):
        header = _header(path, version_of(path))
    if header.SOPClassUID != _WHOLE_SLIDE:
        raise ReadError(
            str(path),
            expected="a whole slide (VL Whole Slide Microscopy Image Storage)",
            found=header.SOPClassUID.name,
            cause="a DICOM file of another modality",
            remedy="leave it out, or convert it to OME-TIFF (bioformats2raw)",
        )
    named = sorted(file for file in path.parent.iterdir() if file.name.lower().endswith(_DICOM) and file.is_file())
    headers = {file: _header_or_none(file) for file in named}
    series = {file: other for file, other in headers.items() if other is not None and _same_scan(other, header)}
    unknown = [file.name for file, other in series.items() if not {*other.get("ImageType", ())} & {*_SHOWN}]
    notes = (f"left out, as they show neither a scan nor its label: {some_of(unknown)}",) if unknown else ()
    is_sparse = any(other.get("DimensionOrganizationType") == "TILED_SPARSE" for other in series.values())
    return _Scan(tuple(series), notes, is_sparse)


def _same_scan(header: Any, other: Any) -> bool:
    """Whether two DICOM files are of one series of whole slides."""
    return all(header.get(tag) == other.get(tag) for tag in ("SeriesInstanceUID", "SOPClassUID"))


def _header_or_none(path: Path) -> Any:
    """As `_header`; None for what is no DICOM file, which is named when its turn comes."""
    try:
        return _header(path, version_of(path))
    except ReadError:
        raise
    except Exception:  # pydicom raises errors of many types for damaged files
        return None


@lru_cache(maxsize=4096)
def _header(path: Path, version: str) -> Any:
    """What a DICOM file says about its series, a ``pydicom.Dataset``; it is read anew when its version changes."""
    read = optional_library("pydicom", _EXTRA).dcmread
    return read(local_file(path), stop_before_pixels=True, specific_tags=_DICOM_TAGS)
