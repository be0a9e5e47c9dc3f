"""Describe a series of a TIFF as a slide, and read its pixels. What tifffile would fill in is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import zarr
from numpy.typing import NDArray
from tifffile import COMPRESSION

from cellseg_batch.engine.errors import ReadError
from cellseg_batch.engine.slides.colours import RGB, TAKEN_FOR_RGB, are_named_rgb, are_rgb
from cellseg_batch.engine.slides.image_format import Search, is_overview
from cellseg_batch.engine.slides.pixel_size import settle_pixel_size
from cellseg_batch.engine.slides.slide import Level, Slide, fits_axes
from cellseg_batch.engine.slides.tiff_dialects import (
    Facts,
    colours_of,
    is_inverted,
    listed_planes,
    notes_on_values,
)
from cellseg_batch.engine.slides.tiff_file import Pyramid, Series, lost_levels

# tifffile's letters of axes -> ours. S is samples, I images in a sequence; Q, an axis that it cannot name, is missing.
_AXIS_OF = {"S": "c", "C": "c", "Y": "y", "X": "x", "Z": "z", "T": "t", "I": "t"}
# Letters of axes that a file only counts.
_UNCERTAIN = "IQ"
# Dialects that list planes, wherever these are.
_LISTS_PLANES = ("ome", "scn", "ndtiff", "mmstack")
TIFF = "tiff"
"""Name of the format of every image in a TIFF."""


class SeriesPixels:
    """Pixels of a level, in the order of a slide's axes, that tifffile decodes when they are sliced.

    Args:
        series: the level; its file stays open until `close`.
        ndim: number of the slide's axes.
    """

    def __init__(self, series: Series, ndim: int) -> None:
        squeeze = None if series.ndim == ndim else True
        self._stored = zarr.open_array(series.aszarr(level=0, squeeze=squeeze), mode="r")
        self._white = (1 << series.keyframe.bitspersample) - 1 if is_inverted(series) else None

    def __getitem__(self, index: tuple[slice, ...]) -> NDArray[Any]:
        """Decode a part, with 0 as black."""
        pixels = np.asarray(self._stored[index])
        if self._white is None:
            return pixels
        return ~pixels if pixels.dtype == bool else pixels.dtype.type(self._white) - pixels

    def close(self) -> None:
        """Close the file."""
        self._stored.store.close()


def slide_of(
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
    of_letters = dict(zip(letters, axes, strict=True))
    samples_are_channels = of_letters.get("S") == "c"
    channels_are_rgb = of_letters.get("C") == "c" and are_rgb(
        series.shape[series.axes.index("C")], series.dtype.name, facts.channels, facts.colours
    )
    if channels_are_rgb and not are_named_rgb(facts.channels):
        notes += (TAKEN_FOR_RGB,)
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
    unstored, pieces = sum(count == 0 for count in page.databytecounts), len(page.databytecounts)
    if unstored:
        notes += (f"{unstored} of {pieces} tiles of its first plane are not stored and read as {page.nodata}",)
    more = page.samplesperpixel - alpha - len(RGB)
    if rgb and samples_are_channels and more > 0:
        notes += (f"{more} samples of a pixel beside red, green, blue are left out; `channel` chooses one of them",)
    notes += notes_on_values(series) + lost_levels(page)
    if series.kind == "bif":
        notes += ("its tiles are read as scanned, and not stitched",)
    return Slide(
        name=name,
        store=file,
        path=path,
        format=TIFF,
        axes=axes,
        dtype=series.dtype.name,
        levels=tuple(levels),
        units=tuple("micrometer" if axis in size.um else None for axis in axes),
        channels=facts.channels,
        rgb=(rgb and samples_are_channels) or channels_are_rgb,
        alpha=alpha and samples_are_channels,
        series=number,
        notes=(*notes, *size.notes),
    )


def is_derived(series: Series) -> bool:
    """Whether a series is a small or otherwise derived picture of another, by its name or its first page."""
    page = series.keyframe
    return (
        is_overview(series.name) or is_overview(page.description) or page.is_reduced or page.is_mask or page.is_subifd
    )


def title_of(series: Series) -> str:
    """Name of a series for messages, with its size."""
    return f"{series.name or f'page {series.keyframe.index}'} ({' x '.join(map(str, series.shape))})"


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


def _demand_planes(series: Series, location: str) -> None:
    """Refuse a series of which planes, tiles or strips are missing, which tifffile would fill with zeros.

    Raises:
        ReadError: planes or parts of them are missing, or its pixels have a type or compression that tifffile does not
            know.
    """
    page = series.keyframe
    if page.dtype is None:
        raise ReadError(
            location,
            expected="integer, floating point or boolean pixels",
            found=f"{page.bitspersample} bits of sample format {page.sampleformat}",
            remedy="convert the image",
        )
    if page.compression not in tifffile.TIFF.DECOMPRESSORS:
        raise ReadError(
            location,
            expected="a compression that can be decoded",
            found=COMPRESSION(page.compression).name if page.compression in set(COMPRESSION) else f"{page.compression}",
            remedy="save it without compression",
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
