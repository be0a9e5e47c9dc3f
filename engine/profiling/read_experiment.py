"""Find by experiment why a slide reads slowly: copy a part of it unchanged, in larger chunks, and uncompressed.

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
"""Side in px of the chunks that are tried if the slide's are smaller."""

_CHUNKS_TRIED = 16  # along each axis: enough to be typical, few enough to be quick
_LARGEST_BOX = 2048
_ROUNDS = 2
_WORTH = 1.25
"""A cause is named only if its remedy makes reading this many times faster."""


@dataclass(frozen=True)
class Storage:
    """Chunks and compression of a copy.

    Attributes:
        chunk: side of the chunks in px; None keeps the slide's chunks.
        raw: without compression; otherwise with the slide's codecs.
    """

    chunk: int | None = None
    raw: bool = False


@dataclass(frozen=True)
class ReadRemedy:
    """A remedy for slow reading.

    Attributes:
        cause: cause of slow reading: chunks, codec, store or format.
        storage: storage of a local copy without this cause.
        text: the remedy in words.
        pixels_per_s: pixels per second that a thread reads from such a copy.
    """

    cause: str
    storage: Storage
    text: str
    pixels_per_s: float


def find_read_remedy(slide: Slide, level: int, channels: tuple[int, ...], folder: Path) -> ReadRemedy | None:
    """Copy a corner of ``slide`` to ``folder`` in several storages and read each; None if no copy reads much faster."""
    chunk = max(_chunk(slide, level))
    side = max(CHUNK, min(_LARGEST_BOX, _CHUNKS_TRIED * chunk))
    height, width = slide.plane_shape(level)
    part = slide.cropped(level, Box(0, 0, min(side, height), min(side, width)))
    part = replace(part, levels=(part.levels[level],))
    own = _rate(part, channels)

    def rate(storage: Storage) -> float:
        return _rate(copy_slide(part, 0, folder, storage), channels)

    if slide.zarr_format is None:
        text = "a conversion to OME-Zarr (cellseg-batch convert)"
        best = ReadRemedy("format", Storage(CHUNK), text, rate(Storage(CHUNK)))
        return best if best.pixels_per_s > _WORTH * own else None
    same = rate(Storage())
    remedies = [(same / own, ReadRemedy("store", Storage(), "a copy on a local disk", same))]
    if chunk < CHUNK:
        larger = rate(Storage(CHUNK))
        remedies.append((larger / same, ReadRemedy("chunks", Storage(CHUNK), f"chunks of {CHUNK} px", larger)))
    raw = rate(Storage(raw=True))
    codec_text = "no compression, or a codec such as lz4,"
    remedies.append((raw / same, ReadRemedy("codec", Storage(raw=True), codec_text, raw)))
    gain, best = max(remedies, key=lambda gain_and_remedy: gain_and_remedy[0])
    return best if gain > _WORTH else None


def copy_slide(slide: Slide, level: int, folder: Path, storage: Storage) -> Slide:
    """Copy ``level`` of ``slide`` and all coarser levels to a zarr hierarchy in ``folder``, which is replaced."""
    zarr_format = slide.zarr_format or 3  # each zarr format has codecs of its own
    group = zarr.open_group(str(folder), mode="w", zarr_format=zarr_format)
    levels = tuple(_copy_level(slide, number, group, storage) for number in range(level, len(slide.levels)))
    return as_zarr(slide, folder, levels, zarr_format)


def _copy_level(slide: Slide, number: int, group: zarr.Group, storage: Storage) -> Level:
    level = slide.levels[number]
    with SlideReader(slide, number, (0,)) as reader:
        source = reader.array
        options: dict[str, Any] = {"shape": level.shape, "dtype": slide.dtype, "chunks": _chunks(slide, level, storage)}
        if slide.zarr_format is not None:
            options |= {"filters": source.filters, "compressors": source.compressors}
            options |= {"shards": source.shards if storage.chunk is None else None}
        if storage.raw:
            options["compressors"] = None
        target = group.create_array(str(number), **options)
        height = level.shape[slide.axes.index("y")]
        for start in range(0, height, _LARGEST_BOX):
            sides = dict(zip(slide.axes, (slice(0, length) for length in level.shape), strict=True))
            sides["y"] = slice(start, min(start + _LARGEST_BOX, height))
            target_index = tuple(sides.values())
            for axis, first in zip("yx", level.origin, strict=True):
                sides[axis] = slice(sides[axis].start + first, sides[axis].stop + first)
            target[target_index] = np.asarray(source[tuple(sides.values())])
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
    """Pixels per second that a thread reads from a slide with a single level; the best of a few rounds."""
    box = Box(0, 0, *slide.plane_shape(0))
    seconds = []
    with SlideReader(slide, 0, channels) as reader:
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            reader.decode(0, box)
            seconds.append(time.perf_counter() - start)
    return box.area / min(seconds)
