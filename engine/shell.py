"""What every command shares: errors on one line, and reports as JSON files."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from cellseg_batch.engine.errors import CellsegError, UsageError

_INTERRUPTED = 130


def check_json(file: Path | None) -> None:
    """Refuse a report that could not be written, before the work rather than after it."""
    if file is not None and not file.resolve().parent.is_dir():
        raise UsageError(
            f"--json {file}",
            expected="a file in a folder that exists",
            found="no such folder",
            remedy="make the folder first",
        )


def write_json(file: Path | None, content: dict[str, Any]) -> None:
    """Write the report where it was asked for."""
    if file is not None:
        file.write_text(json.dumps(content, indent=2) + "\n")


@contextmanager
def plain_errors(debug: bool) -> Iterator[None]:
    """Print an error of ours on one line and exit with its code; everything else is a bug and keeps its traceback."""
    if debug:
        logging.basicConfig()
        logging.getLogger("cellseg_batch").setLevel(logging.DEBUG)
    try:
        yield
    except CellsegError as error:
        if debug:
            raise
        Console(stderr=True).print(Text.assemble(("error", "red"), f"  {error}"), soft_wrap=True)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; the same command goes on where this one stopped")
        raise typer.Exit(_INTERRUPTED) from None
