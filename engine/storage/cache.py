"""Keep compiled artefacts and race results in a folder that many processes share.

An entry is a folder of files, named by the hash of its key.  It is made under a lock in a temporary folder, which is
then renamed.  The checksum of every file is kept and checked on each use, so a torn or damaged entry is made anew.
This module must not know what the files mean.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from cellseg_batch.engine.storage.atomic_files import sync_file

_log = logging.getLogger(__name__)
_KEY, _SUMS = "key.json", "checksums.json"
_PARTIAL = ".partial-"

Key = dict[str, Any]


def cache_folder() -> Path:
    """The folder of entries: ``CELLSEG_CACHE_DIR``, or one below the user's cache folder."""
    chosen = os.environ.get("CELLSEG_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cellseg-batch" / "compiled"


@dataclass(frozen=True)
class Entry:
    """One entry on disk.

    Attributes:
        folder: folder of its files.
        key: key that it was made for; {} if it cannot be read.
        size: size of its files in bytes.
        sound: whether every file exists unchanged.
    """

    folder: Path
    key: Key
    size: int
    sound: bool


class Artefacts:
    """The entries in ``folder``, which is made if it does not exist.

    If the folder cannot be written, entries go to a temporary folder and are lost when this process ends.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = cache_folder() if folder is None else folder
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            writable = os.access(self.folder, os.W_OK)
        except OSError:
            writable = False
        if not writable:
            _log.warning("%s cannot be written: what is compiled now is not kept", self.folder)
            self.folder = Path(tempfile.mkdtemp(prefix="cellseg-batch-"))
            atexit.register(shutil.rmtree, self.folder, ignore_errors=True)

    def find(self, key: Key) -> Path | None:
        """The folder of the sound entry of ``key``; None if there is none."""
        folder = self.folder / _name(key)
        return folder if _is_sound(folder) else None

    def get(self, key: Key, make: Callable[[Path], None]) -> Path:
        """The folder of the entry of ``key``; if there is no sound entry, ``make`` fills its folder.

        If several processes ask at once, the first makes the entry and the others wait for it.
        """
        sound_folder = self.find(key)
        if sound_folder is not None:
            return sound_folder
        folder = self.folder / _name(key)
        with self._locked(folder.name):
            if not _is_sound(folder):  # another process may have made it meanwhile
                self._make(folder, key, make)
        return folder

    def drop(self, key: Key) -> None:
        """Remove the entry of ``key``, if there is one."""
        with self._locked(_name(key)):
            shutil.rmtree(self.folder / _name(key), ignore_errors=True)

    def _make(self, folder: Path, key: Key, make: Callable[[Path], None]) -> None:
        # This process holds the lock, so a partial folder was left by a process that was killed.
        for orphan in self.folder.glob(f"{folder.name}{_PARTIAL}*"):
            shutil.rmtree(orphan, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}{_PARTIAL}", dir=self.folder))
        try:
            make(partial)
            (partial / _KEY).write_text(json.dumps(key, indent=2, sort_keys=True) + "\n")
            sums = {path.name: _checksum(path) for path in sorted(partial.iterdir())}
            (partial / _SUMS).write_text(json.dumps(sums, indent=2) + "\n")
            for path in partial.iterdir():
                sync_file(path)
            shutil.rmtree(folder, ignore_errors=True)
            partial.replace(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def entries(self) -> list[Entry]:
        """Every entry, sound or not."""
        entries = []
        for folder in sorted(self.folder.iterdir()):
            if _PARTIAL in folder.name or not (folder / _KEY).is_file():
                continue
            with suppress(FileNotFoundError):  # another process is removing it
                try:
                    key = json.loads((folder / _KEY).read_text())
                except ValueError:
                    key = {}
                size = sum(path.stat().st_size for path in folder.iterdir())
                entries.append(Entry(folder, key, size, _is_sound(folder)))
        return entries

    def clear(self) -> int:
        """Remove every entry and the remains of killed processes; return the number of entries."""
        count = 0
        for folder in [path for path in self.folder.iterdir() if path.is_dir()]:
            with self._locked(folder.name.partition(".")[0]):
                count += (folder / _KEY).is_file() and _PARTIAL not in folder.name
                shutil.rmtree(folder, ignore_errors=True)
        return count

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with FileLock(self.folder / f"{name}.lock"):
            yield


def _name(key: Key) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def _is_sound(folder: Path) -> bool:
    try:
        sums = json.loads((folder / _SUMS).read_text())
        return bool(sums) and all(_checksum(folder / name) == digest for name, digest in sums.items())
    except (OSError, ValueError, AttributeError):
        return False


def _checksum(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
