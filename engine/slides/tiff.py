"""Read images in TIFF, OME-TIFF, SVS and other files that tifffile reads, pyramids included.

Every series of a file is an image, except for the label, the overview and the thumbnail beside a scan. An image of
several files belongs to the file of its first plane, whichever of them leads to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import tifffile

from cellseg_batch.engine.errors import ReadError
from cellseg_batch.engine.slides.image_format import (
    WRITTEN_BY,
    ImageFormat,
    Search,
    beside,
    image_or_reason,
    is_overview,
    left_out,
    name_in_series,
    some_of,
)
from cellseg_batch.engine.slides.ome_xml import SELF, OmeImage
from cellseg_batch.engine.slides.slide import Slide, UnreadableImage
from cellseg_batch.engine.slides.tiff_dialects import Facts, facts_of
from cellseg_batch.engine.slides.tiff_file import (
    Pyramid,
    demand_pages,
    described_pyramids,
    fitting_ome,
    levels_by_size,
    open_file,
    pages_in_no_image,
    pages_in_no_series,
    pyramids_of,
    read_ome,
    software_of,
)
from cellseg_batch.engine.slides.tiff_series import TIFF, SeriesPixels, is_derived, slide_of, title_of

_BY_SIZE = "an image of its own: it has the size of a lower resolution of another, but nothing says that it is one"


class Tiff(ImageFormat):
    """Format of TIFF and its relatives; tifffile decodes the pixels."""

    name: ClassVar[str] = TIFF
    title: ClassVar[str] = "TIFF, SVS, NDPI, SCN, BIF, QPTIFF"
    suffixes: ClassVar[tuple[str, ...]] = (
        *(".tif", ".tiff", ".btf", ".tf2", ".tf8", ".ptif", ".ptiff", ".zif"),
        *(".svs", ".ndpi", ".scn", ".bif", ".qptiff", ".lsm", ".stk", ".companion.ome"),
    )

    def find(self, path: Path, name: str, search: Search) -> Iterator[Slide | UnreadableImage]:
        """Find every image of a file; a part of an image leads to the file of the image's first plane.

        Exported labels are no image.

        Raises:
            ReadError: the file has no image, its pages or OME-XML are damaged, or its metadata lie in a missing file.
            ValueError: its OME-XML names a file in another folder.
            tifffile.TiffFileError: the file is no TIFF.
        """
        demand_pages(path)
        if software_of(path) == WRITTEN_BY:
            return
        described, notes = fitting_ome(path)
        if described is not None:
            yield from _find_described(described, path, name, search)
            return
        with open_file(path, None) as tiff:
            yield from _find_series(tiff, path, name, search, notes)

    def open_level(self, slide: Slide, level: int) -> SeriesPixels:
        """Open a level, whose file stays open."""
        number = slide.series or 0
        described, _ = fitting_ome(slide.store)
        with open_file(slide.store, described and described[number : number + 1]) as tiff:
            return SeriesPixels(pyramids_of(tiff)[0 if described else number][level], len(slide.axes))

    def close(self, array: SeriesPixels) -> None:
        """Close the file."""
        array.close()


def _find_series(
    tiff: tifffile.TiffFile, path: Path, name: str, search: Search, notes: tuple[str, ...]
) -> Iterator[Slide | UnreadableImage]:
    """Find the images of a file without OME-XML that fits; the first has ``notes``."""
    pyramids = pyramids_of(tiff)
    if not pyramids:
        raise ReadError(str(path), expected="a TIFF with pixels", found="none", remedy="export it again")
    facts = [facts_of(tiff, pyramid[0]) for pyramid in pyramids]
    aside = [fact.is_overview or is_derived(pyramid[0]) for fact, pyramid in zip(facts, pyramids, strict=True)]
    taken = [number for number, is_aside in enumerate(aside) if not is_aside] or list(range(len(pyramids)))
    others = [title_of(pyramid[0]) for number, pyramid in enumerate(pyramids) if number not in taken]
    notes += left_out([*others, *pages_in_no_series(tiff, pyramids)])
    by_size = levels_by_size(tiff, pyramids)
    for number in taken:
        image_name, inside = name_in_series(name, number, len(taken))
        remarks = notes + (_BY_SIZE,) * (number in by_size)
        slide = partial(slide_of, pyramids[number], facts[number], path, image_name, inside, number, search, remarks)
        image = image_or_reason(slide, image_name, str(path / inside))
        yield image
        notes = () if isinstance(image, Slide) else notes


def _find_described(images: list[OmeImage], path: Path, name: str, search: Search) -> Iterator[Slide | UnreadableImage]:
    """Find the images that the OME-XML of a file describes, and that belong to the file.

    If none belongs to it, find those of the files that it is a part of, or that it lists.
    """
    if not images:
        raise ReadError(str(path), expected="images in its OME-XML", found="none", remedy="export it again")
    holders = {image.number: _holder(image, path) for image in images}
    own = [image for image in images if holders[image.number] == path]
    yield from _find_own(images, own, path, name, search)
    named = dict.fromkeys(path.with_name(image.files[0]) for image in images if holders[image.number] is None)
    lost = [file for file in named if file not in search.visited]
    search.visited.update(lost)
    if lost:
        shown = some_of([file.name for file in lost])
        reason = f"listed in the OME-XML of {path.name}, but not beside it: {shown}; copy what is missing along"
        yield UnreadableImage(beside(name, path, lost[0]), str(lost[0]), reason)
    if not own:
        parts = [image for image in images if SELF in image.files] or images
        for holder in dict.fromkeys(holders[image.number] for image in parts):
            if holder is not None and holder not in search.visited:
                yield from _find_described(read_ome(holder) or [], holder, beside(name, path, holder), search)


def _find_own(
    images: list[OmeImage], own: list[OmeImage], path: Path, name: str, search: Search
) -> Iterator[Slide | UnreadableImage]:
    """Find those of the described images that belong to a file, once in a search."""
    if path in search.visited:
        return
    search.visited.add(path)
    taken = [image for image in own if not is_overview(image.name)] or own
    numbers = {image.number for image in taken}
    notes = left_out([image.name for image in own if image.number not in numbers])
    whole = [image for image in taken if _is_whole(image, path)]
    with ExitStack() as stack:
        tiff = stack.enter_context(open_file(path, whole)) if whole else None
        pyramids = described_pyramids(tiff, whole) if tiff else {}
        if tiff:
            notes += pages_in_no_image(tiff, images)
        for image in taken:
            image_name, inside = name_in_series(name, image.number, len(taken))
            pyramid = pyramids.get(image.number)
            make = partial(_described_slide, image, pyramid, path, image_name, inside, search, notes)
            slide = image_or_reason(make, image_name, str(path / inside))
            yield slide
            notes = () if isinstance(slide, Slide) else notes


def _holder(image: OmeImage, path: Path) -> Path | None:
    """The file that an image belongs to: the first of its parts that is there; None if none is."""
    parts = [path if file == SELF else path.with_name(file) for file in image.files or (SELF,)]
    return next((part for part in parts if part == path or part.is_file()), None)


def _described_slide(
    image: OmeImage,
    pyramid: Pyramid | None,
    path: Path,
    name: str,
    inside: str,
    search: Search,
    notes: tuple[str, ...],
) -> Slide:
    """The slide of an image that OME-XML describes; without its pyramid, that is looked for.

    Raises:
        ReadError: a part of the image is missing, or it cannot be segmented.
    """
    _demand_whole(image, path)
    with ExitStack() as stack:
        if pyramid is None:
            pyramid = next(iter(pyramids_of(stack.enter_context(open_file(path, [image])))), None)
        if pyramid is None or pyramid[0].kind != "ome":
            raise ReadError(
                str(path),
                expected="the pages that its OME-XML describes",
                found="others",
                cause="a file that was changed after its metadata were written",
                remedy="export it again",
            )
        facts = Facts(image.stated, image.channels, image.colours)
        slide = slide_of(pyramid, facts, path, name, inside, image.number, search, notes)
    files = (path.with_name(file) for file in image.files if file != SELF)
    return replace(slide, parts=tuple(file for file in files if file != path))


def _is_whole(image: OmeImage, path: Path) -> bool:
    try:
        _demand_whole(image, path)
    except ReadError:
        return False
    return True


def _demand_whole(image: OmeImage, path: Path) -> None:
    """Refuse an image whose description cannot be true, or that lacks files.

    Raises:
        ReadError: it is such an image.
    """
    image.demand_numbers(str(path))
    missing = [file for file in image.files if file != SELF and not path.with_name(file).is_file()]
    if missing:
        raise ReadError(
            str(path),
            expected=f"all {len(image.files)} files of the image beside each other",
            found=f"no {some_of(missing)}",
            remedy="copy what is missing along",
        )
