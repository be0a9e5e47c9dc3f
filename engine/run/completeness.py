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
from cellseg_batch.engine.run.pipeline import Pass
from cellseg_batch.engine.run.records import TaskRecord
from cellseg_batch.engine.slides.writer import ImageWriter
from cellseg_batch.engine.storage.checksums import checksum
from cellseg_batch.engine.storage.journal import Journal

_SAMPLE = 4
# (path of an image in its store, level, plane, box) -> pixels (h, w)
Read = Callable[[str, int, int, Box], NDArray[Any]]


def demand_complete(journal: Journal, images: list[ImageWriter], passes: Iterable[Pass]) -> None:
    """Hold the journal against the plan and, for a few tasks of each pass, the pixels against the journal.

    Args:
        journal: of the output.
        images: that are written.
        passes: over the slide.

    Raises:
        OutputError: something is missing or differs.
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
    """What a record's task wrote and is no longer so on disk, one line each.

    Args:
        read: gives the pixels (h, w) of a box of a plane of a level of the image at a path in its store.
        record: of the journal.
    """
    for written in record.written:
        box = Box(*written.box)
        where = f"{written.path}/{written.level}, plane {written.plane}, {box.y0}:{box.y1}, {box.x0}:{box.x1}"
        try:
            pixels = read(written.path, written.level, written.plane, box)
        except SlideError as error:
            yield f"{where}: {error.detail}"
            continue
        if checksum(pixels) != written.crc32:
            yield f"{where}: not what was written"
