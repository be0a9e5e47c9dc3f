"""What every command shares: errors on one line, reports as JSON files, settings in texts as flags."""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_args

import typer
from rich.console import Console
from rich.text import Text

from cellseg_batch.engine.errors import CellsegError, UsageError
from cellseg_batch.engine.scheduling.signals import Stopped

_INTERRUPTED = 130
_SETTING = re.compile(r"`([a-z][a-z0-9_]*)(?:=([^`]*))?`")
_flags: dict[str, tuple[str, str]] = {}
"""Parameter of a command -> its flag, and the flag that says no to it ("" where there is none)."""

Command = TypeVar("Command", bound=Callable[..., None])


def note_flags(command: Command) -> Command:
    """Let `as_flags` know the flags of a command, which is returned."""
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        for option in get_args(parameter.annotation)[1:]:
            # An option in an annotation has its first flag where others have their default.
            if isinstance(option, typer.models.OptionInfo) and isinstance(option.default, str):
                flag, _, opposite = option.default.partition("/")
                _flags[name] = flag, opposite
    return command


def as_flags(text: str) -> str:
    """A text whose settings in backticks are written as flags: `tile` as --tile, `precision=fp32` as --precision fp32.

    What no command has a flag for is left as it is.
    """
    return _SETTING.sub(_as_flag, text)


def _as_flag(setting: re.Match[str]) -> str:
    name, value = setting.groups()
    if name not in _flags:
        return setting.group()
    flag, opposite = _flags[name]
    if value == "False" and opposite:
        return opposite
    return flag if value in (None, "True") else f"{flag} {value}"


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
    """Write the report where it was asked for; reasons in it speak of flags, like those on the screen."""
    if file is not None:
        file.write_text(as_flags(json.dumps(content, indent=2)) + "\n")


def print_line(console: Console, state: str, colour: str, text: str) -> None:
    """Print a line that begins with a coloured word, such as failed, and is not wrapped."""
    console.print(Text.assemble((state, colour), f"  {as_flags(text)}"), soft_wrap=True)


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
        print_line(Console(stderr=True), "error", "red", str(error))
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
