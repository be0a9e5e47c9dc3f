"""Keep compiled artefacts and race results in a folder that many processes share.

An entry is a folder of files, named by the hash of its key.  It is made under a lock in a temporary folder, which is
then renamed.  The checksum of every file is kept and checked on each use, so a torn or damaged entry is made anew.
This module must not know what the files mean.
"""

from __future__ import annotations

import atexit
import errno
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

from cellseg_batch.engine.errors import UsageError, brief, writing_to
from cellseg_batch.engine.storage.atomic_files import sync_file

_log = logging.getLogger(__name__)
_KEY, _SUMS = "key.json", "checksums.json"
_PARTIAL = ".partial-"
# Errors of a folder that cannot be written, and of a full disk.
_UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT)

Key = dict[str, Any]


def cache_folder() -> Path:
    """The folder of entries: ``CELLSEG_CACHE_DIR``, or one below the user's cache folder."""
    chosen = os.environ.get("CELLSEG_CACHE_DIR")
    if chosen:
        return Path(chosen)
    # For a user without a home, as in containers, the ~ stays, whereas Path.expanduser would raise an error.
    base = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")  # noqa: PTH111
    return Path("/", base) / "cellseg-batch" / "compiled"


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

    Sound entries of a folder that cannot be written are used.  What is missing there is made in a temporary folder and
    lost when this process ends.

    Args:
        folder: the folder; None takes `cache_folder`.
        making: called before an entry is made.

    Attributes:
        kept: the folder, whose entries outlive this process.
    """

    def __init__(self, folder: Path | None = None, making: Callable[[], None] = lambda: None) -> None:
        self._making = making
        self.kept = cache_folder() if folder is None else folder
        self._temporary: Path | None = None
        self._dropped: set[str] = set()

    @property
    def folder(self) -> Path:
        """Folder in which entries are made: the kept one, or a temporary one if that cannot be written."""
        if self._temporary is None and not _is_writable(self.kept):
            self._resort_to_temporary()
        return self._temporary or self.kept

    def find(self, key: Key) -> Path | None:
        """The folder of the sound entry of ``key``; None if there is none."""
        name = _name(key)
        folders = [self.kept / name] if name not in self._dropped else []
        folders += [self._temporary / name] if self._temporary is not None else []
        return next(filter(_is_sound, folders), None)

    def get(self, key: Key, make: Callable[[Path], None]) -> Path:
        """The folder of the entry of ``key``; if there is no sound entry, ``make`` fills its folder.

        If several processes ask at once, the first makes the entry and the others wait for it.

        Raises:
            UsageError: no folder can be written.
        """
        sound_folder = self.find(key)
        if sound_folder is not None:
            return sound_folder
        try:
            return self._get_in(self.folder, key, make)
        except OSError as error:
            if error.errno not in _UNWRITABLE or self._temporary is not None:
                raise
            self._resort_to_temporary()
            return self._get_in(self.folder, key, make)

    def _get_in(self, parent: Path, key: Key, make: Callable[[Path], None]) -> Path:
        folder = parent / _name(key)
        with self._locked(folder):
            if not _is_sound(folder):  # another process may have made it meanwhile
                self._make(folder, key, make)
        return folder

    def _resort_to_temporary(self) -> None:
        _log.warning("%s cannot be written: what is compiled now is not kept", self.kept)
        try:
            self._temporary = Path(tempfile.mkdtemp(prefix="cellseg-batch-"))
        except OSError as error:
            raise UsageError(
                str(self.kept),
                expected="a folder for compiled networks and race results that can be written, or a temporary one",
                found=brief(error),
                cause="a read-only or full disk",
                remedy="name a folder with the environment variable CELLSEG_CACHE_DIR",
            ) from error
        atexit.register(shutil.rmtree, self._temporary, ignore_errors=True)

    def drop(self, key: Key) -> None:
        """Remove the entry of ``key``, if there is one; what cannot be removed is passed over."""
        name = _name(key)
        with self._locked(self.folder / name):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        if self.folder != self.kept:
            self._dropped.add(name)

    def _make(self, folder: Path, key: Key, make: Callable[[Path], None]) -> None:
        # This process holds the lock, so a partial folder was left by a process that was killed.
        for orphan in folder.parent.glob(f"{folder.name}{_PARTIAL}*"):
            shutil.rmtree(orphan, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}{_PARTIAL}", dir=folder.parent))
        self._making()
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
        for folder in sorted(self._folders()):
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
        """Remove every entry and the remains of killed processes; return the number of entries.

        Raises:
            OutputError: the folder cannot be written.
        """
        count = 0
        for folder in [path for path in self._folders() if path.is_dir()]:
            entry = folder.with_name(folder.name.partition(".")[0])
            with writing_to(self.kept, "a cache"), self._locked(entry):
                count += (folder / _KEY).is_file() and _PARTIAL not in folder.name
                shutil.rmtree(folder, ignore_errors=True)
        return count

    def _folders(self) -> list[Path]:
        """Everything in the kept folder; nothing if there is no such folder."""
        try:
            return list(self.kept.iterdir())
        except OSError:
            return []

    @contextmanager
    def _locked(self, folder: Path) -> Iterator[None]:
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            yield


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


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
