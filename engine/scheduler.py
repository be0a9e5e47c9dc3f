"""Run the tasks of a slide through dask: one task per block, a bounded number known to dask at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

import dask

Item = TypeVar("Item")
Result = TypeVar("Result")

# The window bounds the graph; between two windows the pipeline drains once, which costs one block's read.
_WINDOW = 256


def run_tasks(task: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Apply ``task`` to every item on ``workers`` threads; results come window by window, in order.

    An exception in a task ends the run; a task that may fail returns its failure.
    """
    waiting = iter(items)
    lazy = dask.delayed(task, pure=False, traverse=False)
    while window := list(islice(waiting, _WINDOW)):
        yield from dask.compute(*(lazy(item) for item in window), scheduler="threads", num_workers=workers)
