"""End a run early at SIGINT, SIGTERM, or SIGUSR1, which SLURM can send before a job's time limit.

The run then hands out no more work, gives running tasks a grace time, and stops; everything in the journal by then is
kept.  A second Ctrl-C stops at once, and also loses only the blocks in flight.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# Less than the 30 s that SLURM waits between SIGTERM and SIGKILL.
GRACE_SECONDS = 20.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(BaseException):
    """Raised by a run that has ended because of a signal.

    Args:
        signum: number of the signal.
        clean: whether all running tasks have ended within the grace time.
    """

    def __init__(self, signum: int, clean: bool = True) -> None:
        super().__init__(signal.Signals(signum).name)
        self.clean = clean
        self.exit_code = 128 + signum


class Stop:
    """Remembers that a run has to end.

    Args:
        grace: grace time of running tasks in seconds.
        draining: called, in the thread of the run, when it begins to wait for running tasks.

    Attributes:
        asked: number of the signal; 0 until there is one.
        grace, draining: as given.
    """

    def __init__(self, grace: float = GRACE_SECONDS, draining: Callable[[], None] = lambda: None) -> None:
        self.asked = 0
        self.grace = grace
        self.draining = draining
        self._wake: Callable[[], None] | None = None

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Handle the signals that end a run, while the context lasts; in other threads than the main one do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def wakes(self, wake: Callable[[], None]) -> Iterator[None]:
        """Have signals call ``wake``, which must be reentrant, and not raise `Stopped`, while the context lasts."""
        self._wake = wake
        try:
            yield
        finally:
            self._wake = None

    def stopped(self, clean: bool) -> Stopped:
        """The exception that a run raises once it has ended."""
        return Stopped(self.asked, clean)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            os._exit(128 + number)
        first, self.asked = not self.asked, self.asked or number
        if self._wake is not None:
            self._wake()
        elif first:
            raise Stopped(number)
