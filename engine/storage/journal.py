"""Record in small files which parts of an output are safely on disk, so that a killed run can go on.

    <store>.cellseg/<image>/labels/<name>/
        manifest.json              the plan; a resumed run must agree with it
        blocks/<n // 1000>/<n>.json   one record per finished block
        levels/<level>/...         one record per finished shard of the label pyramid
        failed/<part>/...          items given up for now, with reasons
        finished.json              written last

A record is written after its pixels, to a temporary name, then synced and renamed: it is whole or absent.  There is no
database and no server, so any shared file system will do.  The journal does not know what its records mean: a caller
that reads a record names the dataclass that was written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

from cellseg_batch.engine.errors import writing_to
from cellseg_batch.engine.storage.atomic_files import (
    BUCKET,
    PARTIAL_SUFFIX,
    numbered,
    read_all,
    remove_tree,
    written_at,
)
from cellseg_batch.engine.storage.paths import RemotePath
from cellseg_batch.engine.storage.records import Record, read_record, write_record

_FAILED = "failed"
# Names of records; other programs may leave files of their own, such as ._0.json.
_NUMBERED_FILE = "[0-9]*.json"
_NUMBERED = f"*/{_NUMBERED_FILE}"


@dataclass(frozen=True)
class Failure:
    """A note that a task was given up.

    Attributes:
        reason: the reason, in one line.
    """

    reason: str


class Journal:
    """The journal of one output, in ``folder``.

    A method that writes raises OutputError if it cannot write.  A method that reads raises OutputError if a record is
    damaged or of another version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def is_begun(self) -> bool:
        """Whether there is a manifest."""
        return _is_there(self._manifest)

    @property
    def is_finished(self) -> bool:
        """Whether there is a closing record."""
        return _is_there(self._finished)

    def manifest(self, kind: type[Record]) -> Record | None:
        """The manifest; None if there is none."""
        return read_record(self._manifest, kind)

    def start(self, manifest: object) -> None:
        """Begin anew: remove every record and write the manifest."""
        self.clear()
        write_record(self._manifest, manifest)

    def record(self, part: str, number: int, record: object) -> None:
        """Note that item ``number`` of ``part`` is on disk."""
        write_record(self._path(part, number), record)
        self._path(f"{_FAILED}/{part}", number).unlink(missing_ok=True)

    def fail(self, part: str, number: int, reason: str) -> None:
        """Keep the reason why item ``number`` of ``part`` was given up, until the item is recorded as done."""
        write_record(self._path(f"{_FAILED}/{part}", number), Failure(reason))

    def has(self, part: str, number: int) -> bool:
        """Whether item ``number`` of ``part`` is on disk."""
        return self._path(part, number).is_file()

    def get(self, part: str, number: int, kind: type[Record]) -> Record | None:
        """The record of item ``number`` of ``part``; None while the item is not on disk."""
        return read_record(self._path(part, number), kind)

    def records(self, part: str, kind: type[Record]) -> Iterator[tuple[int, Record]]:
        """(number, record) of every item of ``part`` that is on disk, in no particular order."""
        records = read_all((self.folder / part).glob(_NUMBERED), partial(read_record, kind=kind))
        yield from ((int(path.stem), record) for path, record in records)

    def numbers(self, part: str) -> set[int]:
        """Numbers of the items of ``part`` that are on disk."""
        return {int(path.stem) for path in (self.folder / part).glob(_NUMBERED)}

    def begun(self) -> float:
        """POSIX time in seconds at which the manifest was written."""
        return self._manifest.stat().st_mtime

    def times(self, part: str) -> list[float]:
        """POSIX time in seconds at which each item of ``part`` was recorded, in no particular order."""
        return list(written_at(self.folder / part, _NUMBERED))

    def missing(self, part: str, count: int) -> Iterator[int]:
        """Numbers below ``count`` of the items of ``part`` that are not on disk, looked up lazily."""
        for bucket, numbers in groupby(range(count), lambda number: number // BUCKET):
            done = {int(path.stem) for path in (self.folder / part / str(bucket)).glob(_NUMBERED_FILE)}
            yield from (number for number in numbers if number not in done)

    def finished(self, kind: type[Record]) -> Record | None:
        """The closing record; None while the output is incomplete."""
        return read_record(self._finished, kind)

    def finish(self, record: object) -> None:
        """Close the journal: every part is on disk."""
        write_record(self._finished, record)

    def forget(self, part: str, number: int) -> None:
        """Remove the record of item ``number`` of ``part`` and the closing record, so that the item is made again."""
        with writing_to(self.folder, "a journal"):
            for path in (self._path(part, number), self._finished):
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove the journal."""
        with writing_to(self.folder, "a journal"):
            remove_tree(self.folder)

    @property
    def _manifest(self) -> Path:
        return self.folder / "manifest.json"

    @property
    def _finished(self) -> Path:
        return self.folder / "finished.json"

    def _path(self, part: str, number: int) -> Path:
        return numbered(self.folder / part, number, ".json")


def _is_there(path: Path) -> bool:
    """Whether there is a record, or something in its place that cannot be read as one, as its reader says."""
    try:
        return path.is_file() if isinstance(path, RemotePath) else path.exists()
    except PermissionError:
        return True


def sweep_partials(folder: Path) -> None:
    """Remove half-written files of killed processes: journal entries, and chunks that zarr had not yet renamed.

    Call it only while no other process writes below ``folder``.
    """
    if isinstance(folder, RemotePath):
        return  # an object is whole or absent
    for path in folder.rglob(f"*{PARTIAL_SUFFIX}"):
        path.unlink(missing_ok=True)
