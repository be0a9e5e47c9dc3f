"""Run parts one after the other, each in a process with a limit, and keep every row the moment it exists.

A part that crashes, hangs or breaks the GPU's context costs the others nothing.  All parts together end before a
deadline; a part for which no time is left has failed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PASSED, FAILED, LEFT_OUT = "passed", "failed", "left out"
_SHOWN = 4000


@dataclass(frozen=True)
class Part:
    """A part of the benchmark.

    Attributes:
        name: name by which it is chosen.
        seconds: its limit.
        command: its command line.
        needs: module -> how to get it; without one of them the part is left out.
    """

    name: str
    seconds: float
    command: tuple[str, ...]
    needs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a part ended.

    Attributes:
        part: name of the part.
        status: passed, failed or left out.
        seconds: seconds that it took.
        reason: why it failed or was left out; "" if it passed.
    """

    part: str
    status: str
    seconds: float
    reason: str


class Rows:
    """The rows of a folder, a line of JSON each in ``rows.jsonl``; several processes may add to it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._path = folder / "rows.jsonl"

    def add(self, **row: Any) -> None:
        """Write a row to disk."""
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def __iter__(self) -> Any:
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        return map(json.loads, lines)


def choose(parts: Sequence[Part], names: Sequence[str]) -> list[Part]:
    """Parts of these names in their own order; all without names.

    Raises:
        ValueError: there is no such part.
    """
    known = [part.name for part in parts]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"expected parts among {', '.join(known)}, found {', '.join(unknown)}")
    return [part for part in parts if not names or part.name in names]


def run_parts(parts: Iterable[Part], rows: Rows, seconds: float, **environment: str) -> Iterator[Outcome]:
    """Run parts within ``seconds``, with ``environment`` added to ours; what they print goes to the folder's log.

    Yields:
        How each part ended, before the next one begins.
    """
    deadline = time.monotonic() + seconds
    for part in parts:
        print(f"== {part.name}", flush=True)
        start = time.monotonic()
        limit = min(part.seconds, deadline - start)
        status, reason = _run(part, limit, rows.folder / f"{part.name}.log", environment)
        outcome = Outcome(part.name, status, time.monotonic() - start, reason)
        rows.add(part=part.name, status=status, seconds=outcome.seconds, reason=reason)
        print(f"   {status} after {outcome.seconds:.0f} s {reason}", flush=True)
        yield outcome


def _run(part: Part, limit: float, log: Path, environment: Mapping[str, str]) -> tuple[str, str]:
    """Run a part; its status and the reason."""
    missing = [f"{name} is not installed: {remedy}" for name, remedy in part.needs.items() if not _installed(name)]
    if missing:
        return LEFT_OUT, "; ".join(missing)
    if limit <= 0:
        return FAILED, "no time was left"
    with log.open("w") as output:
        # In a group of its own, so that its worker processes end with it.
        process = subprocess.Popen(
            part.command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    printed = log.read_text(errors="replace")
    print(printed[-_SHOWN:], end="", flush=True)
    if code is None:
        return FAILED, f"stopped after {limit:.0f} s"
    last_line = (printed.strip() or "no message").splitlines()[-1]
    return (FAILED, f"exit {code}: {last_line}") if code else (PASSED, "")


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
