"""Ask a run to end early: SIGINT, SIGTERM, and SIGUSR1, which SLURM can be told to send before the time is up.

The run then hands out no more work, gives what has begun a grace time, and stops; whatever is journalled by then is
kept.  Ctrl-C once more stops at once, and loses no more than the blocks in flight either.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# Below the 30 s that SLURM waits between SIGTERM and SIGKILL.
GRACE_SECONDS = 20.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(BaseException):
    """A run was asked to end and has.

    Args:
        signum: the signal.
        clean: whether everything that had begun has ended within the grace time.
    """

    def __init__(self, signum: int, clean: bool = True) -> None:
        super().__init__(signal.Signals(signum).name)
        self.clean = clean
        self.exit_code = 128 + signum


class Stop:
    """Remembers that a run is to end.

    Attributes:
        asked: the signal, 0 while there was none.
        grace: seconds for what has begun.
    """

    def __init__(self, grace: float = GRACE_SECONDS) -> None:
        self.asked = 0
        self.grace = grace
        self._wake: Callable[[], None] | None = None

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Take the signals that end a run; only a process's main thread can."""
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
        """While the context lasts, a signal calls ``wake``, which must be reentrant, instead of raising `Stopped`."""
        self._wake = wake
        try:
            yield
        finally:
            self._wake = None

    def stopped(self, clean: bool) -> Stopped:
        """What a run raises once it has ended."""
        return Stopped(self.asked, clean)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            os._exit(128 + number)
        first, self.asked = not self.asked, self.asked or number
        if self._wake is not None:
            self._wake()
        elif first:
            raise Stopped(number)
