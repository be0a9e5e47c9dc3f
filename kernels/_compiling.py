"""Tell callers that Numba has begun to compile a kernel, which is not in its cache, without importing Numba for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_told: list[Callable[[], None]] = []


@contextmanager
def telling(tell: Callable[[], None]) -> Iterator[None]:
    """Call ``tell`` whenever a kernel begins to be compiled, in any thread, while the context lasts."""
    _told.append(tell)
    try:
        yield
    finally:
        _told.remove(tell)


def begun() -> None:
    """Tell everybody that a kernel begins to be compiled."""
    for tell in tuple(_told):
        tell()
