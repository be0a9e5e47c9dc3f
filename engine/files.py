"""Files that are whole or absent, and the folders that keep many of them apart; what is in them is not known here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import IO

from cellseg_batch.engine.errors import writing_to

# Numbered files that share a folder.
BUCKET = 1000
# zarr's local stores use the same one.
PARTIAL_SUFFIX = ".partial"


def numbered(folder: Path, number: int, suffix: str) -> Path:
    """Path of file ``number`` of many in ``folder``."""
    return folder / str(number // BUCKET) / f"{number}{suffix}"


@contextmanager
def whole_file(path: Path, what: str = "a file") -> Iterator[IO[bytes]]:
    """A file that appears at ``path``, complete and on disk, once the context ends without an error.

    Args:
        path: of the file; its folder is made.
        what: it is part of, for the error.

    Raises:
        OutputError: it cannot be written.
    """
    partial = path.with_name(f"{path.name}.{token_hex(4)}{PARTIAL_SUFFIX}")
    with writing_to(path, what):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
    try:
        with open(partial, "wb") as stream:
            try:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            except OSError:  # anything else is not about the file
                with writing_to(path, what):
                    raise
        with writing_to(path, what):
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
