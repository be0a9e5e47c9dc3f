"""Run networks on sample windows of a slide, to estimate the size of its nuclei before its tiles are laid."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.inference.backends.protocol import Backend, Logits, Shape
from cellseg_batch.engine.inference.normalise import Bounds
from cellseg_batch.engine.inference.session import Session, compile_network

_MAX_SESSIONS = 4

_Key = tuple[Backend, Shape, np.dtype[Any]]


class Probes:
    """Sessions for windows; windows are small, so a few sessions are kept for the next slide.

    Args:
        run_lock: lock held while a network runs.
        counted: context that counts the time spent inside as compiling.
    """

    def __init__(
        self, run_lock: AbstractContextManager[Any], counted: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._run_lock = run_lock
        self._counted = counted
        self._lock = threading.Lock()
        self._sessions: dict[_Key, Session] = {}

    def logits(
        self,
        backend: Backend,
        shape: Shape,
        pixels: NDArray[Any],
        rows: NDArray[np.int64],
        columns: NDArray[np.int64],
        bounds: Bounds,
    ) -> Logits:
        """Return a new array of logits (N, K, T_y, T_x) of a batch of ``shape``; arguments as `Session.fill`."""
        with self._lock:
            session = self._session(backend, shape, pixels.dtype)
            session.fill(pixels, rows, columns, bounds)
            return session.logits().copy()

    def clear(self) -> None:
        """Free the memory of every session."""
        with self._lock:
            self._sessions.clear()

    def _session(self, backend: Backend, shape: Shape, dtype: np.dtype[Any]) -> Session:
        key = (backend, shape, dtype)
        if key not in self._sessions:
            if len(self._sessions) >= _MAX_SESSIONS:
                self._sessions.clear()
            with self._counted():
                self._sessions[key] = Session(compile_network(backend, shape, dtype), self._run_lock)
        return self._sessions[key]
