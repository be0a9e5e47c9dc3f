"""The files of a bioimage.io package, a folder or a zip archive: read one by one, by names inside it alone.

Nothing is unpacked, followed out of the package or fetched.
"""

from __future__ import annotations

import hashlib
import zipfile
from contextlib import suppress
from pathlib import Path, PurePosixPath

from cellseg_batch.engine.errors import ModelError, brief

# Names of the file that describes a package, or ends of them, in the order in which they are looked for.
_DESCRIPTIONS = ("bioimageio.yaml", "rdf.yaml", "model.yaml")
# An archive unpacks to at most this, or this many times its own size.
_MOST_UNPACKED, _MOST_TIMES = 64 << 20, 100
DOWNLOAD = "download the whole package as a zip from bioimage.io"


def is_package(source: Path) -> bool:
    """Whether ``source`` is a folder or a zip archive with a description of a package at its top."""
    return bool(_description_of(source))


def _description_of(source: Path) -> str:
    """Name of the description at the top of ``source``; "" if it has none, cannot be read, or is something else."""
    listed: list[str] = []
    with suppress(Exception):  # zip's own errors
        if source.is_dir():
            listed = [path.name for path in source.iterdir()]
        elif zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as archive:
                listed = [name for name in archive.namelist() if "/" not in name]
    present = (name for usual in _DESCRIPTIONS for name in sorted(listed) if f".{name}".endswith(f".{usual}"))
    return next(present, "")


class PackageFiles:
    """Files of a package.

    Args:
        source: a folder or a zip archive for which `is_package` holds.

    Attributes:
        description: name of the file that describes the package.

    Raises:
        ModelError: an archive names files outside itself, or unpacks to far more than it is.
    """

    def __init__(self, source: Path) -> None:
        self._source = source
        self.description = _description_of(source)
        if not source.is_dir():
            with zipfile.ZipFile(source) as archive:
                members = archive.infolist()
            for member in members:
                self._inside(member.filename.rstrip("/"))
            unpacked, size = sum(member.file_size for member in members), source.stat().st_size
            if unpacked > _MOST_UNPACKED + _MOST_TIMES * size:
                raise self.refused(
                    f"an archive that unpacks to at most {_MOST_TIMES} times its size",
                    f"{unpacked >> 20} MiB in {size >> 10} KiB, as a zip bomb",
                    DOWNLOAD,
                )

    def read(self, name: str, most: int, sha256: str | None = None) -> bytes:
        """Return the content of a file.

        Args:
            name: path inside the package, as its description has it.
            most: bytes that it may have.
            sha256: the hash that the description says; None if it says none.

        Raises:
            ModelError: the name leads out of the package, there is no such file, it is larger or has another hash.
        """
        content = self.head(name, most + 1)
        if len(content) > most:
            raise self.refused(f"a {name} of at most {most >> 10} KiB", "a larger one", "use a smaller model")
        found = hashlib.sha256(content).hexdigest()
        if sha256 and found != sha256.lower():
            raise self.refused(f"{name} with the sha256 {sha256[:12]}...", f"{found[:12]}...", DOWNLOAD)
        return content

    def head(self, name: str, most: int) -> bytes:
        """Return the first ``most`` bytes of a file.

        Raises:
            ModelError: the name leads out of the package, or there is no such file.
        """
        path = self._inside(name)
        try:
            return self._head(path, most)
        except (KeyError, FileNotFoundError) as error:
            raise self.refused("all files that the package names", f"no {name}", DOWNLOAD) from error
        except Exception as error:  # zip's and its decoders' own errors
            raise self.refused(f"a readable {name}", brief(error), DOWNLOAD) from error

    def _head(self, path: str, most: int) -> bytes:
        if not self._source.is_dir():
            with zipfile.ZipFile(self._source) as archive, archive.open(path) as stream:
                return stream.read(most)
        file = (self._source / path).resolve()
        if not file.is_relative_to(self._source.resolve()):
            raise OSError("a link that leads out of the package")
        if file.exists() and not file.is_file():
            raise OSError("a folder, pipe or device")
        with open(file, "rb") as stream:
            return stream.read(most)

    def _inside(self, name: str) -> str:
        """A name in the form that archives have.

        Raises:
            ModelError: it is none inside the package.
        """
        path = PurePosixPath(name)
        if "://" in name:
            raise self.refused("files inside the package", f"the address {name}", DOWNLOAD)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in name or "\0" in name:
            raise self.refused("files inside the package", f"{name!r}, which leads out of it", DOWNLOAD)
        return str(path)

    def refused(self, expected: str, found: str, remedy: str) -> ModelError:
        """The error that refuses the package."""
        return ModelError(str(self._source), expected=expected, found=found, remedy=remedy)
