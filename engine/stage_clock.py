"""Busy seconds of each stage of the pipeline, added up over all threads; when each was busy, if that is asked for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

STAGES = ("read", "upload", "gather", "model", "stitch", "seeds", "growth", "measure", "write", "pyramid")


_own: ContextVar[dict[str, float] | None] = ContextVar("own", default=None)


@contextmanager
def noting_seconds() -> Iterator[dict[str, float]]:
    """Busy seconds of this thread alone in each stage, while the context lasts."""
    seconds: dict[str, float] = {}
    token = _own.set(seconds)
    try:
        yield seconds
    finally:
        _own.reset(token)


@dataclass(frozen=True)
class Interval:
    """One stretch of work of one thread.

    Attributes:
        stage: one of `STAGES`.
        thread: native id of the thread.
        start, end: seconds of ``time.perf_counter()``.
    """

    stage: str
    thread: int
    start: float
    end: float


class StageClock:
    """Adds up the seconds that the threads of a run spend in each stage.

    Args:
        keep_intervals: also note every stretch of work, which grows with the run.

    Attributes:
        seconds: busy seconds of each stage.
        intervals: every stretch, in the order in which they ended; empty unless asked for.
    """

    def __init__(self, keep_intervals: bool = False) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.intervals: list[Interval] = []
        self._keep = keep_intervals
        self._lock = threading.Lock()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time spent inside as one of `STAGES`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.worked(name, time.perf_counter() - start)

    def worked(self, name: str, seconds: float) -> None:
        """Count ``seconds`` of work that has just ended, perhaps on another device."""
        end = time.perf_counter()
        own = _own.get()
        if own is not None:
            own[name] = own.get(name, 0.0) + seconds
        with self._lock:
            self.seconds[name] += seconds
            if self._keep:
                self.intervals.append(Interval(name, threading.get_native_id(), end - seconds, end))

    def drain(self) -> dict[str, float]:
        """What was added up since the last call, which then counts no more here: a worker hands it to the run."""
        with self._lock:
            drained, self.seconds = self.seconds, dict.fromkeys(STAGES, 0.0)
        return drained
