"""Read images in TIFF, OME-TIFF, SVS and other files that tifffile reads, pyramids included.

Every series of a file is an image, except for the label, the overview and the thumbnail beside a scan. An image of
several files belongs to the file of its first plane, whichever of them leads to it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import tifffile
import zarr

from cellseg_batch.engine.errors import ReadError
from cellseg_batch.engine.slides.image_format import (
    ImageFormat,
    Search,
    image_or_reason,
    is_overview,
    left_out,
    name_in_series,
)
from cellseg_batch.engine.slides.ome_xml import SELF, OmeImage, parse, read_header, read_images
from cellseg_batch.engine.slides.pixel_size import settle_pixel_size
from cellseg_batch.engine.slides.slide import Level, Slide, UnreadableImage, fits_axes
from cellseg_batch.engine.slides.tiff_dialects import Facts, colours_of, facts_of, listed_planes
from cellseg_batch.engine.storage.paths import readable

# tifffile's letters of axes -> ours. S is samples, I images in a sequence; Q, an axis that it cannot name, is missing.
_AXIS_OF = {"S": "c", "C": "c", "Y": "y", "X": "x", "Z": "z", "T": "t", "I": "t"}
# Letters of axes that a file only counts.
_UNCERTAIN = "IQ"
# Suffixes of files that hold OME-XML in TIFF's stead.
_XML_SUFFIXES = (".ome", ".xml")
# Dialects by which tifffile looks for certain pages, and passes over others.
_CERTAIN_PAGES = ("svs", "qpi", "scn", "bif", "philips")
_STALE = "its OME-XML does not fit its pages, which are read as they are"
# Dialects that list planes, wherever these are.
_LISTS_PLANES = ("ome", "scn", "ndtiff", "mmstack")

Series = tifffile.TiffPageSeries
# The resolutions of an image, the full resolution first.
Pyramid = list[Series]


class Tiff(ImageFormat):
    """Format of TIFF and its relatives; a level is opened as a zarr array that tifffile decodes."""

    name: ClassVar[str] = "tiff"
    title: ClassVar[str] = "TIFF, SVS"
    suffixes: ClassVar[tuple[str, ...]] = (
        *(".tif", ".tiff", ".btf", ".tf2", ".tf8", ".ptif", ".ptiff", ".zif"),
        *(".svs", ".ndpi", ".scn", ".bif", ".qptiff", ".lsm", ".stk", ".companion.ome"),
    )

    def find(self, path: Path, name: str, search: Search) -> Iterator[Slide | UnreadableImage]:
        """Find every image of a file; a part of an image leads to the file of the image's first plane.

        Raises:
            ReadError: the file has no image, or its metadata lie in a file that is missing.
            ValueError: its OME-XML is damaged.
            tifffile.TiffFileError: the file is no TIFF.
        """
        described = _read_ome(path)
        is_stale = described is not None and _is_stale(path, described)
        if described is not None and not is_stale:
            yield from _find_described(described, path, name, search)
            return
        with _open(path, None) as tiff:
            yield from _find_series(tiff, path, name, search, (_STALE,) if is_stale else ())

    def open_level(self, slide: Slide, level: int) -> zarr.Array[Any]:
        """Open a level as a zarr array."""
        number, described = slide.series or 0, _read_ome(slide.store)
        if described and _is_stale(slide.store, described):
            described = None
        with _open(slide.store, described[number] if described else None) as tiff:
            series = _pyramids(tiff)[0 if described else number][level]
            squeeze = None if series.ndim == len(slide.axes) else True
            return zarr.open_array(series.aszarr(level=0, squeeze=squeeze), mode="r")

    def close(self, array: zarr.Array[Any]) -> None:
        """Close the file."""
        array.store.close()


def _find_series(
    tiff: tifffile.TiffFile, path: Path, name: str, search: Search, notes: tuple[str, ...]
) -> Iterator[Slide | UnreadableImage]:
    """Find the images of a file without OME-XML that fits; the first has ``notes``."""
    pyramids = _pyramids(tiff)
    if not pyramids:
        raise ReadError(str(path), expected="a TIFF with pixels", found="none", remedy="export it again")
    _demand_pages(tiff, str(path))
    facts = [facts_of(tiff, pyramid[0]) for pyramid in pyramids]
    aside = [fact.is_overview or _is_aside(pyramid[0]) for fact, pyramid in zip(facts, pyramids, strict=True)]
    taken = [number for number, is_aside in enumerate(aside) if not is_aside] or list(range(len(pyramids)))
    others = [_title(pyramid[0]) for number, pyramid in enumerate(pyramids) if number not in taken]
    notes += left_out([*others, *_pages_in_no_series(tiff, pyramids)])
    for number in taken:
        image_name, inside = name_in_series(name, number, len(taken))
        slide = partial(_slide, pyramids[number], facts[number], path, image_name, inside, number, search, notes)
        yield image_or_reason(slide, image_name, str(path / inside))
        notes = ()


def _find_described(images: list[OmeImage], path: Path, name: str, search: Search) -> Iterator[Slide | UnreadableImage]:
    """Find the images that the OME-XML of a file describes, and that belong to the file.

    If none belongs to it, find those of the files that it is a part of, or that it lists.
    """
    if not images:
        raise ReadError(str(path), expected="images in its OME-XML", found="none", remedy="export it again")
    holders = {image.number: _holder(image, path) for image in images}
    own = [image for image in images if holders[image.number] == path]
    yield from _find_own(own, path, name, search)
    for image in images:
        if holders[image.number] is None:
            lost = path.with_name(image.files[0])
            if lost not in search.visited:
                search.visited.add(lost)
                reason = f"listed in the OME-XML of {path.name}, but not beside it; copy it there"
                yield UnreadableImage(_beside(name, path, lost), str(lost), reason)
    if not own:
        parts = [image for image in images if SELF in image.files] or images
        for holder in dict.fromkeys(holders[image.number] for image in parts):
            if holder is not None and holder not in search.visited:
                yield from _find_described(_read_ome(holder) or [], holder, _beside(name, path, holder), search)


def _find_own(images: list[OmeImage], path: Path, name: str, search: Search) -> Iterator[Slide | UnreadableImage]:
    """Find images that belong to a file, once in a search."""
    if path in search.visited:
        return
    search.visited.add(path)
    taken = [image for image in images if not is_overview(image.name)] or images
    numbers = {image.number for image in taken}
    notes = left_out([image.name for image in images if image.number not in numbers])
    for image in taken:
        image_name, inside = name_in_series(name, image.number, len(taken))
        slide = partial(_described_slide, image, path, image_name, inside, search, notes)
        yield image_or_reason(slide, image_name, str(path / inside))
        notes = ()


def _holder(image: OmeImage, path: Path) -> Path | None:
    """The file that an image belongs to: the first of its parts that is there; None if none is."""
    parts = [path if file == SELF else path.with_name(file) for file in image.files or (SELF,)]
    return next((part for part in parts if part == path or part.is_file()), None)


def _beside(name: str, path: Path, other: Path) -> str:
    """Name as `Slide.name` of a file beside ``path``, which has the name ``name``."""
    return name.removesuffix(path.name) + other.name


def _read_ome(path: Path) -> list[OmeImage] | None:
    """The images that the OME-XML of a file describes, or that of the file to which it refers; None without OME-XML.

    Raises:
        ReadError: the file to which it refers is missing.
        ValueError: the OME-XML is damaged.
    """
    xml = _ome_xml(path)
    if xml is None:
        return None
    root = parse(xml)
    uuid, reference = read_header(root)
    if reference is not None:
        described = path.with_name(reference)
        if not described.is_file():
            raise ReadError(
                str(path),
                expected=f"its metadata in {reference}, beside it",
                found="no such file",
                remedy="copy that file along",
            )
        root = parse(_ome_xml(described) or "")
    return read_images(root, uuid, path.name, lambda name: path.with_name(name).is_file())


def _ome_xml(path: Path) -> str | None:
    """The OME-XML in a TIFF or a companion file; None if a TIFF has none."""
    if path.suffix.lower() in _XML_SUFFIXES:
        return path.read_text("utf-8")
    with tifffile.TiffFile(readable(path)) as tiff:
        return tiff.ome_metadata


def _is_stale(path: Path, images: list[OmeImage]) -> bool:
    """Whether OME-XML that lists no other file does not fit the pages of its file, as after cropping or resizing."""
    if not images or any(image.files not in ((), (SELF,)) for image in images):
        return False
    with _open(path, images[0]) as tiff:
        return not tiff.series or tiff.series[0].kind != "ome"


def _open(path: Path, image: OmeImage | None) -> tifffile.TiffFile:
    """Open a file; as the file of a single image, if OME-XML describes it, else by its pages."""
    if image is None:
        return tifffile.TiffFile(readable(path), is_ome=False)
    # Micro-Manager's files have an index of their own, which lists pages of other positions too.
    return tifffile.TiffFile(readable(path), omexml=image.xml(), is_mmstack=False, is_ndtiff=False)


def _pyramids(tiff: tifffile.TiffFile) -> list[Pyramid]:
    """The series of a file, each with its lower resolutions.

    tifffile takes any page for a lower resolution that is half as large; in files of no dialect it must be stored in
    tiles, or say that it is one.
    """
    pyramids: list[Pyramid] = []
    for series in tiff.series:
        pyramid = [series]
        pyramids.append(pyramid)
        for level in series.levels[1:]:
            page = level.keyframe
            is_level = series.kind != "generic" or page.is_tiled or page.is_reduced or page.is_subifd
            if is_level:
                pyramid.append(level)
            else:
                pyramids.append([level])
    return pyramids


def _pages_in_no_series(tiff: tifffile.TiffFile, pyramids: list[Pyramid]) -> list[str]:
    """Names of the pages that tifffile passes over, as it knows no such part of the file's dialect."""
    if pyramids[0][0].kind not in _CERTAIN_PAGES:
        return []
    used = {page.index for pyramid in pyramids for level in pyramid for page in level if page is not None}
    return [f"page {number}" for number in range(len(tiff.pages)) if number not in used]


