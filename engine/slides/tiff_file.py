"""Open TIFF files and what describes their pages: OME-XML of their own or of a companion file, series and pyramids."""

from __future__ import annotations

import logging
import re
import struct
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import tifffile

from cellseg_batch.engine.errors import ReadError
from cellseg_batch.engine.slides.ome_xml import SELF, OmeImage, parse, read_header, read_images, xml_of
from cellseg_batch.engine.storage.paths import readable

# Otherwise tifffile's remarks would be printed between ours; whoever wants them adds a handler to this logger.
logging.getLogger("tifffile").addHandler(logging.NullHandler())

# Suffixes of files that hold OME-XML in TIFF's stead.
_XML_SUFFIXES = (".ome", ".xml")
_BEGINNING = re.compile(r"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<OME\s[^>]*openmicroscopy", re.DOTALL)
# More tags than this are none; so tifffile has it.
_MOST_TAGS = 4096
_STALE = "its OME-XML does not fit its pages, which are read as they are"

Series = tifffile.TiffPageSeries
# The resolutions of an image, the full resolution first.
Pyramid = list[Series]


def open_file(path: Path, images: Sequence[OmeImage] | None) -> tifffile.TiffFile:
    """Open a file; as the file of some of the images that its OME-XML describes, or without them by its pages."""
    if images is None:
        return tifffile.TiffFile(readable(path), is_ome=False)
    # Micro-Manager's files have an index of their own, which lists pages of other positions too.
    return tifffile.TiffFile(readable(path), omexml=xml_of(images), is_mmstack=False, is_ndtiff=False)


def described_pyramids(tiff: tifffile.TiffFile, images: Sequence[OmeImage]) -> dict[int, Pyramid]:
    """Number -> pyramid of each image as whose file it was opened; {} if tifffile does not find all."""
    try:
        pyramids = pyramids_of(tiff)
    except Exception:  # tifffile's error about one image ends its search for all
        return {}
    found = len(pyramids) == len(images) and all(pyramid[0].kind == "ome" for pyramid in pyramids)
    return {image.number: pyramid for image, pyramid in zip(images, pyramids, strict=True)} if found else {}


def read_ome(path: Path) -> list[OmeImage] | None:
    """The images that the OME-XML of a file describes, or that of the file to which it refers; None without OME-XML.

    Raises:
        ReadError: the file to which it refers is missing, or the OME-XML is damaged.
        ValueError: it names a file in another folder.
    """
    xml = _ome_xml(path)
    if xml is None:
        return None
    root = parse(xml, str(path))
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
        root = parse(_ome_xml(described) or "", str(described))
    return read_images(root, uuid, path.name, lambda name: path.with_name(name).is_file())


def _ome_xml(path: Path) -> str | None:
    """The OME-XML in a TIFF or a companion file; None if a TIFF has none."""
    if path.suffix.lower() in _XML_SUFFIXES:
        return path.read_text("utf-8")
    with tifffile.TiffFile(readable(path)) as tiff:
        # tifffile knows OME-XML by its end, which may have been cut off.
        text = tiff.pages.first.description
        return tiff.ome_metadata or (text if _BEGINNING.match(text) else None)


def software_of(path: Path) -> str:
    """The software that a TIFF names; "" if it names none, or for a companion file."""
    if path.suffix.lower() in _XML_SUFFIXES:
        return ""
    with tifffile.TiffFile(readable(path)) as tiff:
        return str(tiff.pages.first.software)


def fitting_ome(path: Path) -> tuple[list[OmeImage] | None, tuple[str, ...]]:
    """(images that OME-XML describes, as `read_ome`; notes): none, but a note, if it does not fit the file's pages."""
    images = read_ome(path)
    return (None, (_STALE,)) if images is not None and _is_stale(path, images) else (images, ())


def _is_stale(path: Path, images: list[OmeImage]) -> bool:
    """Whether OME-XML that lists no other file does not fit the pages of its file, as after cropping or resizing."""
    if not images or any(image.files not in ((), (SELF,)) for image in images):
        return False
    try:
        images[0].demand_numbers(str(path))
    except ReadError:  # not older than the pages, but damaged
        return False
    with open_file(path, images[:1]) as tiff:
        return not tiff.series or tiff.series[0].kind != "ome"


