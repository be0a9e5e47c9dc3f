"""Give paths on this machine and names in object stores the same methods.

``s3://bucket/slide.zarr`` becomes a `RemotePath`, which other folders use like the path of a local folder.  An object
exists whole or not at all, and is safe once its store has confirmed it; a folder is a common beginning of names.
Credentials come from the environment and stay in the client.  This module must not know slides, journals or locks.
"""

from __future__ import annotations

import io
import os
import posixpath
import re
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path, PosixPath
from stat import S_ISDIR
from typing import IO, TYPE_CHECKING, Any, BinaryIO, Self
from urllib.parse import unquote, urlsplit

from cellseg_batch.engine.errors import UsageError
from cellseg_batch.engine.machine import is_path
from cellseg_batch.engine.storage.archives import archived_store
from cellseg_batch.engine.storage.object_stores import SCHEMES, WEB, StoreError, asking, client_of, library, refusals

if TYPE_CHECKING:
    from zarr.storage import ObjectStore, StorePath

_READ_BYTES = 1 << 20

Version = dict[str, str]


def locate(path: str | Path) -> Path:
    """Make a path of a URL of an object store, a ``file://`` URL or a path on this machine.

    Raises:
        UsageError: the text is empty or can be no path, or the URL is of another kind, or has a user's name or a query
            in it.
    """
    text = str(path)
    if not text:  # `Path` would take it for the current folder
        raise UsageError(
            repr(text),
            expected="a path or a URL",
            found="an empty text",
            remedy="name a file, a store or a folder; . is the current one",
        )
    if not re.match(r"[a-z][a-z0-9+.-]+://", text):
        return _local(text)
    url = urlsplit(text)
    if url.scheme == "file":
        return _local(unquote(url.path))
    shown = f"{url.scheme}://{url.hostname or ''}{url.path}"
    if url.scheme not in SCHEMES or not url.hostname:
        raise UsageError(
            shown,
            expected=f"a path, or a URL such as s3://bucket/slide.zarr (of {', '.join(SCHEMES)} or file)",
            found=f"{url.scheme}://",
            remedy="check the spelling, or copy it to where it can be read",
        )
    if url.username or url.query:
        raise UsageError(
            shown,
            expected="a URL without credentials",
            found="a user's name or a query in it",
            remedy="set the credentials in the environment",
        )
    return RemotePath(text)


def _local(text: str) -> Path:
    if not is_path(text):
        raise UsageError(
            ascii(text),
            expected="a path or a URL",
            found="a text that is none: a name in it is longer than 255 bytes, or has characters that no name can have",
            remedy="check the spelling",
        )
    return Path(text)


def printable(text: str) -> str:
    """A text that any file in UTF-8 can hold: bytes of file names that are no UTF-8 are written as ``\\udc..``."""
    return text.encode("utf-8", "backslashreplace").decode()


