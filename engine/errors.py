"""Every error a user can cause or meet, in one tree.

CellsegError
├── UsageError          the command cannot be carried out as given (exit code 2)
│   ├── NoImageError    no image where one was expected
│   ├── ModelError      the model bundle is missing, damaged or does not fit
│   ├── BackendError    no backend can do what was asked
│   └── ClusterError    there are no workers, or they do not live
└── SlideError          one slide cannot be processed; the others go on (exit code 1)
    ├── ReadError       its pixels or metadata cannot be read
    ├── ComputeError    the model gives no usable numbers for it
    └── OutputError     its labels cannot be written

A message is one line: what was expected, what was found, the likely cause, the remedy.  Settings and arguments of
functions are in backticks, with or without a value (`tile`, `margin=64`); the command line writes them as flags.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

_MOST_CHARACTERS = 300


class CellsegError(Exception):
    """An error with everything a user needs to act on it, on one line.

    Args:
        subject: the path or setting that the error is about.
        expected: the state or value that was expected.
        found: the state or value that was found instead.
        cause: the likely cause; "" if the rest of the message makes it plain.
        remedy: how the user can repair it.
    """

    exit_code = 1
    detail: str
    """The message without its subject, for reports that name the subject themselves."""

    def __init__(self, subject: str, *, expected: str, found: str, cause: str = "", remedy: str) -> None:
        likely = f" (likely {cause})" if cause else ""
        self.detail = " ".join(f"expected {expected}, found {found}{likely}; {remedy}".split())
        super().__init__(f"{subject}: {self.detail}")

    @classmethod
    def with_detail(cls, subject: str, detail: str) -> Self:
        """Make an error from a subject and a message that is complete but for its subject."""
        error = cls.__new__(cls)
        error.args, error.detail = (f"{subject}: {detail}",), detail
        return error

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the error, which travels between processes, as its message and its detail."""
        return _rebuild, (type(self), str(self), self.detail)


def _rebuild(kind: type[CellsegError], message: str, detail: str) -> CellsegError:
    error = kind.__new__(kind, message)
    error.args, error.detail = (message,), detail
    return error


class UsageError(CellsegError):
    """The command cannot be carried out as given."""

    exit_code = 2


class NoImageError(UsageError):
    """No image where one was expected."""


class ModelError(UsageError):
    """The model bundle is missing, damaged or does not fit."""


class BackendError(UsageError):
    """No backend can do what was asked."""


class ClusterError(UsageError):
    """There are no workers, or they do not live."""


class SlideError(CellsegError):
    """One slide cannot be processed; the others go on."""


class ReadError(SlideError):
    """A slide's pixels or metadata cannot be read."""


class ComputeError(SlideError):
    """The model gives no usable numbers for a slide."""


class OutputError(SlideError):
    """A slide's labels cannot be written."""


class CellsegWarning(UserWarning):
    """A remark on a result that is complete, such as on NaN pixels of an array."""


def brief(error: BaseException) -> str:
    """The kind of an error and the first line of its message, which a library may have made long."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:_MOST_CHARACTERS]


@contextmanager
def writing_to(path: Path, what: str) -> Iterator[None]:
    """Turn every exception that is raised while ``what`` is written to ``path`` into an OutputError."""
    try:
        yield
    except OutputError:
        raise
    except Exception as error:  # each store's library raises errors of its own
        raise OutputError(
            str(path),
            expected=f"{what} that can be written",
            found=brief(error),
            cause="a read-only folder or a full disk",
            remedy="make room or rights, or choose another `output`; finished blocks are kept",
        ) from error


@contextmanager
def trainer_errors(subject: str) -> Iterator[None]:
    """Turn the trainer's OSError and ValueError into a UsageError about ``subject``."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UsageError(
            subject,
            expected="data, recipe, weights and folders that can be used together",
            found=str(error),
            remedy="see the README for the layouts of data and cellseg-batch train --help for recipes",
        ) from error
