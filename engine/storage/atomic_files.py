"""Write files that are whole or absent, and spread many of them over folders.

It must not know the content of the files.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from secrets import token_hex
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import IO, TypeVar

from cellseg_batch.engine.errors import UsageError, writing_to
from cellseg_batch.engine.storage.paths import RemotePath

Content = TypeVar("Content")

# Number of numbered files that share a folder.
BUCKET = 1000
# zarr's local stores use the same suffix.
PARTIAL_SUFFIX = ".partial"
# Number of a store's objects that are read at a time: each takes long to arrive but is small.
_REQUESTS = 32


def numbered(folder: Path, number: int, suffix: str) -> Path:
    """Path of file ``number`` of many in ``folder``, whose subfolders hold `BUCKET` files each."""
    return folder / str(number // BUCKET) / f"{number}{suffix}"


def sync_file(path: Path) -> None:
    """Wait until a file, if it exists, is on disk; an object of a store is safe as soon as it exists."""
    with suppress(FileNotFoundError):
        if not isinstance(path, RemotePath):
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())


def read_all(paths: Iterable[Path], read: Callable[[Path], Content | None]) -> Iterator[tuple[Path, Content]]:
    """(path, what ``read`` returns) of each file for which that is not None; several objects are read at a time."""
    remaining = iter(paths)
    with ThreadPoolExecutor(_REQUESTS) as pool:
        while batch := list(islice(remaining, _REQUESTS)):
            contents = pool.map(read, batch) if isinstance(batch[0], RemotePath) else map(read, batch)
            yield from ((path, content) for path, content in zip(batch, contents, strict=True) if content is not None)


def _bytes_of(path: Path) -> bytes | None:
    """The content of a file; None if there is none any more."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def written_at(folder: Path, pattern: str) -> Iterator[float]:
    """POSIX time in seconds at which each file below ``folder`` that matches the glob ``pattern`` was written."""
    if isinstance(folder, RemotePath):
        return (moment for path, moment in folder.written() if path.match(pattern))
    return (path.stat().st_mtime for path in folder.glob(pattern))


@contextmanager
def nearby(folder: Path) -> Iterator[Path]:
    """A folder on this machine with the files of ``folder``, where libraries can map them: itself or a copy."""
    if not isinstance(folder, RemotePath):
        yield folder
        return
    with TemporaryDirectory(prefix="cellseg-") as copy:
        for path, content in read_all(folder.rglob("*"), _bytes_of):
            target = Path(copy) / path.relative_to(folder).as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        yield Path(copy)


def remove_tree(folder: Path) -> None:
    """Remove a folder and everything in it, if it exists."""
    if isinstance(folder, RemotePath):
        folder.remove_tree()
    elif folder.exists():
        shutil.rmtree(folder)


def create_once(path: Path, content: bytes, what: str = "a file") -> bool:
    """Create a file, complete and on disk, unless there is one; whether it was created.

    Args:
        path: path of the file; its folder is made.
        content: content of the file.
        what: name of the thing that is written, for the error.

    Raises:
        OutputError: the file cannot be written.
    """
    with writing_to(path, what):
        if isinstance(path, RemotePath):
            return path.write_if(content, None)
        if path.exists():
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{token_hex(4)}{PARTIAL_SUFFIX}")
        try:
            with open(partial, "xb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.link(partial, path)
        except FileExistsError:
            return False
        finally:
            partial.unlink(missing_ok=True)
    return True


@contextmanager
def whole_file(path: Path, what: str = "a file") -> Iterator[IO[bytes]]:
    """Open a file that appears at ``path``, complete and on disk, once the context ends without an error.

    Args:
        path: path of the file; its folder is made.
        what: name of the thing that is written, for the error.

    Raises:
        OutputError: the file cannot be written.
    """
    if isinstance(path, RemotePath):
        with NamedTemporaryFile() as stream:
            yield stream
            stream.seek(0)
            with writing_to(path, what):
                path.write(stream)
        return
    partial = path.with_name(f"{path.name}.{token_hex(4)}{PARTIAL_SUFFIX}")
    with writing_to(path, what):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
    try:
        try:
            with open(partial, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
        except OSError:  # other errors are not about the file; on a full disk closing it fails, too
            with writing_to(path, what):
                raise
        with writing_to(path, what):
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def refuse_all_but_files(out: Path) -> None:
    """Refuse an output file that `whole_file` would put in the place of a folder, a device or a pipe.

    Raises:
        UsageError: one of them is there.
    """
    if out.exists() and not out.is_file():
        found = "a folder" if out.is_dir() else "a device or a pipe"
        raise UsageError(f"`out={out}`", expected="a file", found=found, remedy="name a file in a folder")


@contextmanager
def whole_folder(path: Path, what: str = "a store") -> Iterator[Path]:
    """Make a folder that appears at ``path``, complete and on disk, once the context ends without an error.

    Args:
        path: path of the folder on this machine, where there is nothing yet; the folder around it is made.
        what: name of the thing that is written, for the error.

    Raises:
        OutputError: the folder cannot be written.
    """
    partial = path.with_name(f"{path.name}.{token_hex(4)}{PARTIAL_SUFFIX}")
    with writing_to(path, what):
        partial.mkdir(parents=True)
    try:
        yield partial
        with writing_to(path, what):
            for file in partial.rglob("*"):
                if file.is_file():
                    sync_file(file)
            partial.rename(path)
    finally:
        remove_tree(partial)
