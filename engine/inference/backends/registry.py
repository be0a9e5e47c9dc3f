"""Tell which backends of the table are available on this machine, and make a backend by name."""

from __future__ import annotations

import importlib
import logging
from typing import cast

from cellseg_batch.engine.backend_table import KNOWN_BACKENDS
from cellseg_batch.engine.errors import BackendError
from cellseg_batch.engine.inference.backends.protocol import Backend, BackendModule, BackendRequest
from cellseg_batch.engine.machine import package_version
from cellseg_batch.engine.storage.cache import Artefacts
from cellseg_batch.trainer.bundle import Bundle
from cellseg_batch.trainer.card import ONNX, SAFETENSORS

_log = logging.getLogger(__name__)
_MODULES = __name__.rpartition(".")[0]

# Format of weights -> backend and precision whose result the others are held against.
REFERENCES = {SAFETENSORS: ("torch", "fp32"), ONNX: ("onnxruntime", "fp32")}


def why_not(backend: str, precision: str) -> str:
    """Return the reason why a backend is not available here at a precision; "" if it is."""
    entry = KNOWN_BACKENDS.get(backend)
    if entry is None:
        return "this version has no such backend"
    if precision not in entry.precisions:
        return f"{backend} offers {', '.join(entry.precisions)}"
    try:
        offered = _load(backend).supported_precisions()
    except BackendError as error:
        return error.detail
    except Exception as error:  # a half-installed library can fail in any way
        _log.debug("%s is not available", backend, exc_info=True)
        return f"{type(error).__name__}: {error}; {entry.package.remedy}"
    extra = entry.extras.get(precision)
    if extra is not None and package_version(extra.name) is None:
        return f"needs {extra.name}; {extra.remedy}"
    return "" if precision in offered else f"this processor has no native {precision}"


def candidates(weights: str, backend: str, precision: str, device: str = "auto") -> list[tuple[str, str]]:
    """Return (backend, precision) of every known backend that fits the request, installed or not.

    Args:
        weights: format of the model's weights.
        backend: a name or auto.
        precision: a name or auto.
        device: auto, cpu, or GPUs.
    """
    return [
        (name, offered)
        for name, entry in KNOWN_BACKENDS.items()
        if weights in entry.formats
        and backend in ("auto", name)
        and (device == "auto" or entry.on_gpu == (device != "cpu"))
        for offered in entry.precisions
        if precision in ("auto", offered)
    ]


def make_backend(
    bundle: Bundle, backend: str, precision: str, threads: int, artefacts: Artefacts, gpu: str = "cuda:0"
) -> Backend:
    """Make a backend by name; a backend for GPUs runs on ``gpu``.

    Raises:
        BackendError: the backend is not installed, or does not offer this precision here.
    """
    demand_format(backend, bundle)
    reason = why_not(backend, precision)
    if reason:
        raise BackendError(
            f"`backend={backend}` `precision={precision}`",
            expected="a backend that can be had on this machine",
            found=reason,
            remedy="see cellseg-batch doctor, or leave the choice to auto",
        )
    return _load(backend).make(bundle, BackendRequest(backend, precision, threads, artefacts, gpu))


def demand_format(backend: str, bundle: Bundle) -> None:
    """Check that a backend runs the format of a bundle's weights; auto always does.

    Raises:
        BackendError: it does not.
    """
    entry, weights = KNOWN_BACKENDS.get(backend), bundle.card.format
    if entry is not None and weights not in entry.formats:
        able = ", ".join(name for name, other in KNOWN_BACKENDS.items() if weights in other.formats)
        raise BackendError(
            f"`backend={backend}`",
            expected=f"a backend that runs {weights} models such as {bundle.card.name} ({able})",
            found=f"one that runs {', '.join(entry.formats)}",
            remedy="choose one of these, or leave the choice to auto",
        )


def preloaded_modules(backend: str) -> list[str]:
    """Return modules of a backend, a name or auto, to load before worker processes fork, so that they share them."""
    entry = KNOWN_BACKENDS.get(backend)
    return [f"{_MODULES}.{entry.module}"] if entry is not None and entry.preload else []


def packages() -> list[str]:
    """Return the name of every package that may change a backend's speed or results."""
    names: dict[str, None] = {}
    for entry in KNOWN_BACKENDS.values():
        extras = (package.name for package in entry.extras.values())
        names |= dict.fromkeys([entry.package.name, *extras, *entry.decisive])
    return list(names)


def _load(backend: str) -> BackendModule:
    return cast(BackendModule, importlib.import_module(f"{_MODULES}.{KNOWN_BACKENDS[backend].module}"))