def pyramids_of(tiff: tifffile.TiffFile) -> list[Pyramid]:
    """The series of a file, each with its lower resolutions.

    tifffile takes any page for a lower resolution that has the size of one; in files of no dialect it must be stored in
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


def levels_by_size(tiff: tifffile.TiffFile, pyramids: list[Pyramid]) -> set[int]:
    """Numbers of the pyramids that tifffile takes for lower resolutions of others by nothing but their size."""
    levels = [level for series in tiff.series for level in series.levels[1:]]
    return {number for number, pyramid in enumerate(pyramids) if any(pyramid[0] is level for level in levels)}


def pages_in_no_series(tiff: tifffile.TiffFile, pyramids: list[Pyramid]) -> list[str]:
    """Names of the pages that tifffile passes over, as the file's dialect or metadata have no place for them."""
    levels = [level for pyramid in pyramids for level in pyramid]
    # tifffile puts all pages into a series of ImageJ, but reads as many as its comment tells of.
    read = (page for level in levels for page in islice(level, level.size // (level.keyframe.size or 1)))
    used = {page.treeindex for page in read if page is not None}
    return [f"page {number}" for number in range(len(tiff.pages)) if (number,) not in used]


def pages_in_no_image(tiff: tifffile.TiffFile, images: Sequence[OmeImage]) -> tuple[str, ...]:
    """The note on pages of a file that its OME-XML says nothing of; () if there are none, or it is damaged."""
    try:
        for image in images:
            image.demand_numbers("")
    except ReadError:
        return ()
    count = len(tiff.pages)
    left = count - len(set().union(*(image.pages(count) for image in images)))
    return (f"{left} of its {count} pages are in no image of its OME-XML and left out",) if left else ()


def demand_pages(path: Path) -> None:
    """Refuse a TIFF whose list of pages has no end, or goes on where there is no page.

    tifffile ends such a list in silence, or follows it for ever.

    Raises:
        ReadError: it is such a file.
    """
    if path.suffix.lower() in _XML_SUFFIXES:
        return
    with tifffile.TiffFile(readable(path)) as tiff:
        if tiff.is_ndpi:  # which has a form of its own for offsets
            return
        if not tiff.pages:
            raise ReadError(
                str(path),
                expected="a TIFF with pages",
                found="none",
                cause="a file that was cut short",
                remedy="copy or export it again",
            )
        pages: dict[int, int] = {}
        offset, following = tiff.pages.first.offset, _page_after(tiff, tiff.pages.first.offset)
        while following is not None and offset not in pages:
            pages[offset] = len(pages)
            offset, following = following, _page_after(tiff, following)
        if not offset:
            return
        if offset in pages:
            found = f"a list that leads from the last of {len(pages)} back to number {pages[offset]}"
        else:
            where = "behind the end of the file" if offset >= tiff.filehandle.size else "that cannot be read"
            found = f"{len(pages)}, and a reference to one {where}"
    raise ReadError(
        str(path),
        expected="all pages of the TIFF",
        found=found,
        cause="a file that was cut short or damaged",
        remedy="copy or export it again",
    )


def _page_after(tiff: tifffile.TiffFile, offset: int) -> int | None:
    """Offset of the page after that at ``offset``, 0 after the last; None if there is no page at ``offset``."""
    file, form = tiff.filehandle, tiff.tiff
    file.seek(offset)
    size = file.read(form.tagnosize)
    count = struct.unpack(form.tagnoformat, size)[0] if len(size) == form.tagnosize else _MOST_TAGS + 1
    if not offset or count > _MOST_TAGS:
        return None
    file.seek(offset + form.tagnosize + count * form.tagsize)
    following = file.read(form.offsetsize)
    return int(struct.unpack(form.offsetformat, following)[0]) if len(following) == form.offsetsize else None


def lost_levels(page: tifffile.TiffPage) -> tuple[str, ...]:
    """The note on lower resolutions that a page lists and that are not in its file, if that is open; () if all are."""
    listed = () if page.parent.filehandle.closed else page.subifds or ()
    lost = sum(_page_after(page.parent, offset) is None for offset in listed)
    return (f"{lost} of its {len(listed)} lower resolutions are not in the file and left out",) if lost else ()
