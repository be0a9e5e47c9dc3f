"""Keep a pool of workers busy with the tasks of many slides.

The work on a slide is a *workflow*: a generator that yields one `TaskGroup` after the other and goes on when all tasks
of the present group are done.  While the last tasks of one workflow run, those of the next are handed out, so that no
worker waits between two slides.  A task that was lost with its worker is handed out again.  Memory grows neither with
the number of slides nor with that of tasks.  This module must not know slides.
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
from cellseg_batch.engine.scheduling.signals import Stop

Result = TypeVar("Result")

# A task whose workers die is handed out this many times in all, alone after the first: it may not be the culprit.
_MOST_LOSSES = 3
# Short tasks are handed out several at a time: at most this many, for about `Pool.seconds_per_call`.
_MOST_PER_CALL = 256


@dataclass(frozen=True)
class TaskGroup:
    """Calls that a workflow waits for.

    Attributes:
        call: function that workers call once for each item; its exception is raised in the workflow.
        items: arguments of the calls, taken as workers become free.
        collect: called with the result of each call, in the thread of the run; its exception ends the run.
        lost: called with an item that keeps killing its worker, and with the last error; if it is None, a ClusterError
            is raised in the workflow.
        urgent: whether the calls come before those of other workflows, because a whole workflow waits for them.
    """

    call: Callable[[Any], Any]
    items: Iterable[Any]
    collect: Callable[[Any], None]
    lost: Callable[[Any, BaseException], None] | None = None
    urgent: bool = False


Workflow = Generator[TaskGroup, None, Result]


def ask(
    call: Callable[[Any], Result], item: Any, tell: Callable[[Result], None] = lambda result: None
) -> Workflow[Result]:
    """Make a single call in a workflow and return its result: ``result = yield from ask(call, item)``.

    Args:
        call: the function.
        item: its argument.
        tell: called with the result as `TaskGroup.collect` is: its exception ends the run, and not the workflow alone.
    """
    results: list[Result] = []

    def collect(result: Result) -> None:
        results.append(result)
        tell(result)

    yield TaskGroup(call, (item,), collect, urgent=True)
    return results[0]


@dataclass(frozen=True)
class _Task:
    item: Any
    losses: int = 0


class RunningWorkflow(Generic[Result]):
    """A workflow, its present task group, and the tasks of the group that workers have.

    Attributes:
        group: the tasks that the workflow waits for.
        begun: whether a task that is not urgent has been handed out, or the workflow has ended.
        ended: whether the workflow has returned ``result``.
    """

    group: TaskGroup
    result: Result

    def __init__(self, workflow: Workflow[Result]) -> None:
        self._workflow = workflow
        self._tasks: Iterator[_Task] = iter(())
        self._next: _Task | None = None
        self._again: list[_Task] = []
        self._in_flight: dict[Future[Any], list[_Task]] = {}
        self._error: BaseException | None = None
        self.begun = self.ended = False
        self._go_on()

    @property
    def suspects(self) -> bool:
        """Whether there are tasks to hand out again, because a worker died while it had them."""
        return self._error is None and bool(self._again)

    def offers(self, suspects: bool = True) -> bool:
        """Whether a task can be handed out; tasks to hand out again count if ``suspects``."""
        return self._error is None and (self._next is not None or (suspects and bool(self._again)))

    def hand_out(self, submit: Callable[..., Future[Any]], most: int) -> Future[Any]:
        """Submit up to ``most`` tasks to a worker, or a single task that was lost before if ``most`` is 0."""
        self.begun = self.begun or not self.group.urgent
        if most == 0:
            tasks = [self._again.pop(0)]
        else:
            tasks = [task for task in (self._next,) if task]
            tasks.extend(islice(self._tasks, most - 1))
            self._look_ahead()
        future = submit(_make_calls, self.group.call, [task.item for task in tasks])
        self._in_flight[future] = tasks
        return future

    def take(self, future: Future[Any]) -> float | None:
        """Collect the results of a call and, if it was the group's last, continue the workflow.

        Returns:
            Seconds per task; None for urgent tasks and for lost ones.
        """
        tasks, seconds = self._in_flight.pop(future), None
        loss = CancelledError() if future.cancelled() else future.exception()
        if loss is not None:
            for task in tasks:
                self._lose(task, loss)
        else:
            results, call_seconds = future.result()
            seconds = None if self.group.urgent else call_seconds / len(tasks)
            for result, error in results:
                if error is None:
                    self.group.collect(result)
                else:
                    self._error = self._error or error
        if not self._in_flight and not self.offers():
            self._go_on()
        return seconds

    def close(self) -> None:
        """Close the workflow's generator, so that it cleans up."""
        self._workflow.close()

    def _lose(self, task: _Task, loss: BaseException) -> None:
        if task.losses + 1 < _MOST_LOSSES:
            self._again.append(_Task(task.item, task.losses + 1))
        elif self.group.lost is not None:
            self.group.lost(task.item, loss)
        else:
            self._error = self._error or ClusterError(
                "`scheduler`",
                expected="a worker that lives through a call",
                found=f"{_MOST_LOSSES} that died of one ({type(loss).__name__})",
                remedy="use more memory, or see their logs",
            )

    def _go_on(self) -> None:
        """Run the workflow to its next group with a task, or to its end."""
        try:
            while not self.offers():
                error, self._error = self._error, None
                # A failed group may have tasks left.
                self._next = None
                self._again.clear()
                self.group = next(self._workflow) if error is None else self._workflow.throw(error)
                self._tasks = self._list(self.group.items)
                self._look_ahead()
        except StopIteration as end:
            self.result, self.ended, self.begun = end.value, True, True

    def _look_ahead(self) -> None:
        self._next = next(self._tasks, None)

    def _list(self, items: Iterable[Any]) -> Iterator[_Task]:
        """The tasks of the items; an error while they are listed is raised in the workflow."""
        try:
            yield from map(_Task, items)
        except Exception as error:
            self._error = self._error or error