def _is_aside(series: Series) -> bool:
    """Whether a series is a small or otherwise derived picture of another, by its name or its first page."""
    page = series.keyframe
    return is_overview(series.name) or page.is_reduced or page.is_mask or page.is_subifd


def _title(series: Series) -> str:
    """Name of a series for messages, with its size."""
    return f"{series.name or f'page {series.keyframe.index}'} ({' x '.join(map(str, series.shape))})"


def _described_slide(
    image: OmeImage, path: Path, name: str, inside: str, search: Search, notes: tuple[str, ...]
) -> Slide:
    """The slide of an image that OME-XML describes.

    Raises:
        ReadError: a part of the image is missing, or it cannot be segmented.
    """
    missing = [file for file in image.files if file != SELF and not path.with_name(file).is_file()]
    if missing:
        raise ReadError(
            str(path),
            expected=f"all {len(image.files)} files of the image beside each other",
            found=f"no {', '.join(missing)}",
            remedy="copy what is missing along",
        )
    with _open(path, image) as tiff:
        pyramids = _pyramids(tiff)
        if not pyramids or pyramids[0][0].kind != "ome":
            raise ReadError(
                str(path),
                expected="the pages that its OME-XML describes",
                found="others",
                cause="a file that was changed after its metadata were written",
                remedy="export it again",
            )
        facts = Facts(image.stated, image.channels)
        slide = _slide(pyramids[0], facts, path, name, inside, image.number, search, notes)
    files = (path.with_name(file) for file in image.files if file != SELF)
    return replace(slide, parts=tuple(file for file in files if file != path))


