"""Choose the form of a kernel: Numba if it is installed, otherwise the reference.

Numba is imported when the first such kernel is called.  With its compiler it costs half a second and 80 MB, which a run
saves if all its kernels are as fast in numpy.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType


@cache
def fastest(kernel: str) -> ModuleType:
    """Return the module of the fastest form of ``kernel``, a full module name; references are several times slower."""
    try:
        return import_module(f"{kernel}_numba")
    except ImportError:
        return import_module(f"{kernel}_reference")
