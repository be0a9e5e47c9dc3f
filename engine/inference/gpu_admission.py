"""Admit blocks to a GPU: as many as come until its memory is full, then fewer at a time.

It must not know what a block holds there, nor how much memory there is.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(eq=False)
class Stay:
    """One block's stay on the device.

    Attributes:
        limit: limit of the admission when the stay began.
        shared: whether another block was there at any moment of the stay.
    """

    limit: int | None
    shared: bool = False


class Admission:
    """Admits the blocks of all slides to one device.

    Attributes:
        limit: number of blocks admitted at a time; None admits every block.
    """

    def __init__(self) -> None:
        self.limit: int | None = None
        self._stays: set[Stay] = set()
        self._changed = threading.Condition()

    @contextmanager
    def stay(self) -> Iterator[Stay]:
        """Wait until the limit allows another block, which is on the device as long as the context lasts."""
        with self._changed:
            self._changed.wait_for(lambda: self.limit is None or len(self._stays) < self.limit)
            stay = Stay(self.limit)
            self._stays.add(stay)
            if len(self._stays) > 1:
                for present in self._stays:
                    present.shared = True
        try:
            yield stay
        finally:
            with self._changed:
                self._stays.remove(stay)
                self._changed.notify_all()

    def lower(self, stay: Stay) -> bool:
        """Admit fewer blocks from now on, because memory was full during ``stay``, which must still last.

        A limit that was lowered since the stay began is left as it is: many blocks find the memory full at once.

        Returns:
            Whether another attempt may succeed: False if the block was alone on the device.
        """
        with self._changed:
            if stay.shared and stay.limit == self.limit:
                self.limit = max(1, len(self._stays) - 1)
            return stay.shared