def _slide(
    pyramid: Pyramid,
    facts: Facts,
    file: Path,
    name: str,
    path: str,
    number: int,
    search: Search,
    notes: tuple[str, ...],
) -> Slide:
    """The slide of a series.

    Raises:
        ReadError: its axes cannot be named, planes of it are missing, or its samples are neither grey nor RGB.
    """
    series, page = pyramid[0], pyramid[0].keyframe
    letters, axes = _axes_of(series, search.axes, str(file))
    notes += search.check_axes(axes, str(file))
    _demand_planes(series, str(file))
    rgb, alpha = colours_of(series, str(file))
    samples_are_channels = dict(zip(letters, axes, strict=True)).get("S") == "c"
    size = settle_pixel_size(facts.stated)
    levels: list[Level] = []
    for index, level in enumerate(pyramid):
        shape = level.get_shape(squeeze=None if len(letters) == level.ndim else True)
        if len(shape) != len(axes) or (level.kind in _LISTS_PLANES and None in level) or _lost_pieces(level):
            notes += (f"level {index} and those below it are incomplete and left out",)
            break
        factor = levels[0].shape[axes.index("x")] / shape[axes.index("x")] if levels else 1.0
        scale = tuple(size.um.get(axis, 1.0) * (factor if axis in "yx" else 1.0) for axis in axes)
        levels.append(Level(str(index), tuple(shape), _chunks(level.keyframe, letters), scale, (0.0,) * len(axes)))
    unstored = sum(count == 0 for count in page.databytecounts)
    if unstored:
        notes += (f"{unstored} of {len(page.databytecounts)} tiles of its first plane are not stored and read as 0",)
    if series.kind == "bif":
        notes += ("its tiles are read as scanned, and not stitched",)
    return Slide(
        name=name,
        store=file,
        path=path,
        format=Tiff.name,
        axes=axes,
        dtype=series.dtype.name,
        levels=tuple(levels),
        units=tuple("micrometer" if axis in size.um else None for axis in axes),
        channels=facts.channels,
        rgb=rgb and samples_are_channels,
        alpha=alpha and samples_are_channels,
        series=number,
        notes=(*notes, *size.notes),
    )


