"""Read and write frozen dataclasses as small JSON files.

A file is refused if it lacks a field without a default, or if a field has another type.  Figures have defaults and
unknown fields are ignored, so a figure that a later version adds breaks no existing file.  The fields that a class
names in ``STRICT`` decide pixels: inside these, at any depth, an unknown field is refused too.  A class says in its
annotations which numbers are counts, and in ``__post_init__`` which values contradict each other.
"""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from cellseg_batch.engine.errors import OutputError, brief
from cellseg_batch.engine.storage.atomic_files import whole_file

Record = TypeVar("Record")

# Whole numbers; the reader refuses smaller ones.
Count = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]


def write_record(path: Path, record: object, what: str = "a journal") -> None:
    """Write a dataclass to ``path``, whole or not at all.

    Args:
        path: path of the file; its folder is made.
        record: dataclass of plain values, tuples, dicts and other dataclasses.
        what: name of the thing that the file is part of, for the error.

    Raises:
        OutputError: the file cannot be written.
    """
    with whole_file(path, what) as stream:
        stream.write(encode_record(record))


def encode_record(record: object) -> bytes:
    """The JSON text of a dataclass."""
    # json, because msgspec writes null for an infinite number.
    return json.dumps(plain(record)).encode()


def read_record(path: Path, kind: type[Record]) -> Record | None:
    """Read the dataclass that `write_record` wrote to ``path``; None if there is no file.

    Raises:
        OutputError: the file is of another version or damaged, may not be read, or a folder has its name.
    """
    try:
        values = json.loads(path.read_bytes())
        record = msgspec.convert(values, kind)
        for name in getattr(kind, "STRICT", ()):
            _refuse_unknown(getattr(record, name), values[name])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        raise OutputError(
            str(path), expected="a record that may be read", found=brief(error), remedy="make it readable"
        ) from error
    except (IsADirectoryError, RecursionError, ValueError) as error:
        raise OutputError(
            str(path),
            expected="a record of this version of cellseg-batch",
            found="a folder" if isinstance(error, IsADirectoryError) else str(error).replace("`", ""),  # for settings
            cause="output of another version, or a damaged file",
            remedy="go on with the version that wrote it, or begin anew with `overwrite`",
        ) from error
    return record


def plain(record: object) -> dict[str, Any]:
    """A dataclass as plain JSON values."""
    content: dict[str, Any] = msgspec.to_builtins(record)
    return content


def _refuse_unknown(record: Any, content: Any) -> None:
    """Raise ValueError if ``content``, at any depth, has a field that the dataclass ``record`` does not have."""
    if not is_dataclass(record) or not isinstance(content, dict):
        return
    known = {field.name for field in fields(record)}
    if unknown := sorted(set(content) - known):
        raise ValueError(f"the unknown field {unknown[0]} of {type(record).__name__}")
    for name, value in content.items():
        _refuse_unknown(getattr(record, name), value)
