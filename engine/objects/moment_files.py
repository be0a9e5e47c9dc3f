"""Write the moments of a slide's objects block by block, then merge them by id in bounded memory.

Each block writes one file.  Only objects that several blocks share are added up; the rest stream through.  This module
knows moments and files; it does not know the run, the slide or the columns of the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.storage.atomic_files import nearby, numbered, whole_file
from cellseg_batch.kernels.moments import Ids, Rows, merge

# Number of ids that are merged at a time; the moments of an object take about 150 bytes.
_IDS = 1 << 16


@dataclass(frozen=True)
class Objects:
    """Moments of some objects.

    Attributes:
        ids: (n,) ascending.
        planes: (n,) int64, number of the t/z plane of each object.
        rows: (n, k) float64, the moments of each object, as `cellseg_batch.kernels.moments_columns` numbers them.
        cells: (n, l) those of its cell; None without cells.
    """

    ids: Ids
    planes: NDArray[np.int64]
    rows: Rows
    cells: Rows | None = None


def write_part(folder: Path, number: int, plane: int, ids: Ids, rows: Rows) -> None:
    """Write the moments of block ``number``, which lies in one plane, and wait until they are on disk.

    Raises:
        OutputError: the folder cannot be written.
    """
    if not len(ids):
        return
    part = np.empty(len(ids), [("id", np.uint64), ("plane", np.int64), ("row", np.float64, rows.shape[1])])
    part["id"], part["plane"], part["row"] = ids, plane, rows
    with whole_file(numbered(folder, number, ".npy")) as stream:
        np.save(stream, part)


def merge_parts(folder: Path) -> Iterator[Objects]:
    """Merge the parts in ``folder``; yields pieces in ascending order of ids, every id once."""
    with nearby(folder) as local:
        yield from _merge(sorted(local.glob("*/*.npy")))


def _merge(paths: list[Path]) -> Iterator[Objects]:
    read_rows = [0] * len(paths)
    next_ids = np.array([_open(path)["id"][0] for path in paths], np.uint64)
    end = np.iinfo(np.uint64).max
    while len(paths) and (start := next_ids.min()) < end:
        pieces = []
        for number in np.flatnonzero(next_ids - start < _IDS):
            part = _open(paths[number])
            stop = int(np.searchsorted(part["id"], start + np.uint64(_IDS)))
            pieces.append(np.array(part[read_rows[number] : stop]))
            read_rows[number] = stop
            next_ids[number] = part["id"][stop] if stop < len(part) else end
        piece = np.concatenate(pieces)
        ids, rows = merge(piece["id"], piece["row"])
        planes = np.empty(len(ids), np.int64)
        planes[np.searchsorted(ids, piece["id"])] = piece["plane"]
        yield Objects(ids, planes, rows)


def _open(path: Path) -> NDArray[Any]:
    part: NDArray[Any] = np.load(path, mmap_mode="r")
    return part
