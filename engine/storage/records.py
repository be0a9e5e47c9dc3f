"""Frozen dataclasses as small JSON files: one reader and one writer for all of them.

A field without a default must be there, and a field that is there must have its type, or the file is refused.  Figures
have defaults, and what is not known is passed over: a figure that a later version adds breaks nothing that is on disk.
The fields that a class names in ``STRICT`` decide pixels: in these, at any depth, an unknown field is refused too.
"""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from cellseg_batch.engine.errors import OutputError
from cellseg_batch.engine.storage.atomic_files import whole_file

Record = TypeVar("Record")


def write_record(path: Path, record: object, what: str = "a journal") -> None:
    """Write a dataclass to ``path``, whole or not at all.

    Args:
        path: of the file; its folder is made.
        record: of plain values, tuples, dicts and other dataclasses.
        what: it is part of, for the error.

    Raises:
        OutputError: it cannot be written.
    """
    with whole_file(path, what) as stream:
        # Not by msgspec, which writes null for a number that is infinite.
        stream.write(json.dumps(plain(record)).encode())


def read_record(path: Path, kind: type[Record]) -> Record | None:
    """What `write_record` wrote to ``path``; None where there is no file.

    Raises:
        OutputError: the file is of another version, or damaged.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return decode_record(content, kind, path)


def decode_record(content: bytes, kind: type[Record], path: Path) -> Record:
    """The dataclass in the JSON text ``content`` of the file ``path``.

    Raises:
        OutputError: the text is of another version, or damaged.
    """
    try:
        values = json.loads(content)
        record = msgspec.convert(values, kind)
        for name in getattr(kind, "STRICT", ()):
            _refuse_unknown(getattr(record, name), values[name])
    except ValueError as error:
        raise OutputError(
            str(path),
            expected="a record of this version of cellseg-batch",
            found=str(error),
            cause="output of another version, or a damaged file",
            remedy="go on with the version that wrote it, or begin anew with `overwrite`",
        ) from error
    return record


def plain(record: object) -> dict[str, Any]:
    """A dataclass as plain JSON values."""
    content: dict[str, Any] = msgspec.to_builtins(record)
    return content


def _refuse_unknown(record: Any, content: Any) -> None:
    """Raise ValueError where ``content`` has a field that the dataclass ``record`` does not know."""
    if not is_dataclass(record) or not isinstance(content, dict):
        return
    known = {field.name for field in fields(record)}
    if unknown := sorted(set(content) - known):
        raise ValueError(f"the unknown field {unknown[0]} of {type(record).__name__}")
    for name, value in content.items():
        _refuse_unknown(getattr(record, name), value)
