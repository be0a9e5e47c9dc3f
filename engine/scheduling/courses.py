"""What is to be done with a slide, as a *course*: a generator that yields one piece of `Work` after the other.

It goes on when all tasks of the present one are done.  `OpenCourse` keeps what is left of it and what is with workers,
and hands out again what was lost with a worker.  Nothing here knows who the workers are, or other courses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

from cellseg_batch.engine.errors import ClusterError

Result = TypeVar("Result")

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


def ask(call: Callable[[Any], Result], item: Any) -> Course[Result]:
    """A course's single call: ``answer = yield from ask(call, item)``."""
    answers: list[Result] = []
    yield Work(call, (item,), answers.append, urgent=True)
    return answers[0]


@dataclass(frozen=True)
class _Task:
    item: Any
    losses: int = 0


class OpenCourse(Generic[Result]):
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

    def hand_out(self, submit: Callable[..., Future[Any]], most: int) -> Future[Any]:
        """Submit up to ``most`` tasks to a worker, or a suspect one for 0."""
        self.begun = self.begun or not self.work.urgent
        if most == 0:
            tasks = [self._again.pop(0)]
        else:
            tasks = [task for task in (self._next,) if task]
            tasks.extend(islice(self._tasks, most - 1))
            self._look_ahead()
        future = submit(_make_calls, self.work.call, [task.item for task in tasks])
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
