"""What every command shares: errors on one line, and reports as JSON files."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from cellseg_batch.engine.errors import CellsegError, UsageError
from cellseg_batch.engine.scheduling.signals import Stopped

_INTERRUPTED = 130


def check_json(file: Path | None, flag: str = "--json") -> None:
    """Refuse a report that could not be written, before the work rather than after it."""
    if file is not None and not file.resolve().parent.is_dir():
        raise UsageError(
            f"{flag} {file}",
            expected="a file in a folder that exists",
            found="no such folder",
            remedy="make the folder first",
        )
    if file is not None and file.is_dir():
        raise UsageError(
            f"{flag} {file}",
            expected="a file",
            found="a folder of that name",
            remedy="name a file in it, or another one",
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
    except Stopped as stopped:
        _say(f"stopped by {stopped}; the same command goes on where this one stopped")
        if not stopped.clean:  # threads that are still at work would keep the process alive
            os._exit(stopped.exit_code)
        raise typer.Exit(stopped.exit_code) from None
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on where this one stopped")
        raise typer.Exit(_INTERRUPTED) from None


def _say(line: str) -> None:
    Console(stderr=True).print(line, highlight=False, soft_wrap=True)
