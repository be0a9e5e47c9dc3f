"""Read a manifest: a CSV file that lists slides, and what each of them asks for in place of the run's settings."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cellseg_batch.engine.errors import UsageError, brief
from cellseg_batch.engine.slides.slide import Asked
from cellseg_batch.engine.storage.paths import locate

_COLUMNS = ("path", "pixel_size", "channel", "level", "mask")
_MOST_NAMED = 20


@dataclass(frozen=True)
class Row:
    """A row of a manifest.

    Attributes:
        line: number of its last line in the file, from 1.
        path: image, store or folder.
        asked: what is asked for its images.
    """

    line: int
    path: Path
    asked: Asked


def read_rows(file: Path) -> tuple[list[Row], list[tuple[int, str]]]:
    """The rows of a manifest, in its order; and of each row that cannot be used, line and reason.

    Its columns are ``path`` (from the file's folder, or a URL) and any of ``pixel_size`` (µm per px of level 0),
    ``channel`` (name or index), ``level`` and ``mask`` (a region or a folder of them, as ``path``); an empty cell asks
    for nothing.  The file is UTF-8, with commas.

    Raises:
        UsageError: the file cannot be read, or has other columns or no rows.
    """
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, restkey="more", restval="")
            columns = list(reader.fieldnames or ())
            if "path" not in columns or len(set(columns) & set(_COLUMNS)) < len(columns):
                expected = f"columns path and any of {', '.join(_COLUMNS[1:])}, with commas between them"
                raise _refused(file, expected, ",".join(columns) or "an empty file")
            cells = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _refused(file, "a CSV file in UTF-8", brief(error)) from error
    rows, bad = [], []
    for line, row in cells:
        try:
            rows.append(_row(line, row, file.parent))
        except ValueError as error:
            bad.append((line, str(error)))
    if not cells:
        raise _refused(file, "at least one row", "none")
    return rows, bad


def refuse_rows(file: Path, bad: Iterable[tuple[int, str]]) -> None:
    """Refuse the whole manifest if there are bad rows, and name them.

    Args:
        file: the manifest.
        bad: line and reason of each bad row.

    Raises:
        UsageError: there is a bad row.
    """
    reasons = [f"line {line}: {reason}" for line, reason in sorted(bad)]
    if reasons:
        more = [f"and {len(reasons) - _MOST_NAMED} more"] if len(reasons) > _MOST_NAMED else []
        raise UsageError(
            f"`manifest={file}`",
            expected="rows that can all be used",
            found="; ".join([*reasons[:_MOST_NAMED], *more]),
            remedy="mend or remove these rows; nothing was written",
        )


def _refused(file: Path, expected: str, found: str) -> UsageError:
    return UsageError(
        f"`manifest={file}`",
        expected=expected,
        found=found,
        remedy="begin it with a line such as path,pixel_size and name a slide in each of the others",
    )


def _row(line: int, cells: dict[str, str], folder: Path) -> Row:
    """Read the cells of a row; raises ValueError."""
    if "more" in cells:
        raise ValueError("more cells than columns")
    path, size, channel, level, mask = (cells.get(column, "").strip() for column in _COLUMNS)
    if not path:
        raise ValueError("no path")
    try:
        pixel_size = float(size) if size else None
    except ValueError:
        pixel_size = math.nan
    if pixel_size is not None and not 0 < pixel_size < math.inf:
        raise ValueError(f"pixel_size: expected µm per px above 0, such as 0.25, found {size}")
    if level and not (level.isascii() and level.isdigit()):
        raise ValueError(f"level: expected 0 (full resolution) or more, found {level}")
    region = _located(mask, folder) if mask else None
    return Row(line, _located(path, folder), Asked(int(level) if level else None, channel or None, pixel_size, region))


def _located(path: str, folder: Path) -> Path:
    return locate(path) if "://" in path else folder / path