def _make_calls(call: Callable[[Any], Any], items: list[Any]) -> tuple[list[tuple[Any, Exception | None]], float]:
    """Make the calls in a worker: (result, error) of each, and the seconds that all of them took."""
    start = time.perf_counter()
    results: list[tuple[Any, Exception | None]] = []
    for item in items:
        try:
            results.append((call(item), None))
        except Exception as error:
            results.append((None, error))
    return results, time.perf_counter() - start


class Pool(Protocol):
    """The interface of a pool of workers."""

    @property
    def workers(self) -> int:
        """Number of calls that run at a time."""
        ...

    @property
    def window(self) -> int:
        """Number of calls to hand out at a time, so that no worker ever waits for its next call."""
        ...

    @property
    def seconds_per_call(self) -> float:
        """Seconds that a call should take at least, so that handing it out costs next to nothing."""
        ...

    def submit(self, call: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Have a worker make the call; the future fails only if the worker fails, or if the call ends its process.

        Raises:
            ClusterError: there will be no worker any more.
        """
        ...

    def close(self, wait: bool) -> None:
        """Release the workers; if ``wait``, after the calls that have begun."""
        ...


class ThreadPool:
    """Threads of this process; reading, computing and writing all release the interpreter lock."""

    seconds_per_call = 0.1

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.window = 2 * workers
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="block")

    def submit(self, call: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Have a thread make the call."""
        return self._executor.submit(call, *arguments)

    def close(self, wait: bool) -> None:
        """Release the threads; if ``wait``, after the calls that have begun."""
        self._executor.shutdown(wait, cancel_futures=True)


def call_alone(pool: Pool, call: Callable[[Any], Result], item: Any) -> Result:
    """Make a single call before there are workflows, and return its result.

    Raises:
        ClusterError: the call kills its worker.
    """
    return next(Scheduler(iter([ask(call, item)]), pool, Stop()).run())


def run_workflows(
    workflows: Iterable[Workflow[Result]], pool: Pool, stop: Stop | None = None
) -> Generator[Result, None, None]:
    """Run every workflow to its end, and yield their results in the order in which they end.

    An exception that a workflow does not catch ends the run; so does closing the generator.

    Raises:
        Stopped: ``stop`` was asked to end the run; running calls were given its grace time.
    """
    stop = stop or Stop()
    scheduler = Scheduler(workflows, pool, stop)
    try:
        with stop.wakes(scheduler.wake):
            yield from scheduler.run()
    finally:
        scheduler.close()


class Scheduler(Generic[Result]):
    """Hands the tasks of workflows to a pool.

    Args:
        workflows: the workflows, begun one after the other as workers become free.
        pool: the pool, closed with the scheduler.
        stop: asks the run to end early.
    """

    def __init__(self, workflows: Iterable[Workflow[Result]], pool: Pool, stop: Stop) -> None:
        self._waiting = iter(workflows)
        self._pool = pool
        self._stop = stop
        self._running: list[RunningWorkflow[Result]] = []
        self._in_flight: dict[Future[Any], RunningWorkflow[Result]] = {}
        self._suspect: Future[Any] | None = None
        self._returned: SimpleQueue[Future[Any] | None] = SimpleQueue()
        self._per_call = 1

    def run(self) -> Iterator[Result]:
        """Run the workflows, and yield their results in the order in which they end."""
        while True:
            if self._stop.asked:
                self._drain()
            while len(self._in_flight) < self._pool.window and (workflow := self._next_workflow()):
                self._hand_out(workflow)
            ended = [workflow for workflow in self._running if workflow.ended]
            self._running = [workflow for workflow in self._running if not workflow.ended]
            yield from (workflow.result for workflow in ended)
            if self._in_flight:
                self._take(self._returned.get())
            elif not ended:
                return

    def wake(self) -> None:
        """Make the run check whether it has to stop; safe in a signal handler."""
        self._returned.put(None)

    def close(self) -> None:
        """Close the pool and the workflows."""
        self._pool.close(wait=not self._stop.asked)
        for workflow in self._running:
            workflow.close()

    def _next_workflow(self) -> RunningWorkflow[Result] | None:
        """The workflow whose task is handed out next: the first with an urgent task, else the oldest."""
        while self._wants_another() and (workflow := next(self._waiting, None)) is not None:
            self._running.append(RunningWorkflow(workflow))
        offering = [workflow for workflow in self._running if workflow.offers(suspects=self._suspect is None)]
        return next((workflow for workflow in offering if workflow.group.urgent), offering[0] if offering else None)

    def _wants_another(self) -> bool:
        """Whether to begin another workflow: one is prepared in advance, several if there is nothing else to do."""
        fresh = [workflow for workflow in self._running if not workflow.begun]
        busy = len(fresh) < len(self._running)
        return len(self._running) <= self._pool.window and len(fresh) < (1 if busy else self._pool.workers)

    def _hand_out(self, workflow: RunningWorkflow[Result]) -> None:
        # One lost task at a time, so that a task that kills its workers does not cause the loss of others each time.
        suspect = workflow.suspects and self._suspect is None
        future = workflow.hand_out(self._pool.submit, 0 if suspect else self._per_call)
        if suspect:
            self._suspect = future
        self._in_flight[future] = workflow
        future.add_done_callback(self._returned.put)

    def _take(self, future: Future[Any] | None) -> None:
        if future is not None:
            self._suspect = None if future is self._suspect else self._suspect
            seconds = self._in_flight.pop(future).take(future)
            if seconds is not None:
                self._per_call = max(1, min(_MOST_PER_CALL, int(self._pool.seconds_per_call / max(seconds, 1e-6))))

    def _drain(self) -> None:
        """Hand out no more tasks, wait for running calls within the grace time, and end the run."""
        for future in list(self._in_flight):
            future.cancel()
        if self._in_flight:
            self._stop.draining()
        latest = time.monotonic() + self._stop.grace
        with suppress(Empty):
            while self._in_flight:
                self._take(self._returned.get(timeout=max(0.0, latest - time.monotonic())))
        raise self._stop.stopped(clean=not self._in_flight)
