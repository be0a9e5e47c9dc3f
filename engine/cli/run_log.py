"""Write the events of a run as lines of JSON, for programs that watch it or search it afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from cellseg_batch.engine.cli.console import as_flags
from cellseg_batch.engine.errors import brief, writing_to
from cellseg_batch.engine.run.campaign import Observer
from cellseg_batch.engine.run.results import EndedTask, SlideReport
from cellseg_batch.engine.run.slide_plan import SlidePlan


class RunLog:
    """Observer of a run that writes each event as a line, and passes it on.

    A line has ``time`` (ISO 8601, UTC) and ``event``; where they apply ``slide``, ``pass``, ``block`` (number of the
    task in its pass) and ``reason``.  Events are racing, compiling, found, started, block, block failed, and of
    slides done, skipped, held and failed.

    Args:
        stream: where the lines go.
        observer: is told of every event too.

    Attributes:
        error: why lines are missing; "" if none is.  A full disk ends no run.
    """

    def __init__(self, stream: TextIO, observer: Observer) -> None:
        self._stream = stream
        self._observer = observer
        self.error = ""

    def racing(self) -> None:
        """Log that the backends are raced."""
        self._write("racing")
        self._observer.racing()

    def compiling(self) -> None:
        """Log that a network or a kernel is compiled."""
        self._write("compiling")
        self._observer.compiling()

    def found(self, images: int, pixels: Mapping[str, int]) -> None:
        """Log how many images there are."""
        self._write("found", images=images)
        self._observer.found(images, pixels)

    def planned(self, plan: SlidePlan, peak_bytes: int, number: int, done: float) -> None:
        """Log a slide that is about to start."""
        self._write("started", slide=plan.slide.location, blocks=len(plan.grid), peak_bytes=peak_bytes)
        self._observer.planned(plan, peak_bytes, number, done)

    def advanced(self, task: EndedTask) -> None:
        """Log a task that is done or has failed."""
        event = "block failed" if task.reason else "block"
        self._write(event, task.reason, slide=task.slide, **{"pass": task.pass_name}, block=task.number)
        self._observer.advanced(task)

    def ended(self, report: SlideReport) -> None:
        """Log a slide that is done, failed, skipped or held."""
        self._write(report.status, report.reason, slide=report.path)
        self._observer.ended(report)

    def _write(self, event: str, reason: str = "", **more: str | int) -> None:
        line: dict[str, str | int] = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event}
        line |= more | ({"reason": as_flags(reason)} if reason else {})
        try:
            self._stream.write(json.dumps(line) + "\n")
            self._stream.flush()
        except OSError as error:
            self.error = brief(error)


@contextmanager
def logged(file: Path | None, observer: Observer) -> Iterator[Observer]:
    """The observer, or a `RunLog` before it that appends to ``file``; what the log lacks is said at the end.

    Raises:
        OutputError: the file cannot be opened, or could not take every line.
    """
    if file is None:
        yield observer
        return
    with writing_to(file, "a log"):
        stream = open(file, "a")  # noqa: SIM115 - closed below, whatever its last lines meet
    log = RunLog(stream, observer)
    try:
        yield log
    finally:
        try:
            stream.close()
        except OSError as error:
            log.error = brief(error)
    with writing_to(file, "a whole log"):
        if log.error:
            raise OSError(log.error)
