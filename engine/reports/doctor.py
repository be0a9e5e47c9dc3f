"""What this machine has (processor, memory, backends, models), what is missing and how to get it."""

from __future__ import annotations

import platform
from importlib.metadata import version

import psutil
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cellseg_batch.engine.backend_table import KNOWN_BACKENDS, BackendEntry
from cellseg_batch.engine.inference.backends.registry import why_not
from cellseg_batch.engine.machine import cores, gpus, package_version, processor
from cellseg_batch.engine.models import shipped_models
from cellseg_batch.engine.storage.cache import Artefacts

_LIBRARIES = ("zarr", "numcodecs", "tifffile", "imagecodecs", "dask", "numba", "triton", "yaozarrs")


def print_diagnosis(console: Console) -> None:
    """Print the findings as one table."""
    table = Table("what", "found", "remedy", title=f"cellseg-batch {version('cellseg-batch')}", title_justify="left")
    memory = psutil.virtual_memory()
    table.add_row("python", platform.python_version(), "")
    table.add_row("processor", f"{processor()}, {cores()} cores to use", "")
    table.add_row("memory", f"{memory.total / 1e9:.1f} GB, {memory.available / 1e9:.1f} GB free", "")
    table.add_row("GPUs", "; ".join(gpus()) or "none of NVIDIA's that has a driver", "")
    for backend, entry in KNOWN_BACKENDS.items():
        for precision in entry.precisions:
            reason = why_not(backend, precision)
            table.add_row(f"backend {backend} {precision}", *_backend(entry, reason))
    artefacts = Artefacts()
    table.add_row("compiled", f"{len(artefacts.entries())} entries in {artefacts.folder}", "compile --list")
    table.add_row("models", ", ".join(shipped_models()) or "none", "")
    for library in _LIBRARIES:
        table.add_row(library, *_library(library))
    found, _ = _library("obstore")
    table.add_row("object stores", found, "" if package_version("boto3") else escape("pip install 'cellseg-batch[s3]'"))
    console.print(table)


def _backend(entry: BackendEntry, reason: str) -> tuple[str, str]:
    unproven = f"not yet run on hardware: {entry.proof} in a clone proves it" if entry.proof else ""
    if not reason:
        return f"{_library(entry.package.name)[0]} on the {'GPU' if entry.on_gpu else 'CPU'}", unproven
    found, _, remedy = reason.rpartition("; ")
    return (escape(f"missing: {found}"), escape(f"{remedy}; {unproven}".removesuffix("; "))) if found else (reason, "")


def _library(name: str) -> tuple[str, str]:
    found = package_version(name)
    return (found, "") if found else ("missing", f"pip install {name}")