class RemotePath(PosixPath):
    """The name of an object, or of a folder of objects.

    It has the methods of `Path` that other folders use; a method that would ask the operating system raises TypeError.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return text.replace(":/", "://", 1) if self.parts and self.parts[0][:-1] in SCHEMES else text

    def __fspath__(self) -> str:
        raise TypeError(f"{self} does not lie on this machine")

    def resolve(self, strict: bool = False) -> Self:
        """The same path without ``..`` in it."""
        return type(self)(posixpath.normpath("/".join(self.parts)))

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        if not self.key:
            return False
        try:
            self._head()
        except FileNotFoundError:
            return False
        except StoreError as error:
            # A store that does not allow listing refuses requests for missing objects.
            if isinstance(error.__cause__, refusals()):
                return False
            raise
        return True

    def is_dir(self) -> bool:
        """Whether there is an object below; always False on a web server."""
        return not is_web(self) and any(self._list().values())

    def exists(self) -> bool:
        """Whether it is an object or a folder."""
        return self.is_file() or self.is_dir()

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Size in bytes and time of writing, by the store's clock; both are 0 for a folder.

        Raises:
            FileNotFoundError: there is no such object or folder.
        """
        try:
            metadata = self._head()
            size, moment = metadata["size"], metadata["last_modified"].timestamp()
        except FileNotFoundError:
            if not self.is_dir():
                raise
            size, moment = 0, 0.0
        times = {"st_mtime": moment, "st_mtime_ns": int(moment * 1e9)}
        return os.stat_result((0, 0, 0, 0, 0, 0, size, 0, int(moment), 0), times)

    def iterdir(self) -> Generator[Self, None, None]:
        """The folders and objects directly below."""
        listing = self._list()
        names = [*listing["common_prefixes"], *(metadata["path"] for metadata in listing["objects"])]
        return (self / posixpath.basename(name) for name in names)

    def glob(self, pattern: str) -> Generator[Self, None, None]:
        """The objects below whose names match ``pattern``; folders never match."""
        if "/" not in pattern:
            return (path for path in self.iterdir() if path.match(pattern))
        depth = len(self.parts) + pattern.count("/") + 1
        return (path for path in self.rglob(pattern) if len(path.parts) == depth)

    def rglob(self, pattern: str) -> Generator[Self, None, None]:
        """The objects at any depth below whose names match ``pattern``; folders never match."""
        return (path for path, _ in self.written() if path.match(pattern))

    def written(self) -> Iterator[tuple[Self, float]]:
        """(path, POSIX time of writing in seconds) of every object below."""
        root = type(self)(*self.parts[:2])
        with self._asking():
            for objects in library().list(self.client, self.key):
                yield from ((root / metadata["path"], metadata["last_modified"].timestamp()) for metadata in objects)

    def read_bytes(self) -> bytes:
        """The object's content."""
        return self.read_version()[0]

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        """The object's content as text."""
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def read_version(self) -> tuple[bytes, Version]:
        """The object's content, and a mark that changes with it."""
        with self._asking():
            answer = library().get(self.client, self.key)
            return bytes(answer.bytes()), {name: mark for name in ("e_tag", "version") if (mark := answer.meta[name])}

    def version(self) -> str:
        """The object's size and e-tag, without its content.

        Raises:
            FileNotFoundError: there is no such object.
        """
        metadata = self._head()
        return f"{metadata['size']} {metadata['e_tag']}"

    def reader(self) -> BinaryIO:
        """The object as an open file that fetches only the parts that are read."""
        return io.BufferedReader(_Reader(self), _READ_BYTES)

    def read_range(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of the object."""
        with self._asking():
            return bytes(library().get_range(self.client, self.key, start=start, end=stop))

    def write(self, content: bytes | IO[bytes]) -> None:
        """Create or replace the object, and wait until it is safe."""
        with self._asking():
            library().put(self.client, self.key, content)

    def write_if(self, content: bytes, version: Version | None) -> bool:
        """Write the object if its present version is ``version``, or None if there is none; whether it was written."""
        exceptions = library().exceptions
        with self._asking():
            try:
                library().put(self.client, self.key, content, mode=version or "create")
                return True
            except (exceptions.AlreadyExistsError, exceptions.PreconditionError, FileNotFoundError):
                # A request that is repeated because its answer was lost finds the object that it has written.
                return self._reads(content)

    def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:
        """Write an empty object."""
        self.write(b"")

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object, if there is one."""
        with self._asking():
            library().delete(self.client, self.key)

    def remove_tree(self) -> None:
        """Remove everything below."""
        with self._asking():
            for objects in library().list(self.client, self.key):
                library().delete(self.client, [metadata["path"] for metadata in objects])

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a folder exists as soon as there is an object in it."""

    def rmdir(self) -> None:
        """Do nothing: a folder vanishes with its last object."""

    @property
    def scheme(self) -> str:
        """The URL's scheme, one of `SCHEMES`."""
        return self.parts[0][:-1]

    @property
    def bucket(self) -> str:
        """The bucket, or the name and port of the web server."""
        return self.parts[1]

    @property
    def key(self) -> str:
        """The object's name within the bucket or the server."""
        return "/".join(self.resolve().parts[2:])

    @property
    def client(self) -> Any:
        """The client of the bucket or the server, an ``obstore.store.ObjectStore``."""
        return client_of(self.scheme, self.bucket)

    def _reads(self, content: bytes) -> bool:
        with suppress(FileNotFoundError):
            return self.read_bytes() == content
        return False

    def _head(self) -> Any:
        with self._asking():
            return library().head(self.client, self.key)

    def _list(self) -> Any:
        with self._asking():
            return library().list_with_delimiter(self.client, self.key)

    def _asking(self) -> AbstractContextManager[None]:
        return asking(str(self))


class _Reader(io.RawIOBase):
    """An object as a file, for one thread at a time."""

    def __init__(self, path: RemotePath) -> None:
        self._path, self._size, self._position = path, path.stat().st_size, 0
        self.name = str(path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        stop = min(self._position + len(buffer), self._size)
        if self._position >= stop:
            return 0
        part = self._path.read_range(self._position, stop)
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)


def is_web(path: Path) -> bool:
    """Whether a path is on a web server, which allows neither listing nor writing."""
    return isinstance(path, RemotePath) and path.scheme in WEB


def version_of(path: Path) -> str:
    """A text that changes with the content of a file, object or folder: its size, and its time of writing or e-tag."""
    try:
        if isinstance(path, RemotePath):
            return path.version()
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return "absent"
    return f"{0 if S_ISDIR(status.st_mode) else status.st_size} {status.st_mtime_ns}"


def readable(path: Path) -> Path | BinaryIO:
    """The argument for a library that reads files: the path itself on this machine, else an open file."""
    return path.reader() if isinstance(path, RemotePath) else path


def zarr_store(path: Path) -> str | StorePath | ObjectStore[Any]:
    """The store that zarr opens for the hierarchy at ``path``."""
    if not isinstance(path, RemotePath):
        return archived_store(path) or str(path)
    from zarr.storage import ObjectStore

    # The store begins at the hierarchy: zarr would turn every folder above it in the store into a group.
    return ObjectStore(client_of(path.scheme, path.bucket, path.key))
