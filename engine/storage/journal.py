"""The journal: which parts of an output are safely on disk, in small files, so that a killed run can go on.

    <store>.cellseg/<image>/labels/<name>/
        manifest.json              what was planned; a resumed run must agree with it
        blocks/<n // 1000>/<n>.json   one record per finished block
        levels/<level>/...         one record per finished shard of the label pyramid
        failed/<part>/...          what was given up for now, and why
        finished.json              written last

A record is written after its pixels, to a temporary name, synced and renamed: it is whole or absent.  There is
no database and no server, so any shared file system will do.  It knows nothing of what the records mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from cellseg_batch.engine.errors import writing_to
from cellseg_batch.engine.storage.atomic_files import (
    BUCKET,
    PARTIAL_SUFFIX,
    numbered,
    read_all,
    remove_tree,
    whole_file,
    written_at,
)
from cellseg_batch.engine.storage.paths import RemotePath

_FAILED = "failed"


class Journal:
    """The journal of one output in ``folder``; every method that writes raises OutputError when it cannot."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def manifest(self) -> dict[str, Any] | None:
        """What was planned, None when nothing was."""
        return _load(self.folder / "manifest.json")

    def start(self, manifest: dict[str, Any]) -> None:
        """Begin anew: forget every record and write the manifest."""
        self.clear()
        write_json(self.folder / "manifest.json", manifest)

    def record(self, part: str, number: int, content: dict[str, Any]) -> None:
        """Note that item ``number`` of ``part`` is on disk."""
        write_json(self._path(part, number), content)
        self._path(f"{_FAILED}/{part}", number).unlink(missing_ok=True)

    def fail(self, part: str, number: int, reason: str) -> None:
        """Note why item ``number`` of ``part`` was given up, until it is recorded as done."""
        write_json(self._path(f"{_FAILED}/{part}", number), {"reason": reason})

    def has(self, part: str, number: int) -> bool:
        """Whether item ``number`` of ``part`` is on disk."""
        return self._path(part, number).is_file()

    def get(self, part: str, number: int) -> dict[str, Any] | None:
        """The record of item ``number`` of ``part``, None while it is not on disk."""
        return _load(self._path(part, number))

    def records(self, part: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number, content) of every item of ``part`` that is on disk, in no particular order."""
        for path, content in read_all((self.folder / part).glob("*/*.json")):
            yield int(path.stem), json.loads(content)

    def numbers(self, part: str) -> set[int]:
        """Numbers of the items of ``part`` that are on disk."""
        return {int(path.stem) for path in (self.folder / part).glob("*/*.json")}

    def begun(self) -> float:
        """POSIX time at which the manifest was written."""
        return (self.folder / "manifest.json").stat().st_mtime

    def times(self, part: str) -> list[float]:
        """POSIX time at which each item of ``part`` came to be on disk, in no particular order."""
        return list(written_at(self.folder / part, "*/*.json"))

    def missing(self, part: str, count: int) -> Iterator[int]:
        """Numbers below ``count`` of the items of ``part`` that are not on disk, looked up as they are asked for."""
        for bucket, numbers in groupby(range(count), lambda number: number // BUCKET):
            done = {int(path.stem) for path in (self.folder / part / str(bucket)).glob("*.json")}
            yield from (number for number in numbers if number not in done)

    def finished(self) -> dict[str, Any] | None:
        """The closing record, None while the output is incomplete."""
        return _load(self.folder / "finished.json")

    def finish(self, content: dict[str, Any]) -> None:
        """Close the journal: every part is on disk."""
        write_json(self.folder / "finished.json", content)

    def forget(self, part: str, number: int) -> None:
        """Item ``number`` of ``part`` is to be made again."""
        with writing_to(self.folder, "a journal"):
            for path in (self._path(part, number), self.folder / "finished.json"):
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget everything."""
        with writing_to(self.folder, "a journal"):
            remove_tree(self.folder)

    def _path(self, part: str, number: int) -> Path:
        return numbered(self.folder / part, number, ".json")


def _load(path: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a small file, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    with whole_file(path, "a journal") as stream:
        stream.write(json.dumps(content).encode())


def sweep_partials(folder: Path) -> None:
    """Remove what killed processes left half written: journal entries, and chunks that zarr had not yet renamed.

    Only while no other process writes below ``folder``.
    """
    if isinstance(folder, RemotePath):
        return  # an object is whole or absent
    for path in folder.rglob(f"*{PARTIAL_SUFFIX}"):
        path.unlink(missing_ok=True)
