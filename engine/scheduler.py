"""Keep a pool of workers busy with the tasks of many slides, a bounded number of them known at any time.

What is to be done with a slide is a *course*: a generator that yields one piece of `Work` after the other and goes on
when all of its tasks are done.  While the last tasks of one course run, those of the next are handed out, so that no
worker waits between two slides.  Nothing here knows slides, and nothing grows with their number or with the tasks'.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from queue import Empty, SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

from cellseg_batch.engine.errors import ClusterError
from cellseg_batch.engine.stopping import Stop

Result = TypeVar("Result")

# Short tasks are handed out several at a time: so many at most, for about the seconds that the pool says.
_MOST_PER_CALL = 256
# A task is handed out so often when its worker dies, each time alone: it may not be the one that killed it.
_MOST_LOSSES = 3


@dataclass(frozen=True)
class Work:
    """Calls that a course waits for.

    Attributes:
        call: made once for each item, by a worker; an exception of it is raised in the course.
        items: consumed as workers get free.
        collect: told what each call returned, in the thread of the run.
        lost: told of an item that keeps killing its worker, and how; left out, a ClusterError is raised in the course.
        urgent: to be done before the work of other courses, because a whole course waits for it.
    """

    call: Callable[[Any], Any]
    items: Iterable[Any]
    collect: Callable[[Any], None]
    lost: Callable[[Any, BaseException], None] | None = None
    urgent: bool = False


Course = Generator[Work, None, Result]


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


def ask(call: Callable[[Any], Result], item: Any) -> Course[Result]:
    """A course's single call: ``answer = yield from ask(call, item)``."""
    answers: list[Result] = []
    yield Work(call, (item,), answers.append, urgent=True)
    return answers[0]


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
        self._open: list[_OpenCourse[Result]] = []
        self._flying: dict[Future[Any], _OpenCourse[Result]] = {}
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

    def _next_course(self) -> _OpenCourse[Result] | None:
        """The course whose task is handed out next: one that a single call holds up, else the oldest."""
        while self._wants_another() and (course := next(self._waiting, None)) is not None:
            self._open.append(_OpenCourse(course))
        offering = [one for one in self._open if one.offers(suspects=self._suspect is None)]
        return next((one for one in offering if one.work.urgent), offering[0] if offering else None)

    def _wants_another(self) -> bool:
        """One course is always prepared in advance; several when there is nothing else to do."""
        fresh = [one for one in self._open if not one.begun]
        busy = len(fresh) < len(self._open)
        return len(self._open) <= self._pool.window and len(fresh) < (1 if busy else self._pool.workers)

    def _hand_out(self, course: _OpenCourse[Result]) -> None:
        # Only one at a time, so that a task that kills its worker cannot take an innocent one with it again and again.
        suspect = course.suspects and self._suspect is None
        future = course.hand_out(self._pool, 0 if suspect else self._per_call)
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


@dataclass(frozen=True)
class _Task:
    item: Any
    losses: int = 0


class _OpenCourse(Generic[Result]):
    """A course, its present work, and the tasks of it that are with workers.

    Attributes:
        work: that the course waits for.
        begun: tasks beyond urgent ones have been handed out.
        ended: the course has returned ``result``.
    """

    work: Work
    result: Result

    def __init__(self, course: Course[Result]) -> None:
        self._course = course
        self._tasks: Iterator[_Task] = iter(())
        self._next: _Task | None = None
        self._again: list[_Task] = []
        self._flying: dict[Future[Any], list[_Task]] = {}
        self._error: BaseException | None = None
        self.begun = self.ended = False
        self._go_on()

    @property
    def suspects(self) -> bool:
        """Whether there are tasks to hand out again whose worker died of them, or beside them."""
        return self._error is None and bool(self._again)

    def offers(self, suspects: bool = True) -> bool:
        """Whether a task can be handed out; ``suspects`` says if those count."""
        return self._error is None and (self._next is not None or (suspects and bool(self._again)))

    def hand_out(self, pool: Pool, most: int) -> Future[Any]:
        """Give up to ``most`` tasks to the pool, or a suspect one for 0."""
        self.begun = self.begun or not self.work.urgent
        if most == 0:
            tasks = [self._again.pop(0)]
        else:
            tasks = [task for task in (self._next,) if task]
            tasks.extend(islice(self._tasks, most - 1))
            self._look_ahead()
        future = pool.submit(_make_calls, self.work.call, [task.item for task in tasks])
        self._flying[future] = tasks
        return future

    def take(self, future: Future[Any]) -> float | None:
        """Collect what came back and, if it was the last, go on; returns seconds per task, None for urgent ones."""
        tasks, seconds = self._flying.pop(future), None
        loss = CancelledError() if future.cancelled() else future.exception()
        if loss is not None:
            for task in tasks:
                self._lose(task, loss)
        else:
            answers, spent = future.result()
            seconds = None if self.work.urgent else spent / len(tasks)
            for result, error in answers:
                if error is None:
                    self.work.collect(result)
                else:
                    self._error = self._error or error
        if not self._flying and not self.offers():
            self._go_on()
        return seconds

    def close(self) -> None:
        """Let the course clean up without going on."""
        self._course.close()

    def _lose(self, task: _Task, loss: BaseException) -> None:
        if task.losses + 1 < _MOST_LOSSES:
            self._again.append(_Task(task.item, task.losses + 1))
        elif self.work.lost is not None:
            self.work.lost(task.item, loss)
        else:
            self._error = self._error or ClusterError(
                "--scheduler",
                expected="a worker that lives through a call",
                found=f"{_MOST_LOSSES} that died of one ({type(loss).__name__})",
                remedy="use more memory, or see their logs",
            )

    def _go_on(self) -> None:
        """Run the course up to its next work that has a task, or to its end."""
        try:
            while not self.offers():
                error, self._error = self._error, None
                self._next = None  # what a failed work still had
                self._again.clear()
                self.work = next(self._course) if error is None else self._course.throw(error)
                self._tasks = self._list(self.work.items)
                self._look_ahead()
        except StopIteration as end:
            self.result, self.ended, self.begun = end.value, True, True

    def _look_ahead(self) -> None:
        self._next = next(self._tasks, None)

    def _list(self, items: Iterable[Any]) -> Iterator[_Task]:
        """The tasks of the items; if they cannot be listed, that is the course's own affair."""
        try:
            yield from map(_Task, items)
        except Exception as error:
            self._error = self._error or error


def _make_calls(call: Callable[[Any], Any], items: list[Any]) -> tuple[list[tuple[Any, Exception | None]], float]:
    """(result, error) of every call, and the seconds that they took; this is what a worker runs."""
    start = time.perf_counter()
    answers: list[tuple[Any, Exception | None]] = []
    for item in items:
        try:
            answers.append((call(item), None))
        except Exception as error:
            answers.append((None, error))
    return answers, time.perf_counter() - start
