"""The journal: which parts of an output are safely on disk, in small files, so that a killed run can go on.

    <store>.cellseg/<image>/labels/<name>/
        manifest.json              what was planned; a resumed run must agree with it
        blocks/<n // 1000>/<n>.json   one record per finished block
        levels/<level>/...         one record per finished shard of the label pyramid
        finished.json              written last

A record is written after its pixels, to a temporary name, synced and renamed: it is whole or absent.  There is
no database and no server, so any shared file system will do.  It knows nothing of what the records mean.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cellseg_batch.engine.errors import writing_to

_BUCKET = 1000


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
        _store(self.folder / "manifest.json", manifest)

    def record(self, part: str, number: int, content: dict[str, Any]) -> None:
        """Note that item ``number`` of ``part`` is on disk."""
        _store(self._path(part, number), content)

    def has(self, part: str, number: int) -> bool:
        """Whether item ``number`` of ``part`` is on disk."""
        return self._path(part, number).exists()

    def records(self, part: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number, content) of every item of ``part`` that is on disk, in no particular order."""
        for path in (self.folder / part).glob("*/*.json"):
            content = _load(path)
            if content is not None:
                yield int(path.stem), content

    def numbers(self, part: str) -> set[int]:
        """Numbers of the items of ``part`` that are on disk."""
        return {int(path.stem) for path in (self.folder / part).glob("*/*.json")}

    def missing(self, part: str, count: int) -> Iterator[int]:
        """Numbers below ``count`` of the items of ``part`` that are not on disk, looked up as they are asked for."""
        for first in range(0, count, _BUCKET):
            bucket = self.folder / part / str(first // _BUCKET)
            done = {int(path.stem) for path in bucket.glob("*.json")}
            yield from (number for number in range(first, min(first + _BUCKET, count)) if number not in done)

    def finished(self) -> dict[str, Any] | None:
        """The closing record, None while the output is incomplete."""
        return _load(self.folder / "finished.json")

    def finish(self, content: dict[str, Any]) -> None:
        """Close the journal: every part is on disk."""
        _store(self.folder / "finished.json", content)

    def clear(self) -> None:
        """Forget everything."""
        if self.folder.exists():
            with writing_to(self.folder, "a journal"):
                shutil.rmtree(self.folder)

    def _path(self, part: str, number: int) -> Path:
        return self.folder / part / str(number // _BUCKET) / f"{number}.json"


def _load(path: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    return content


def _store(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with writing_to(path, "a journal"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "w") as stream:
            json.dump(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
