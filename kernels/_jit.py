"""Configure Numba for all kernels: functions are compiled once and cached on disk if the cache folder is writable.

The cache lies in the user's cache folder.  Beside the code it would outlive ``pip uninstall`` and hide the next
installation.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba.core import event

from cellseg_batch.kernels._compiling import begun

Function = TypeVar("Function", bound=Callable[..., Any])


def _prepare_cache() -> bool:
    """Choose the cache folder, the user's NUMBA_CACHE_DIR first, and return whether it is writable."""
    if not numba.config.CACHE_DIR:
        # For a user without a home, as in containers, the ~ stays, whereas Path.expanduser would raise an error.
        base = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")  # noqa: PTH111
        numba.config.CACHE_DIR = str(Path("/", base) / "cellseg-batch")
    try:
        Path(numba.config.CACHE_DIR).mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(numba.config.CACHE_DIR, os.W_OK)


_CACHE = _prepare_cache()


class _Compiling(event.Listener):  # type: ignore[misc]
    """Hears of each kernel that is compiled, and of none that is loaded from the cache."""

    def on_start(self, _: event.Event) -> None:
        begun()

    def on_end(self, _: event.Event) -> None:
        pass


event.register("numba:compile", _Compiling())


def jit(function: Function) -> Function:
    """Compile ``function``; it releases the interpreter lock while it runs, and its arithmetic is not reordered."""
    compiled: Function = numba.njit(nogil=True, cache=_CACHE)(function)
    return compiled
