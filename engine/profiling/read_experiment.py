"""Why a slide reads slowly, by experiment: a part of it is copied as it is, in larger chunks, and uncompressed.

A copy lies in a local folder and is a slide like any other.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.slides.ome_zarr import as_zarr
from cellseg_batch.engine.slides.reader import SlideReader
from cellseg_batch.engine.slides.slide import Level, Slide

CHUNK = 512
"""Side in px of the chunks that are tried in place of smaller ones."""

_CHUNKS_TRIED = 16  # along each axis: enough to be typical, few enough to be quick
_LARGEST_BOX = 2048
_ROUNDS = 2
_WORTH = 1.25
"""A cause is named only if its cure reads this many times faster."""


@dataclass(frozen=True)
class Storage:
    """How a copy is stored.

    Attributes:
        chunk: side of its chunks in px; None keeps the slide's.
        raw: without compression; else the slide's own codecs.
    """

    chunk: int | None = None
    raw: bool = False


@dataclass(frozen=True)
class Cure:
    """What makes a slide read faster.

    Attributes:
        cause: of its slowness: chunks, codec or store.
        storage: of a local copy that has it no more.
        text: the remedy, for people.
        pixels_per_s: that one thread reads from such a copy.
    """

    cause: str
    storage: Storage
    text: str
    pixels_per_s: float


def find_cure(slide: Slide, level: int, channels: tuple[int, ...], folder: Path) -> Cure | None:
    """Copy a corner of ``slide`` to ``folder`` in several ways and read each; None if no copy reads much faster."""
    chunk = max(_chunk(slide, level))
    side = max(CHUNK, min(_LARGEST_BOX, _CHUNKS_TRIED * chunk))
    height, width = slide.plane_shape(level)
    part = slide.cropped(level, Box(0, 0, min(side, height), min(side, width)))
    part = replace(part, levels=(part.levels[level],))
    own = _rate(part, channels)

    def rate(storage: Storage) -> float:
        return _rate(copy_slide(part, 0, folder, storage), channels)

    if slide.zarr_format is None:
        best = Cure("format", Storage(CHUNK), "a conversion to OME-Zarr (cellseg-batch convert)", rate(Storage(CHUNK)))
        return best if best.pixels_per_s > _WORTH * own else None
    same = rate(Storage())
    gains = [(same / own, Cure("store", Storage(), "a copy on a local disk", same))]
    if chunk < CHUNK:
        larger = rate(Storage(CHUNK))
        gains.append((larger / same, Cure("chunks", Storage(CHUNK), f"chunks of {CHUNK} px", larger)))
    raw = rate(Storage(raw=True))
    gains.append((raw / same, Cure("codec", Storage(raw=True), "no compression, or a codec such as lz4,", raw)))
    gain, best = max(gains, key=lambda one: one[0])
    return best if gain > _WORTH else None


def copy_slide(slide: Slide, level: int, folder: Path, storage: Storage) -> Slide:
    """Copy ``slide`` from ``level`` on to a zarr hierarchy in ``folder``, in place of what is there."""
    zarr_format = slide.zarr_format or 3  # the codecs of a zarr slide are known to its own format only
    group = zarr.open_group(str(folder), mode="w", zarr_format=zarr_format)
    levels = tuple(_copy_level(slide, number, group, storage) for number in range(level, len(slide.levels)))
    return as_zarr(slide, folder, levels, zarr_format)


def _copy_level(slide: Slide, number: int, group: zarr.Group, storage: Storage) -> Level:
    level = slide.levels[number]
    with SlideReader(slide, number, (0,)) as reader:
        source = reader.array
        made: dict[str, Any] = {"shape": level.shape, "dtype": slide.dtype, "chunks": _chunks(slide, level, storage)}
        if slide.zarr_format is not None:
            made |= {"filters": source.filters, "compressors": source.compressors}
            made |= {"shards": source.shards if storage.chunk is None else None}
        if storage.raw:
            made["compressors"] = None
        target = group.create_array(str(number), **made)
        height = level.shape[slide.axes.index("y")]
        for start in range(0, height, _LARGEST_BOX):
            sides = dict(zip(slide.axes, (slice(0, length) for length in level.shape), strict=True))
            sides["y"] = slice(start, min(start + _LARGEST_BOX, height))
            there = tuple(sides.values())
            for axis, first in zip("yx", level.origin, strict=True):
                sides[axis] = slice(sides[axis].start + first, sides[axis].stop + first)
            target[there] = np.asarray(source[tuple(sides.values())])
    return replace(level, path=str(number), chunks=target.chunks, origin=(0, 0))


def _chunks(slide: Slide, level: Level, storage: Storage) -> tuple[int, ...]:
    if storage.chunk is None:
        return level.chunks
    sides = zip(slide.axes, level.chunks, level.shape, strict=True)
    return tuple(min(storage.chunk, length) if axis in "yx" else chunk for axis, chunk, length in sides)


def _chunk(slide: Slide, level: int) -> tuple[int, int]:
    chunks = dict(zip(slide.axes, slide.levels[level].chunks, strict=True))
    return chunks["y"], chunks["x"]


def _rate(slide: Slide, channels: tuple[int, ...]) -> float:
    """Pixels of a slide of one level that one thread reads per second; the best of a few rounds."""
    box = Box(0, 0, *slide.plane_shape(0))
    seconds = []
    with SlideReader(slide, 0, channels) as reader:
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            reader.read(0, box)
            seconds.append(time.perf_counter() - start)
    return box.area / min(seconds)
