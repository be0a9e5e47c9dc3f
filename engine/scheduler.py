"""Keep a pool of workers busy with the tasks of many slides, a bounded number of them known at any time.

What is to be done with a slide is a *course*: a generator that yields one piece of `Work` after the other and goes on
when all of its tasks are done.  While the last tasks of one course run, those of the next are handed out, so that no
worker waits between two slides.  Nothing here knows slides, and nothing grows with their number or with the tasks'.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True)
class Work:
    """Calls that a course waits for.

    Attributes:
        call: made once for each item, by a worker; an exception of it is raised in the course.
        items: consumed as workers get free.
        collect: told what each call returned, in the thread of the run.
        urgent: to be done before the work of other courses, because a whole course waits for it.
    """

    call: Callable[[Any], Any]
    items: Iterable[Any]
    collect: Callable[[Any], None]
    urgent: bool = False


Course = Generator[Work, None, Result]


class Pool(Protocol):
    """Workers behind one face.

    Attributes:
        workers: calls that run at a time.
        window: calls to hand out at a time, so that no worker ever waits for the next one.
    """

    workers: int
    window: int

    def submit(self, call: Callable[[Any], Any], item: Any, /) -> Future[Any]:
        """Have a worker call ``call(item)``."""
        ...

    def close(self) -> None:
        """Wait for the calls that have begun, drop the others."""
        ...


class ThreadPool:
    """Threads of this process; reading, computing and writing all release the interpreter."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.window = 2 * workers
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="block")

    def submit(self, call: Callable[[Any], Any], item: Any, /) -> Future[Any]:
        """Have a thread call ``call(item)``."""
        return self._executor.submit(call, item)

    def close(self) -> None:
        """Wait for the calls that have begun, drop the others."""
        self._executor.shutdown(cancel_futures=True)


def ask(call: Callable[[Any], Result], item: Any) -> Course[Result]:
    """A course's single call: ``answer = yield from ask(call, item)``."""
    answers: list[Result] = []
    yield Work(call, (item,), answers.append, urgent=True)
    return answers[0]


def run_courses(courses: Iterable[Course[Result]], pool: Pool) -> Iterator[Result]:
    """Run every course to its end; what they return comes in the order in which they end.

    An exception that a course does not catch ends the run.
    """
    try:
        yield from _Flow(courses, pool).run()
    finally:
        pool.close()


class _Flow(Generic[Result]):
    """The courses that are open, oldest first, and the calls that are with the pool."""

    def __init__(self, courses: Iterable[Course[Result]], pool: Pool) -> None:
        self._waiting = iter(courses)
        self._pool = pool
        self._open: list[_OpenCourse[Result]] = []
        self._flying = 0
        self._back: SimpleQueue[tuple[_OpenCourse[Result], Future[Any]]] = SimpleQueue()

    def run(self) -> Iterator[Result]:
        while True:
            while self._flying < self._pool.window and (chosen := self._next_course()):
                self._hand_out(chosen)
            ended = [one for one in self._open if one.ended]
            self._open = [one for one in self._open if not one.ended]
            yield from (one.result for one in ended)
            if not self._flying and not ended:
                return
            if self._flying:
                chosen, future = self._back.get()
                self._flying -= 1
                chosen.take(future)

    def _next_course(self) -> _OpenCourse[Result] | None:
        """The course whose task is handed out next: one that a single call holds up, else the oldest."""
        while self._wants_another() and (course := next(self._waiting, None)) is not None:
            self._open.append(_OpenCourse(course))
        offering = [one for one in self._open if one.offers]
        return next((one for one in offering if one.work.urgent), offering[0] if offering else None)

    def _wants_another(self) -> bool:
        """One course is always prepared in advance; several when there is nothing else to do."""
        fresh = [one for one in self._open if not one.begun]
        busy = len(fresh) < len(self._open)
        return len(self._open) <= self._pool.window and len(fresh) < (1 if busy else self._pool.workers)

    def _hand_out(self, course: _OpenCourse[Result]) -> None:
        self._flying += 1
        future = course.hand_out(self._pool)
        future.add_done_callback(lambda done: self._back.put((course, done)))


class _OpenCourse(Generic[Result]):
    """A course, its present work, and how many tasks of it are with workers.

    Attributes:
        work: that the course waits for.
        offers: a task of it can be handed out.
        begun: tasks beyond urgent ones have been handed out.
        ended: the course has returned ``result``.
    """

    work: Work
    result: Result

    def __init__(self, course: Course[Result]) -> None:
        self._course = course
        self._flying = 0
        self._error: BaseException | None = None
        self.offers = self.begun = self.ended = False
        self._go_on()

    def hand_out(self, pool: Pool) -> Future[Any]:
        """Give the next task to the pool."""
        item = self._item
        self.begun = self.begun or not self.work.urgent
        self._flying += 1
        self._look_ahead()
        return pool.submit(self.work.call, item)

    def take(self, done: Future[Any]) -> None:
        """Collect what a task returned; after the last one, go on with the course."""
        self._flying -= 1
        error = done.exception()
        if error is None:
            self.work.collect(done.result())
        else:
            self._error, self.offers = self._error or error, False
        if not self._flying and not self.offers:
            self._go_on()

    def _go_on(self) -> None:
        """Run the course up to its next work that has a task, or to its end."""
        try:
            while not self.offers:
                error, self._error = self._error, None
                self.work = next(self._course) if error is None else self._course.throw(error)
                self._items = iter(self.work.items)
                self._look_ahead()
        except StopIteration as end:
            self.result, self.ended, self.begun = end.value, True, True

    def _look_ahead(self) -> None:
        try:
            self._item, self.offers = next(self._items), True
        except StopIteration:
            self.offers = False
        except Exception as error:  # as of a task: the course's own affair
            self._error, self.offers = self._error or error, False
