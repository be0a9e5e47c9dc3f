"""Show a progress bar while a context lasts."""

from __future__ import annotations

from typing import Self

from rich.console import Console
from rich.progress import Progress, ProgressColumn


class ProgressBar:
    """Context manager that shows a progress bar of one task on a terminal; the bar vanishes at the end.

    Args:
        console: console to print to; the bar is hidden if it is no terminal.
        columns: columns of the bar.
        hidden: whether to hide the bar in any case.
    """

    def __init__(self, console: Console, *columns: ProgressColumn, hidden: bool = False) -> None:
        self.console = console
        self._bar = Progress(*columns, console=console, disable=hidden or not console.is_terminal, transient=True)
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
