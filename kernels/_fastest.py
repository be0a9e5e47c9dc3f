"""The one place that chooses how a kernel is computed: by Numba where it is installed, by its reference elsewhere.

Numba is imported when the first such kernel is called: with its compiler it costs half a second and 80 MB, which a run
is spared whose kernels are all as fast in numpy.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType


@cache
def fastest(kernel: str) -> ModuleType:
    """The module of the fastest form of ``kernel``, a full module name; the reference is several times slower."""
    try:
        return import_module(f"{kernel}_numba")
    except ImportError:
        return import_module(f"{kernel}_reference")
