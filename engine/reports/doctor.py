"""What this machine has (processor, memory, backends, models), what is missing and how to get it."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import psutil

from cellseg_batch.engine.backend_table import KNOWN_BACKENDS
from cellseg_batch.engine.inference.backends.registry import why_not
from cellseg_batch.engine.machine import cores, gpus, package_version, processor
from cellseg_batch.engine.models import shipped_models
from cellseg_batch.engine.storage.cache import Artefacts

_LIBRARIES = ("zarr", "numcodecs", "tifffile", "imagecodecs", "dask", "numba", "triton", "yaozarrs")


@dataclass(frozen=True)
class Library:
    """A package that is used.

    Attributes:
        name: of the package.
        version: that is installed; None if it is missing.
        remedy: how to get what is missing; "" if nothing is.
    """

    name: str
    version: str | None
    remedy: str


@dataclass(frozen=True)
class BackendState:
    """Whether a backend can be had at a precision.

    Attributes:
        backend, precision: of what.
        device: CPU or GPU.
        version: of its package; None if that is missing.
        reason: why it cannot be had; "" if it can.
        remedy: how to get it, or to prove it where it has not run on hardware yet.
    """

    backend: str
    precision: str
    device: str
    version: str | None
    reason: str
    remedy: str


@dataclass(frozen=True)
class Diagnosis:
    """What this machine has.

    Attributes:
        version: of cellseg-batch.
        python: its version.
        processor: its model.
        cores: that this process may use.
        memory_bytes, free_bytes: of the machine.
        gpus: as the driver names them.
        backends: every one at every precision.
        compiled_entries: number of networks and races that are kept.
        compiled_folder: where.
        models: names of those that are shipped.
        libraries: the other packages.
    """

    version: str
    python: str
    processor: str
    cores: int
    memory_bytes: int
    free_bytes: int
    gpus: tuple[str, ...]
    backends: tuple[BackendState, ...]
    compiled_entries: int
    compiled_folder: str
    models: tuple[str, ...]
    libraries: tuple[Library, ...]

    def to_json(self) -> dict[str, Any]:
        """The diagnosis as plain JSON values."""
        return asdict(self)


def diagnose() -> Diagnosis:
    """Look at this machine; every backend's library is loaded for it."""
    memory, artefacts = psutil.virtual_memory(), Artefacts()
    return Diagnosis(
        version=version("cellseg-batch"),
        python=platform.python_version(),
        processor=processor(),
        cores=cores(),
        memory_bytes=memory.total,
        free_bytes=memory.available,
        gpus=tuple(gpus()),
        backends=tuple(
            _backend(name, precision) for name, entry in KNOWN_BACKENDS.items() for precision in entry.precisions
        ),
        compiled_entries=len(artefacts.entries()),
        compiled_folder=str(artefacts.folder),
        models=tuple(shipped_models()),
        libraries=(*map(_library, _LIBRARIES), _object_stores()),
    )


def _backend(name: str, precision: str) -> BackendState:
    entry = KNOWN_BACKENDS[name]
    reason, _, remedy = why_not(name, precision).rpartition("; ")
    if not reason:  # a reason alone: nothing would help
        reason, remedy = remedy, ""
    else:
        reason = f"missing: {reason}"
    if entry.proof and (remedy or not reason):
        remedy = "; ".join(filter(None, (remedy, f"not yet run on hardware: {entry.proof} in a clone proves it")))
    device = "GPU" if entry.on_gpu else "CPU"
    return BackendState(name, precision, device, package_version(entry.package.name), reason, remedy)


def _library(name: str) -> Library:
    installed = package_version(name)
    return Library(name, installed, "" if installed else f"pip install {name}")


def _object_stores() -> Library:
    remedy = "" if package_version("boto3") else "pip install 'cellseg-batch[s3]'"
    return Library("obstore", package_version("obstore"), remedy)
