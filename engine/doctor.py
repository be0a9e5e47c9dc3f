"""What this machine has (processor, memory, backends, models), what is missing and how to get it."""

from __future__ import annotations

import importlib
import platform
from importlib.metadata import PackageNotFoundError, version

import psutil
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cellseg_batch.engine.backends.choose import available_precisions
from cellseg_batch.engine.errors import BackendError
from cellseg_batch.engine.machine import cores
from cellseg_batch.engine.models import shipped_models

_BACKENDS = {
    "openvino": "pip install openvino",
    "torch": "pip install torch",
}
_LIBRARIES = ("zarr", "numcodecs", "tifffile", "imagecodecs", "dask", "numba", "yaozarrs")


def print_diagnosis(console: Console) -> None:
    """Print the findings as one table."""
    table = Table("what", "found", "remedy", title=f"cellseg-batch {version('cellseg-batch')}", title_justify="left")
    memory = psutil.virtual_memory()
    table.add_row("python", platform.python_version(), "")
    table.add_row("processor", f"{platform.machine()}, {cores()} cores to use", "")
    table.add_row("memory", f"{memory.total / 1e9:.1f} GB, {memory.available / 1e9:.1f} GB free", "")
    for backend, remedy in _BACKENDS.items():
        table.add_row(f"backend {backend}", *_backend(backend, remedy))
    table.add_row("backend tensorrt", *_tensorrt())
    table.add_row("models", ", ".join(shipped_models()) or "none", "")
    for library in _LIBRARIES:
        table.add_row(library, *_library(library))
    console.print(table)


def _backend(name: str, remedy: str) -> tuple[str, str]:
    try:
        importlib.import_module(f"cellseg_batch.engine.backends.{name}_backend")
    except Exception as error:  # a half-installed library can fail in any way
        return f"missing: {type(error).__name__}: {error}", remedy
    return f"{version(name)} on the CPU: {', '.join(available_precisions(name))}", ""


def _tensorrt() -> tuple[str, str]:
    from cellseg_batch.engine.backends.tensorrt_backend import load_libraries

    proof = "not yet run on hardware: `pytest -m tensorrt` in a clone proves it"
    try:
        tensorrt, _ = load_libraries()
    except BackendError as error:
        return escape(f"missing: {error.detail}"), escape(f"pip install 'cellseg-batch[tensorrt]'; {proof}")
    return f"{tensorrt.__version__} on the GPU: fp16", proof


def _library(name: str) -> tuple[str, str]:
    try:
        return version(name), ""
    except PackageNotFoundError:
        return "missing", f"pip install {name}"
