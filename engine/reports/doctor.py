"""Diagnose this machine: processor, memory, backends and models, missing packages and their remedies."""

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
from cellseg_batch.engine.reports.gpu_proof import GpuProof, read_proof
from cellseg_batch.engine.storage.cache import Artefacts

_LIBRARIES = ("zarr", "numcodecs", "tifffile", "imagecodecs", "dask", "numba", "triton", "yaozarrs")


@dataclass(frozen=True)
class Library:
    """A package that cellseg-batch uses.

    Attributes:
        name: name of the package.
        version: installed version; None if the package is missing.
        remedy: command that installs the missing package; "" if nothing is missing.
    """

    name: str
    version: str | None
    remedy: str


@dataclass(frozen=True)
class BackendState:
    """Availability of a backend at a precision.

    Attributes:
        backend, precision: names of the two.
        device: CPU or GPU.
        version: version of the backend's package; None if the package is missing.
        reason: why the backend is unavailable; "" if it is available.
        remedy: how to make the backend available, or how to prove it if it has not run on hardware yet.
    """

    backend: str
    precision: str
    device: str
    version: str | None
    reason: str
    remedy: str


@dataclass(frozen=True)
class Diagnosis:
    """Hardware, backends, models and packages of this machine.

    Attributes:
        version: version of cellseg-batch.
        python: version of Python.
        processor: model of the processor.
        cores: number of cores that this process may use.
        memory_bytes, free_bytes: total and free memory of the machine.
        gpus: names of the GPUs, from the driver.
        gpu_proof: what ``benchmarks/gpu.sh`` has proven with this GPU, driver and packages; None if nothing.
        backends: every backend at every precision.
        compiled_entries: number of compiled networks and race results in the cache.
        compiled_folder: folder of that cache.
        models: names of the shipped models.
        libraries: all other packages.
    """

    version: str
    python: str
    processor: str
    cores: int
    memory_bytes: int
    free_bytes: int
    gpus: tuple[str, ...]
    gpu_proof: GpuProof | None
    backends: tuple[BackendState, ...]
    compiled_entries: int
    compiled_folder: str
    models: tuple[str, ...]
    libraries: tuple[Library, ...]

    @property
    def fault(self) -> str:
        """What keeps this machine from segmenting, or its GPUs from being used, and the remedy; "" if nothing does."""
        wanted = "GPU" if self.gpus else "CPU"
        states = [state for state in self.backends if state.device == wanted]
        if not all(state.reason for state in states):
            return ""
        remedies = [state.remedy for state in states if state.remedy]
        return f"no backend runs on the {wanted}; {remedies[0] if remedies else 'see the reasons below'}"

    def to_json(self) -> dict[str, Any]:
        """The diagnosis as plain JSON values."""
        return {**asdict(self), "fault": self.fault}


def diagnose() -> Diagnosis:
    """Diagnose this machine; this loads the library of every backend."""
    memory, artefacts, proof = psutil.virtual_memory(), Artefacts(), read_proof()
    return Diagnosis(
        version=version("cellseg-batch"),
        python=platform.python_version(),
        processor=processor(),
        cores=cores(),
        memory_bytes=memory.total,
        free_bytes=memory.available,
        gpus=tuple(gpus()),
        gpu_proof=proof,
        backends=tuple(
            _backend(name, precision, proof) for name, entry in KNOWN_BACKENDS.items() for precision in entry.precisions
        ),
        compiled_entries=len(artefacts.entries()),
        compiled_folder=str(artefacts.kept),
        models=tuple(shipped_models()),
        libraries=(*map(_library, _LIBRARIES), _object_stores()),
    )


def _backend(name: str, precision: str, proof: GpuProof | None) -> BackendState:
    entry = KNOWN_BACKENDS[name]
    reason, _, remedy = why_not(name, precision).rpartition("; ")
    if not reason:  # `why_not` names no remedy, so the text is a reason alone
        reason, remedy = remedy, ""
    else:
        reason = f"missing: {reason}"
    proven = proof is not None and proof.passed(entry.proof_part)
    if entry.proof and not proven and (remedy or not reason):
        remedy = "; ".join(filter(None, (remedy, f"not yet run on hardware: {entry.proof} in a clone proves it")))
    device = "GPU" if entry.on_gpu else "CPU"
    return BackendState(name, precision, device, package_version(entry.package.name), reason, remedy)


def _library(name: str) -> Library:
    installed = package_version(name)
    return Library(name, installed, "" if installed else f"pip install {name}")


def _object_stores() -> Library:
    remedy = "" if package_version("boto3") else "pip install 'cellseg-batch[s3]'"
    return Library("obstore", package_version("obstore"), remedy)
