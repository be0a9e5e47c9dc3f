"""Whether what the journal says is on disk: every task of the plan, and the pixels that it wrote.

Every record has the boxes that its task wrote, each with a checksum of its pixels, so nothing here needs to know what
the passes do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.errors import OutputError, SlideError
from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.slides.writer import ImageWriter
from cellseg_batch.engine.storage.checksums import checksum
from cellseg_batch.engine.storage.journal import Journal

_SAMPLE = 4
# (path of an image in its store, level, plane, box) -> pixels (h, w)
Read = Callable[[str, int, int, Box], NDArray[Any]]


def demand_complete(journal: Journal, images: list[ImageWriter], parts: Iterable[tuple[str, int]]) -> None:
    """Hold the journal against the plan and, for a few tasks of each part, the pixels against the journal.

    Args:
        journal: of the output.
        images: that are written.
        parts: (name, number of tasks) of each part of the journal.

    Raises:
        OutputError: something is missing or differs.
    """
    by_path = {image.path: image for image in images}

    def read(path: str, level: int, plane: int, box: Box) -> NDArray[Any]:
        return by_path[path].read(level, plane, box)

    for part, count in parts:
        missing = list(islice(journal.missing(part, count), 1))
        sample = {int(number) for number in np.linspace(0, count - 1, min(count, _SAMPLE))}
        wrong = missing or [number for number in sample if any(differences(read, journal.get(part, number) or {}))]
        if wrong:
            raise OutputError(
                str(journal.folder),
                expected=f"{count} finished tasks of {part}, as planned, with their pixels on disk",
                found=f"no record of task {wrong[0]}" if missing else f"other pixels than task {wrong[0]} wrote",
                cause="files that were changed or removed meanwhile",
                remedy="run with --overwrite",
            )


def differences(read: Read, record: dict[str, Any]) -> Iterator[str]:
    """What a record's task wrote and is no longer so on disk, one line each.

    Args:
        read: gives the pixels (h, w) of a box of a plane of a level of the image at a path in its store.
        record: of the journal.
    """
    for path, level, plane, corners, noted in record.get("written", ()):
        where = f"{path}/{level}, plane {plane}, {corners[0]}:{corners[2]}, {corners[1]}:{corners[3]}"
        try:
            pixels = read(path, level, plane, Box(*corners))
        except SlideError as error:
            yield f"{where}: {error.detail}"
            continue
        if checksum(pixels) != noted:
            yield f"{where}: not what was written"
