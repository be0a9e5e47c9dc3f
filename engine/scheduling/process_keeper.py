"""Keep processes of this machine alive: start them, watch them, and restart those that die.

This module must not know what the processes do.  They are forked from a server that has imported the modules that all
of them need, so a process starts at once, and each ends with the process that started it.  A terminal or SLURM sends
the signals that end a run to all of its processes; here they are blocked, because the run alone handles them.
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

# Seconds to wait before each try to start a process; a process that has started resets the sequence.
_WAITS = (0.0, 0.0, 1.0, 3.0, 9.0)


class Processes(Generic[Task]):
    """Keeps a process for each of ``tasks`` alive, each watched by a thread.

    Args:
        serve: runs in a process with its task until the process is to end; it calls its second argument once it has
            started.
        tasks: the task of each process.
        imports: modules that every process needs.
        gone: called with the reason when the last process is given up, because none of its tries has started.
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
        self._remaining = len(tasks)
        self._running: set[BaseProcess] = set()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["__main__", *imports])
        self._keepers = [threading.Thread(target=self._keep, args=(task,), daemon=True) for task in tasks]
        for keeper in self._keepers:
            keeper.start()
        # At exit Python waits for the processes, which may not heed the signal that it sends them; close them before.
        atexit.register(self.close)

    def close(self, seconds: float = 0.0) -> None:
        """Start no more processes; wait ``seconds`` for the running ones to end by themselves, then kill them."""
        atexit.unregister(self.close)
        with self._lock:
            self._ended.set()
        latest = time.monotonic() + seconds
        for keeper in self._keepers:
            keeper.join(max(0.0, latest - time.monotonic()))
        for process in list(self._running):
            process.kill()
        for keeper in self._keepers:
            keeper.join()

    def _keep(self, task: Task) -> None:
        """Run processes for the task one after the other, until `close` or until too many tries have failed."""
        failures, end = 0, ""
        while failures < len(_WAITS):
            if self._ended.wait(_WAITS[failures]):
                return
            started = self._context.RawValue("b", 0)
            try:
                end = f"exit code {self._run(task, started)}"
            except Exception as error:  # the process could not be created
                end = f"{type(error).__name__}: {error}"
            failures = 0 if started.value else failures + 1
        self._give_up(f"{failures} tries that ended before it had started, the last with {end}")

    def _run(self, task: Task, started: Any) -> int | None:
        """Run one process from its start to its end and return its exit code; None after `close`."""
        process = self._context.Process(target=_run_task, args=(self._serve, task, started), daemon=True)
        with self._lock:
            if self._ended.is_set():
                return None
            process.start()
            self._running.add(process)
        process.join()
        self._running.discard(process)
        return process.exitcode

    def _give_up(self, reason: str) -> None:
        with self._lock:
            self._remaining -= 1
            is_last = not self._remaining and not self._ended.is_set()
        if is_last:
            self._gone(reason)


def _run_task(serve: Callable[[Task, Callable[[], None]], None], task: Task, started: Any) -> None:
    """Serve the task in a process of its own; sets the shared value ``started`` to 1 once it has started."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def note_start() -> None:
        started.value = 1

    serve(task, note_start)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
