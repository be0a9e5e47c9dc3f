"""Share what all commands need: errors on one line, reports as JSON files, settings in texts as flags."""

from __future__ import annotations

import inspect
import io
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_args

import typer
from rich.console import Console
from rich.text import Text

from cellseg_batch.engine.errors import CellsegError, UsageError, brief, writing_to
from cellseg_batch.engine.scheduling.signals import GRACE_SECONDS, Stopped

_INTERRUPTED = 130
_STANDARD_ERROR = 2
# How many images of one remark are named; files of JSON and the report name all.
_NAMED = 10
_SETTING = re.compile(r"`([a-z][a-z0-9_]*)(?:=([^`]*))?`")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What moves the cursor or recolours a terminal; tabs and new lines do no harm."""
_flags: dict[str, tuple[str, str]] = {}
"""Parameter of a command -> its flag, and the opposite flag ("" if there is none)."""

Command = TypeVar("Command", bound=Callable[..., None])


def note_flags(command: Command) -> Command:
    """Register the flags of a command for `as_flags`; returns the command."""
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        for option in get_args(parameter.annotation)[1:]:
            # An option in an annotation has its first flag where others have their default.
            if isinstance(option, typer.models.OptionInfo) and isinstance(option.default, str):
                flag, _, opposite = option.default.partition("/")
                _flags[name] = flag, opposite
    return command


def as_flags(text: str) -> str:
    """Write the settings in backticks of a text as flags: `tile` as --tile, `precision=fp32` as --precision fp32.

    A setting without a flag stays as it is.
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


def counted(number: int, noun: str) -> str:
    """A number of things, such as 1 image or 5,000 images."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def check_json(file: Path | None, flag: str = "--json") -> None:
    """Refuse a file that cannot be written, before the work rather than after it.

    Raises:
        UsageError: the folder of the file does not exist or cannot be written, or the file is a folder.
    """
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
    if file is not None and not os.access(file if file.exists() else file.resolve().parent, os.W_OK):
        raise UsageError(
            f"{flag} {file}",
            expected="a file that can be written",
            found="none",
            cause="a read-only folder or file",
            remedy="name a file elsewhere",
        )


def write_json(file: Path | None, content: dict[str, Any]) -> None:
    """Write a report as JSON, with settings as flags; None writes nothing.

    Raises:
        OutputError: the file cannot be written.
    """
    if file is not None:
        with writing_to(file, "a report"):
            file.write_text(as_flags(json.dumps(content, indent=2)) + "\n")


def as_text(text: str, style: str = "") -> Text:
    """A text that may hold paths: nothing in it is markup or emoji, and control characters are written as ``\\x..``."""
    return Text(_CONTROL.sub(lambda found: f"\\x{ord(found.group()):02x}", text), style)


def print_text(text: str) -> None:
    """Print a text that may hold paths, without wrapping it."""
    Console().print(as_text(text), soft_wrap=True)


def print_line(console: Console, state: str, colour: str, text: str) -> None:
    """Print a line that begins with a coloured word, such as failed, and is not wrapped."""
    console.print(Text.assemble((state, colour), "  ", as_text(as_flags(text))), soft_wrap=True)


def print_shared(
    console: Console, state: str, colour: str, remarks: Iterable[tuple[str, str]], named: int = _NAMED
) -> None:
    """Print remarks, given as (name, remark): each once, after the first ``named`` of the images that share it."""
    sharing: dict[str, list[str]] = {}
    for name, remark in remarks:
        sharing.setdefault(remark, []).append(name)
    for remark, names in sharing.items():
        more = f" and {len(names) - named} more" if len(names) > named else ""
        print_line(console, state, colour, f"{', '.join(names[:named])}{more}: {remark}")


@contextmanager
def plain_errors(debug: bool, to_go_on: str = "the same command goes on where this one stopped") -> Iterator[None]:
    """Print a `CellsegError` on one line and exit with its code; any other error is a bug and keeps its traceback.

    Args:
        debug: keep the traceback of every error, and show the log.
        to_go_on: how to go on after an interruption.
    """
    if debug:
        logging.basicConfig()
        logging.getLogger("cellseg_batch").setLevel(logging.DEBUG)
    else:  # the reasons say what it logs about damaged files
        logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    try:
        yield
    except CellsegError as error:
        if debug:
            raise
        print_line(Console(stderr=True), "error", "red", str(error))
        raise typer.Exit(error.exit_code) from None
    except Stopped as stopped:
        _print_error(f"stopped by {stopped}; {to_go_on}")
        if not stopped.clean:  # threads that are still at work would keep the process alive
            os._exit(stopped.exit_code)
        raise typer.Exit(stopped.exit_code) from None
    except KeyboardInterrupt:
        _print_error(f"interrupted; {to_go_on}")
        raise typer.Exit(_INTERRUPTED) from None


class _Drain(io.RawIOBase):
    """A file descriptor that takes everything: what its disk or its reader does not take is dropped.

    Attributes:
        error: the last error; None if nothing was dropped.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, content: Any, /) -> int:
        try:
            return os.write(self._descriptor, content)
        except OSError as error:
            self.error = error
            return len(content)


@contextmanager
def printing_never_fails() -> Iterator[None]:
    """Have everything printed on standard output and error, whatever their encoding; a full disk ends no work.

    What an encoding does not have is printed as ``\\x..``.  A full disk is named on standard error; a reader that has
    gone, as in ``| head``, is not.  A stream that is closed takes nothing.
    """
    _open_closed_streams()
    kept = sys.stdout, sys.stderr
    drain, errors = _Drain(sys.stdout.fileno()), _Drain(sys.stderr.fileno())
    sys.stdout, sys.stderr = _lenient(drain, kept[0]), _lenient(errors, kept[1])
    try:
        yield
    finally:
        sys.stdout.flush()
        if drain.error is not None and not isinstance(drain.error, BrokenPipeError):
            _print_error(f"not everything could be printed: {brief(drain.error)}; results are not affected")
        sys.stderr.flush()
        sys.stdout, sys.stderr = kept


def _open_closed_streams() -> None:
    """Lead closed standard streams nowhere, or the next files that are opened would take their descriptors."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= _STANDARD_ERROR:
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - as long as the process


def _lenient(drain: _Drain, stream: Any) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        io.BufferedWriter(drain), stream.encoding, "backslashreplace", line_buffering=stream.line_buffering
    )


def say_draining() -> None:
    """Acknowledge a signal at once, as running tasks may take seconds to end."""
    _print_error(
        f"stopping: what is in flight is being finished, for {GRACE_SECONDS:.0f} s at most; Ctrl-C again stops now"
    )


def _print_error(line: str) -> None:
    Console(stderr=True).print(line, highlight=False, soft_wrap=True)
