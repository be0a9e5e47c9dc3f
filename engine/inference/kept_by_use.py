"""Keep what takes long to make and much memory: all that is in use, and what was used last as far as it fits.

It must not know what it keeps.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

_Key = TypeVar("_Key", bound=Hashable)
_Value = TypeVar("_Value")


@dataclass(eq=False)
class _Entry(Generic[_Value]):
    """A kept value, its area in px, and the number of callers that use it."""

    value: _Value
    area: int
    users: int = 0


class KeptByUse(Generic[_Key, _Value]):
    """Values by key, each with an area in px that stands for its memory.

    Args:
        area: area in px up to which values without users are kept, those in use included.
    """

    def __init__(self, area: int) -> None:
        self._area = area
        self._entries: OrderedDict[_Key, _Entry[_Value]] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def lend(self, key: _Key, area: int, make: Callable[[], _Value]) -> Iterator[_Value]:
        """Lend the value of ``key`` for as long as the context lasts.

        A missing value is made after room was made for it.  The caller must not lend the same key in two threads while
        its value is made.
        """
        entry = self._use(key)
        if entry is None:
            self._drop_idle(self._area - area)
            entry = _Entry(make(), area, users=1)
            with self._lock:
                self._entries[key] = entry
        try:
            yield entry.value
        finally:
            with self._lock:
                entry.users -= 1

    def drop_idle(self) -> bool:
        """Drop every value without users; return whether there was one."""
        return self._drop_idle(-1)

    def keep_last(self) -> None:
        """From now on, keep no value without users but the one that was used last."""
        self._area = 0
        with self._lock:
            last = next(reversed(self._entries.values()), None)
        if last is not None:
            self._drop_idle(last.area)

    def _use(self, key: _Key) -> _Entry[_Value] | None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                entry.users += 1
                self._entries.move_to_end(key)
            return entry

    def _drop_idle(self, fitting: int) -> bool:
        """Drop values without users, the least recently used first, until the rest takes at most ``fitting`` px."""
        with self._lock:
            area = sum(entry.area for entry in self._entries.values())
            dropped = []
            for key, entry in list(self._entries.items()):
                if area <= fitting:
                    break
                if not entry.users:
                    dropped.append(self._entries.pop(key))
                    area -= entry.area
            return bool(dropped)
