"""The one place that configures Numba: compiled once, cached on disk where a cache can be written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def jit(function: Function) -> Function:
    """Compile ``function``, releasing the interpreter lock while it runs, without reordered arithmetic."""
    try:
        compiled: Function = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache folder is writable
        compiled = numba.njit(nogil=True)(function)
    return compiled
