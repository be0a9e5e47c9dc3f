"""Pick the backend: the one asked for, or the fastest that is installed, native and passes the gate."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from cellseg_batch.engine.backends.backend import Backend
from cellseg_batch.engine.backends.parity import FLIPPED_LIMIT, gate_tiles, measure_parity
from cellseg_batch.engine.errors import BackendError, CellsegError, ModelError
from cellseg_batch.trainer.bundle import Bundle

_log = logging.getLogger(__name__)

# Fastest first, as measured on the shipped network (benchmarks/results/model.json); TensorRT, which is offered on
# GPUs only, has not been measured.
_RANKING = (("tensorrt", "fp16"), ("openvino", "bf16"), ("openvino", "fp32"), ("torch", "bf16"), ("torch", "fp32"))
_REFERENCE = ("torch", "fp32")


def available_precisions(backend: str) -> tuple[str, ...]:
    """The precisions that a backend offers on this machine; () when it is not installed or not supported."""
    try:
        if backend == "openvino":
            from cellseg_batch.engine.backends.openvino_backend import supported_precisions

            return supported_precisions()
        if backend == "tensorrt":
            from cellseg_batch.engine.backends import tensorrt_backend

            return tensorrt_backend.supported_precisions()
        if backend == "torch":
            from cellseg_batch.engine.backends.torch_backend import PRECISIONS

            return PRECISIONS
    except Exception:  # a library that is missing or half installed fails in its own way; doctor shows how
        _log.debug("%s is not available", backend, exc_info=True)
    return ()


def make_backend(bundle: Bundle, backend: str, precision: str, threads: int) -> Backend:
    """One backend by name.

    Raises:
        BackendError: it is not installed, or does not offer this precision here.
    """
    offered = available_precisions(backend)
    if precision not in offered:
        raise BackendError(
            f"--backend {backend} --precision {precision}",
            expected=f"a precision that {backend} offers on this machine ({', '.join(offered) or 'none'})",
            found=precision,
            cause="" if offered else f"{backend} is not installed or has no device here",
            remedy="see cellseg-batch doctor, or leave the choice to auto",
        )
    if backend == "openvino":
        from cellseg_batch.engine.backends.openvino_backend import OpenVinoBackend

        return OpenVinoBackend(bundle, precision, threads)
    if backend == "tensorrt":
        from cellseg_batch.engine.backends.tensorrt_backend import TensorRtBackend

        return TensorRtBackend(bundle, precision, threads)
    from cellseg_batch.engine.backends.torch_backend import TorchBackend

    return TorchBackend(bundle, precision, threads)


def choose_backend(bundle: Bundle, backend: str, precision: str, threads: int) -> Backend:
    """The fastest backend that fits what was asked for and whose masks agree with torch fp32.

    Raises:
        BackendError: none is installed, or none passes the gate.
    """
    refused: list[str] = []
    reference: Backend | None = None
    for name, level in _candidates(backend, precision):
        if (name, level) == _REFERENCE:
            return make_backend(bundle, name, level, threads)
        reference = reference or make_backend(bundle, *_REFERENCE, threads)
        try:
            candidate = make_backend(bundle, name, level, threads)
            parity = measure_parity(candidate, reference, gate_tiles(bundle), bundle.card.threshold)
        except ModelError:
            raise
        except Exception as error:  # a network that this library cannot take; another one may
            _log.debug("%s %s cannot run the model", name, level, exc_info=True)
            reason = error.detail if isinstance(error, CellsegError) else f"{type(error).__name__}: {error}"
            refused.append(f"{name} {level} cannot run the model ({reason})")
            continue
        if parity.passed:
            return candidate
        refused.append(f"{name} {level} flips {parity.flipped:.1e} of the pixels (limit {FLIPPED_LIMIT:.0e})")
    raise BackendError(
        f"--backend {backend} --precision {precision}",
        expected="a backend that is installed and agrees with torch fp32",
        found="; ".join(refused) or "none that offers this here",
        remedy="see cellseg-batch doctor, or leave --backend and --precision to auto",
    )


def _candidates(backend: str, precision: str) -> Iterator[tuple[str, str]]:
    offered = {name: available_precisions(name) for name in dict(_RANKING)}
    for name, level in _RANKING:
        if backend in ("auto", name) and precision in ("auto", level) and level in offered[name]:
            yield name, level
