"""Keep a pool of workers busy with the tasks of many slides, a bounded number of them known at any time.

While the last tasks of one course run, those of the next are handed out, so that no worker waits between two slides.
Nothing here knows slides, and nothing grows with their number or with the tasks'.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Generic, Protocol

from cellseg_batch.engine.scheduling.courses import Course, OpenCourse, Result, ask
from cellseg_batch.engine.scheduling.signals import Stop

# Short tasks are handed out several at a time: so many at most, for about the seconds that the pool says.
_MOST_PER_CALL = 256


class Pool(Protocol):
    """Workers behind one face."""

    @property
    def workers(self) -> int:
        """Calls that run at a time."""
        ...

    @property
    def window(self) -> int:
        """Calls to hand out at a time, so that no worker ever waits for the next one."""
        ...

    @property
    def seconds_per_call(self) -> float:
        """How long a call should take at least, so that handing it out costs next to nothing."""
        ...

    def submit(self, call: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Have a worker make the call; the future fails only if the worker does, or if the call ends its process.

        Raises:
            ClusterError: there will be no worker any more.
        """
        ...

    def close(self, wait: bool) -> None:
        """Let the workers go, after the calls that have begun if ``wait``."""
        ...


class ThreadPool:
    """Threads of this process; reading, computing and writing all release the interpreter."""

    seconds_per_call = 0.1

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.window = 2 * workers
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="block")

    def submit(self, call: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Have a thread make the call."""
        return self._executor.submit(call, *arguments)

    def close(self, wait: bool) -> None:
        """Let the threads go."""
        self._executor.shutdown(wait, cancel_futures=True)


def call_alone(pool: Pool, call: Callable[[Any], Result], item: Any) -> Result:
    """What ``call`` returns for ``item``, made before there are courses.

    Raises:
        ClusterError: it kills its worker.
    """
    return next(_Flow(iter([ask(call, item)]), pool, Stop()).run())


def run_courses(courses: Iterable[Course[Result]], pool: Pool, stop: Stop | None = None) -> Iterator[Result]:
    """Run every course to its end; what they return comes in the order in which they end.

    An exception that a course does not catch ends the run.

    Raises:
        Stopped: ``stop`` was asked for; the calls that had begun were given its grace to end.
    """
    stop = stop or Stop()
    flow = _Flow(courses, pool, stop)
    try:
        with stop.wakes(flow.wake):
            yield from flow.run()
    finally:
        flow.close()


class _Flow(Generic[Result]):
    """The courses that are open, oldest first, and the calls that are with the pool."""

    def __init__(self, courses: Iterable[Course[Result]], pool: Pool, stop: Stop) -> None:
        self._waiting = iter(courses)
        self._pool = pool
        self._stop = stop
        self._open: list[OpenCourse[Result]] = []
        self._flying: dict[Future[Any], OpenCourse[Result]] = {}
        self._suspect: Future[Any] | None = None
        self._back: SimpleQueue[Future[Any] | None] = SimpleQueue()
        self._per_call = 1

    def run(self) -> Iterator[Result]:
        while True:
            if self._stop.asked:
                self._drain()
            while len(self._flying) < self._pool.window and (chosen := self._next_course()):
                self._hand_out(chosen)
            ended = [one for one in self._open if one.ended]
            self._open = [one for one in self._open if not one.ended]
            yield from (one.result for one in ended)
            if self._flying:
                self._take(self._back.get())
            elif not ended:
                return

    def wake(self) -> None:
        """Have the run look whether it is to stop; safe in a signal handler."""
        self._back.put(None)

    def close(self) -> None:
        """Let pool and courses go."""
        self._pool.close(wait=not self._stop.asked)
        for one in self._open:
            one.close()

    def _next_course(self) -> OpenCourse[Result] | None:
        """The course whose task is handed out next: one that a single call holds up, else the oldest."""
        while self._wants_another() and (course := next(self._waiting, None)) is not None:
            self._open.append(OpenCourse(course))
        offering = [one for one in self._open if one.offers(suspects=self._suspect is None)]
        return next((one for one in offering if one.work.urgent), offering[0] if offering else None)

    def _wants_another(self) -> bool:
        """One course is always prepared in advance; several when there is nothing else to do."""
        fresh = [one for one in self._open if not one.begun]
        busy = len(fresh) < len(self._open)
        return len(self._open) <= self._pool.window and len(fresh) < (1 if busy else self._pool.workers)

    def _hand_out(self, course: OpenCourse[Result]) -> None:
        # Only one at a time, so that a task that kills its worker cannot take an innocent one with it again and again.
        suspect = course.suspects and self._suspect is None
        future = course.hand_out(self._pool.submit, 0 if suspect else self._per_call)
        if suspect:
            self._suspect = future
        self._flying[future] = course
        future.add_done_callback(self._back.put)

    def _take(self, future: Future[Any] | None) -> None:
        if future is not None:
            self._suspect = None if future is self._suspect else self._suspect
            seconds = self._flying.pop(future).take(future)
            if seconds is not None:
                self._per_call = max(1, min(_MOST_PER_CALL, int(self._pool.seconds_per_call / max(seconds, 1e-6))))

    def _drain(self) -> None:
        """Hand nothing more out, wait for what has begun, and end the run."""
        for future in list(self._flying):
            future.cancel()
        latest = time.monotonic() + self._stop.grace
        with suppress(Empty):
            while self._flying:
                self._take(self._back.get(timeout=max(0.0, latest - time.monotonic())))
        raise self._stop.stopped(clean=not self._flying)
