"""Processes of this machine that are kept alive: started, watched, and started anew when they die.

Nothing here knows what they do.  They are forked from a server that has imported what all of them need, so that the
next one is there at once, and each ends with the process that asked for it.  Signals that end a run, which a terminal
or SLURM sends to all of its processes, are left to the run.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from cellseg_batch.engine.scheduling.signals import SIGNALS

Task = TypeVar("Task")

# Seconds to wait before each try to start a process; the first one after it had started begins anew.
_WAITS = (0.0, 0.0, 1.0, 3.0, 9.0)


class Processes(Generic[Task]):
    """Keeps a process for each of ``tasks`` alive, each watched by a thread.

    Args:
        serve: what a process does with its task, until it is to end; calls its second argument once it has started.
        tasks: one for each process.
        imports: modules that every process needs.
        gone: told why, when the last process has been given up because none of its tries came so far as to start.
    """

    def __init__(
        self,
        serve: Callable[[Task, Callable[[], None]], None],
        tasks: Sequence[Task],
        imports: Sequence[str],
        gone: Callable[[str], None],
    ) -> None:
        self._serve = serve
        self._gone = gone
        self._left = len(tasks)
        self._running: set[BaseProcess] = set()
        self._turn = threading.Lock()
        self._ended = threading.Event()
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["__main__", *imports])
        self._keepers = [threading.Thread(target=self._keep, args=(task,), daemon=True) for task in tasks]
        for keeper in self._keepers:
            keeper.start()
        # Before Python waits for the processes by itself, which may not heed the signal that it sends them.
        atexit.register(self.close)

    def close(self, seconds: float = 0.0) -> None:
        """Start no more; give what runs so many seconds to end by itself, then kill it."""
        atexit.unregister(self.close)
        with self._turn:
            self._ended.set()
        latest = time.monotonic() + seconds
        for keeper in self._keepers:
            keeper.join(max(0.0, latest - time.monotonic()))
        for process in list(self._running):
            process.kill()
        for keeper in self._keepers:
            keeper.join()

    def _keep(self, task: Task) -> None:
        failures, end = 0, ""
        while failures < len(_WAITS):
            if self._ended.wait(_WAITS[failures]):
                return
            started = self._context.RawValue("b", 0)
            try:
                end = f"exit code {self._run(task, started)}"
            except Exception as error:  # whatever keeps a process from being made
                end = f"{type(error).__name__}: {error}"
            failures = 0 if started.value else failures + 1
        self._give_up(f"{failures} tries that ended before it had started, the last with {end}")

    def _run(self, task: Task, started: Any) -> int | None:
        """One process from its start to its end; its exit code."""
        process = self._context.Process(target=_live, args=(self._serve, task, started), daemon=True)
        with self._turn:
            if self._ended.is_set():
                return None
            process.start()
            self._running.add(process)
        process.join()
        self._running.discard(process)
        return process.exitcode

    def _give_up(self, why: str) -> None:
        with self._turn:
            self._left -= 1
            last = not self._left and not self._ended.is_set()
        if last:
            self._gone(why)


def _live(serve: Callable[[Task, Callable[[], None]], None], task: Task, started: Any) -> None:
    """What a process runs."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def say() -> None:
        started.value = 1

    serve(task, say)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
