"""Add up the busy seconds of each stage of the pipeline over all threads, and keep each interval of work on request."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

STAGES = (
    "read",
    "upload",
    "gather",
    "model",
    "stitch",
    "seeds",
    "growth",
    "suppress",
    "draw",
    "expand",
    "measure",
    "write",
    "pyramid",
)


_thread_seconds: ContextVar[dict[str, float] | None] = ContextVar("thread_seconds", default=None)


@contextmanager
def noting_seconds() -> Iterator[dict[str, float]]:
    """Collect the busy seconds of this thread alone in each stage, while the context lasts."""
    seconds: dict[str, float] = {}
    token = _thread_seconds.set(seconds)
    try:
        yield seconds
    finally:
        _thread_seconds.reset(token)


@dataclass(frozen=True)
class Interval:
    """An interval in which one thread was busy with one stage.

    Attributes:
        stage: one of `STAGES`.
        thread: native id of the thread.
        start, end: readings of ``time.perf_counter()``, in seconds.
    """

    stage: str
    thread: int
    start: float
    end: float


class StageClock:
    """Adds up the seconds that the threads of a run spend in each stage.

    Args:
        keep_intervals: also keep every interval of work; this list grows with the run.

    Attributes:
        seconds: busy seconds of each stage.
        intervals: every interval, in the order in which they ended; empty without ``keep_intervals``.
    """

    def __init__(self, keep_intervals: bool = False) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.intervals: list[Interval] = []
        self._keep = keep_intervals
        self._lock = threading.Lock()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time spent inside the context for the stage ``name``, one of `STAGES`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.worked(name, time.perf_counter() - start)

    def worked(self, name: str, seconds: float) -> None:
        """Count ``seconds`` of work that has just ended, perhaps on another device, for the stage ``name``."""
        end = time.perf_counter()
        thread_seconds = _thread_seconds.get()
        if thread_seconds is not None:
            thread_seconds[name] = thread_seconds.get(name, 0.0) + seconds
        with self._lock:
            self.seconds[name] += seconds
            if self._keep:
                self.intervals.append(Interval(name, threading.get_native_id(), end - seconds, end))

    def drain(self) -> dict[str, float]:
        """Return the seconds added up since the last call and count from 0 again; a worker hands them to the run."""
        with self._lock:
            drained, self.seconds = self.seconds, dict.fromkeys(STAGES, 0.0)
        return drained
