"""Check that an output is on disk as the journal records it: every task of the plan, and the pixels that it wrote.

Every record has the boxes that its task wrote, each with a checksum of its pixels, so this module need not know the
work of a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.errors import OutputError, SlideError
from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.run.pipeline import Pass
from cellseg_batch.engine.run.records import TaskRecord
from cellseg_batch.engine.slides.writer import ImageWriter
from cellseg_batch.engine.storage.checksums import checksum
from cellseg_batch.engine.storage.journal import Journal

_SAMPLE = 4
# (path of an image in its store, level, plane, box) -> pixels (h, w)
Read = Callable[[str, int, int, Box], NDArray[Any]]


def demand_complete(journal: Journal, images: list[ImageWriter], passes: Iterable[Pass]) -> None:
    """Check the journal against the plan and, for a few tasks of each pass, the pixels against the journal.

    Args:
        journal: journal of the output.
        images: images that are written.
        passes: passes over the slide.

    Raises:
        OutputError: a task has no record, or pixels differ from those that a task wrote.
    """
    by_path = {image.path: image for image in images}

    def read(path: str, level: int, plane: int, box: Box) -> NDArray[Any]:
        return by_path[path].read(level, plane, box)

    for slide_pass in passes:
        name, count = slide_pass.name, slide_pass.count
        missing = list(islice(journal.missing(name, count), 1))
        sample = {int(number) for number in np.linspace(0, count - 1, min(count, _SAMPLE))}
        records = {number: journal.get(name, number, TaskRecord[Any]) for number in sample - set(missing)}
        wrong = missing or [number for number, record in records.items() if record and any(differences(read, record))]
        if wrong:
            raise OutputError(
                str(journal.folder),
                expected=f"{count} finished tasks of {name}, as planned, with their pixels on disk",
                found=f"no record of task {wrong[0]}" if missing else f"other pixels than task {wrong[0]} wrote",
                cause="files that were changed or removed meanwhile",
                remedy="run with `overwrite`",
            )


def differences(read: Read, record: TaskRecord[Any]) -> Iterator[str]:
    """Describe each box that a record's task wrote and whose pixels on disk differ now, one line per box.

    Args:
        read: reads the pixels (h, w) of a box, from the path of the image in its store, the level, plane and box.
        record: record from the journal.
    """
    for written in record.written:
        box = Box(*written.box)
        location = f"{written.path}/{written.level}, plane {written.plane}, {box.y0}:{box.y1}, {box.x0}:{box.x1}"
        try:
            pixels = read(written.path, written.level, written.plane, box)
        except SlideError as error:
            yield f"{location}: {error.detail}"
            continue
        if checksum(pixels) != written.crc32:
            yield f"{location}: not what was written"