def _axes_of(series: Series, asked: str | None, location: str) -> tuple[str, str]:
    """(tifffile's letters, ours) of the axes of a series: the file's if it names all, else the user's, else a guess.

    Raises:
        ReadError: the axes cannot be named, or the user's are no axes of this series.
    """
    for letters in (series.axes, series.get_axes(squeeze=True)):
        own = "".join(_AXIS_OF.get(letter, "?") for letter in letters)
        axes = asked.lower() if asked and set(letters) & set(_UNCERTAIN) else own
        if fits_axes(axes, len(letters)) and _keeps(axes, letters, _UNCERTAIN):
            return letters, axes
        # Channels of several samples: the file names its axes, but there is one letter too few.
        clash = {"S", "C"} <= set(letters)
        if asked and clash and fits_axes(asked.lower(), len(letters)) and _keeps(asked.lower(), letters, "C"):
            return letters, asked.lower()
    if asked:
        raise ReadError(
            location,
            expected=f"axes that fit {letters} (S is colours, c) of shape {series.get_shape(squeeze=True)}",
            found=f"`axes={asked}`",
            remedy="leave `axes` out for this file, or name as many axes, out of t, c, z, y, x",
        )
    colours = "S" in letters and "C" in letters
    example = "zyx" if len(letters) == 3 else "tzyxc" if len(letters) == 5 else "zyxc" if "S" in letters else "czyx"
    raise ReadError(
        location,
        expected="axes out of t, c, z, y, x",
        found=f"{letters} of shape {series.get_shape(squeeze=True)}",
        cause="several channels of several samples, such as colours" if colours else "a TIFF that does not name them",
        remedy=f"name them, for example `axes={example}`",
    )


def _keeps(axes: str, letters: str, free: str) -> bool:
    """Whether ``axes`` has our letter for each of tifffile's that is not ``free``."""
    return all(letter in free or _AXIS_OF.get(letter) == axis for letter, axis in zip(letters, axes, strict=True))


def _demand_pages(tiff: tifffile.TiffFile, location: str) -> None:
    """Refuse a file whose list of pages goes on where there is no page, at which tifffile ends the list.

    Raises:
        ReadError: it does.
    """
    file, place = tiff.filehandle, tiff.pages.next_page_offset
    if place is None or tiff.is_ndpi:  # NDPI has a form of its own for offsets
        return
    file.seek(place)
    (following,) = struct.unpack(tiff.tiff.offsetformat, file.read(tiff.tiff.offsetsize))
    if following and following not in {page.offset for page in tiff.pages}:
        where = "behind the end of the file" if following >= file.size else "that cannot be read"
        raise ReadError(
            location,
            expected="all pages of the TIFF",
            found=f"{len(tiff.pages)}, and a reference to one {where}",
            cause="a file that was cut short or damaged",
            remedy="copy or export it again",
        )


def _demand_planes(series: Series, location: str) -> None:
    """Refuse a series of which planes, tiles or strips are missing, which tifffile would fill with zeros.

    Raises:
        ReadError: planes or parts of them are missing, or its pixels have a type that tifffile does not know.
    """
    page = series.keyframe
    if page.dtype is None:
        raise ReadError(
            location,
            expected="integer, floating point or boolean pixels",
            found=f"{page.bitspersample} bits of sample format {page.sampleformat}",
            remedy="convert the image",
        )
    if not all(isinstance(side, int) for side in page.chunks):
        raise ReadError(
            location,
            expected="one length of each side of its tiles or strips",
            found=f"{page.chunks!s:.80}",
            cause="damaged metadata",
            remedy="copy or export it again",
        )
    lost = _lost_pieces(series)
    if lost:
        raise ReadError(
            location,
            expected=f"a place in the file for each tile or strip of {page.imagelength} x {page.imagewidth} px",
            found=f"none for {lost} of them",
            cause="damaged metadata",
            remedy="copy or export it again",
        )
    listed, there = listed_planes(series), len(series)
    if series.kind in _LISTS_PLANES:
        there -= sum(plane is None for plane in series)
    if there < listed:
        raise ReadError(
            location,
            expected=f"all {listed} planes that its metadata list",
            found=f"{there}",
            cause="a file that was cut short, or parts of it that are missing",
            remedy="copy or export it again",
        )


def _lost_pieces(series: Series) -> int:
    """Number of tiles or strips without a place in the file; those of 0 bytes are left out on purpose."""
    keyframe = series.keyframe
    if keyframe.is_contiguous:
        return 0
    pieces = math.prod(keyframe.chunked)
    lost = 0
    for page in series:
        if page is not None:
            places = zip(page.dataoffsets, page.databytecounts, strict=False)
            lost += max(0, pieces - sum(offset > 0 or length == 0 for offset, length in places))
    return lost


def _chunks(page: tifffile.TiffPage, letters: str) -> tuple[int, ...]:
    """Shape of a chunk along each axis: a tile or strip of a page."""
    chunk = {"Y": page.chunks[0], "X": page.chunks[1]} if len(page.chunks) >= 2 else {}
    chunk["S"] = page.samplesperpixel
    return tuple(chunk.get(letter, 1) for letter in letters)
