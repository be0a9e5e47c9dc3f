"""Give what lies in a zip archive the methods of paths, and zarr its store; archives are read and never written.

This module must not know slides.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PosixPath
from stat import S_IFDIR, S_IFREG
from typing import TYPE_CHECKING
from zipfile import ZipFile

if TYPE_CHECKING:
    from zarr.storage import StorePath, ZipStore

SUFFIXES = (".zarr.zip", ".ozx")
# Archives that stay open; the members of one with a million chunks take half a gigabyte.
_KEPT = 2


class ArchivedPath(PosixPath):
    """The path of an archive, which is a folder here, or of a file or folder in it."""

    def __fspath__(self) -> str:
        raise TypeError(f"{self} lies in an archive; unpack it")

    def resolve(self, strict: bool = False) -> ArchivedPath:
        """The path with links to the archive followed."""
        return ArchivedPath(os.path.realpath(str(self)))

    def is_file(self) -> bool:
        """Whether it is a file in the archive."""
        archive, inside = _split(self)
        return archive is not None and inside in archive.files

    def is_dir(self) -> bool:
        """Whether it is the archive, or a folder in it."""
        archive, inside = _split(self)
        return archive is not None and inside in archive.folders

    def is_symlink(self) -> bool:
        """False: archives have no links that are followed."""
        return False

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        """Whether it is a file or folder in the archive."""
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Generator[ArchivedPath, None, None]:
        """What lies directly in the folder."""
        archive, inside = _split(self)
        return (self / name for name in sorted(archive.folders[inside])) if archive is not None else (_ for _ in ())

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Its kind, and nothing else.

        Raises:
            FileNotFoundError: there is no such file or folder.
        """
        if not self.exists():
            raise FileNotFoundError(str(self))
        return os.stat_result((S_IFREG if self.is_file() else S_IFDIR, *(0,) * 9))

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        """The content of a file as text.

        Raises:
            FileNotFoundError: there is no such file.
        """
        archive, inside = _split(self)
        if archive is None or inside not in archive.files:
            raise FileNotFoundError(str(self))
        with ZipFile(archive.path) as members:
            return members.read(inside).decode(encoding or "utf-8", errors or "strict")


def is_archive(path: Path) -> bool:
    """Whether a file on this machine is an archive by its name."""
    return path.name.lower().endswith(SUFFIXES) and Path(str(path)).is_file()


def archived_store(path: Path) -> StorePath | None:
    """The store of an archive, or of a group in it, for zarr; None if the path leads into no archive."""
    archive, inside = _split(path)
    if archive is None:
        return None
    from zarr.storage import StorePath

    return StorePath(archive.store, inside)


@dataclass(frozen=True)
class _Archive:
    """An open archive.

    Attributes:
        path: its file.
        store: its store for zarr, which threads may share.
        files: paths inside it.
        folders: path inside it -> names of what lies directly in the folder.
    """

    path: Path
    store: ZipStore
    files: frozenset[str]
    folders: dict[str, set[str]]


def _split(path: Path) -> tuple[_Archive | None, str]:
    """(archive, path inside it) of a path; (None, "") if it leads into no archive."""
    for place in (path, *path.parents):
        if is_archive(place):
            archive = Path(str(place))
            inside = path.relative_to(place).as_posix()
            return _opened(archive, archive.stat().st_mtime_ns), "" if inside == "." else inside
    return None, ""


@lru_cache(maxsize=_KEPT)
def _opened(path: Path, changed: int) -> _Archive:
    """Open an archive; again when the time of its last change, in ns of POSIX time, is another."""
    from zarr.core.sync import sync
    from zarr.storage import ZipStore

    with ZipFile(path) as members:
        names = members.namelist()
    folders: dict[str, set[str]] = {"": set()}
    for name in names:
        # Members that are folders end in a slash, and need not be listed.
        place = name
        while place:
            parent, _, last = place.rpartition("/")
            if last:
                folders.setdefault(parent, set()).add(last)
            place = parent
    # zarr opens stores in its own loop, and not by itself if they are given with a path.
    store = sync(ZipStore.open(path, mode="r"))
    return _Archive(path, store, frozenset(name for name in names if not name.endswith("/")), folders)
