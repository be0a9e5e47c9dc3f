"""Note the boxes that a task writes, each with a checksum of its pixels, for the task's record in the journal."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.storage.records import Count


@dataclass(frozen=True)
class WrittenBox:
    """Pixels that a task has put on disk.

    Attributes:
        path: path of the image inside its store.
        level: level of the image.
        plane: t/z plane of the image.
        box: (y0, x0, y1, x1) in px of the level.
        crc32: `checksum` of the pixels.
    """

    path: str
    level: Count
    plane: Count
    box: tuple[Count, Count, Count, Count]
    crc32: Count


_notes: ContextVar[list[WrittenBox] | None] = ContextVar("notes", default=None)


@contextmanager
def noting_writes() -> Iterator[list[WrittenBox]]:
    """Collect the boxes that this thread writes while the context lasts."""
    notes: list[WrittenBox] = []
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


def note_write(path: str, level: int, plane: int, box: Box, pixels: NDArray[Any]) -> None:
    """Note that ``pixels`` (h, w), in the type that is stored, are on disk; outside `noting_writes` do nothing."""
    notes = _notes.get()
    if notes is not None:
        corners = box.y0, box.x0, box.y1, box.x1
        notes.append(WrittenBox(path, level, plane, corners, checksum(pixels)))


def checksum(pixels: NDArray[Any]) -> int:
    """CRC-32 of the pixels (h, w), row by row, in native byte order."""
    return zlib.crc32(np.ascontiguousarray(pixels).data)
