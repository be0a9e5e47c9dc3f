"""Which backends there are on this machine, and one of them by name."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass

from cellseg_batch.engine.errors import BackendError
from cellseg_batch.engine.inference.backends.protocol import Backend
from cellseg_batch.engine.machine import package_version
from cellseg_batch.engine.storage.cache import Artefacts
from cellseg_batch.trainer.bundle import Bundle

_log = logging.getLogger(__name__)

REFERENCE = ("torch", "fp32")
_CUDA_TORCH = "install the CUDA build of torch"


@dataclass(frozen=True)
class Kind:
    """A backend that this version knows.

    Attributes:
        package: that it needs.
        precisions: that it may offer.
        remedy: how to get it.
        module: of the backend.
        on_gpu: whether it runs on a GPU, or on the CPU.
        proof: the command that proves it where it has not run on hardware yet; "" where it has.
    """

    package: str
    precisions: tuple[str, ...]
    remedy: str
    module: str
    on_gpu: bool = False
    proof: str = ""


KINDS = {
    "torch": Kind("torch", ("fp32", "bf16"), "pip install torch", "torch_cpu"),
    "openvino": Kind("openvino", ("fp32", "bf16", "int8"), "pip install openvino", "openvino_cpu"),
    "torch-cuda": Kind("torch", ("fp16",), _CUDA_TORCH, "torch_cuda", True, "bash benchmarks/gpu.sh"),
    "torch-compile": Kind("torch", ("fp16",), _CUDA_TORCH, "torch_cuda", True, "bash benchmarks/gpu.sh"),
    "tensorrt": Kind(
        "tensorrt", ("fp16",), "pip install 'cellseg-batch[tensorrt]'", "tensorrt_gpu", True, "pytest -m tensorrt"
    ),
}
_EXTRAS = {("openvino", "int8"): ("nncf", "pip install 'cellseg-batch[int8]'")}


def why_not(backend: str, precision: str) -> str:
    """Why a backend cannot be had here at a precision; "" if it can."""
    kind = KINDS.get(backend)
    if kind is None:
        return "this version has no such backend"
    if precision not in kind.precisions:
        return f"{backend} offers {', '.join(kind.precisions)}"
    try:
        module = importlib.import_module(f"cellseg_batch.engine.inference.backends.{kind.module}")
        offered: tuple[str, ...] = module.supported_precisions()
    except BackendError as error:
        return error.detail
    except Exception as error:  # a half-installed library can fail in any way
        _log.debug("%s is not available", backend, exc_info=True)
        return f"{type(error).__name__}: {error}; {kind.remedy}"
    if (backend, precision) in _EXTRAS:
        package, remedy = _EXTRAS[backend, precision]
        return "" if package_version(package) else f"needs {package}; {remedy}"
    return "" if precision in offered else f"this processor has no native {precision}"


def candidates(backend: str, precision: str, device: str = "auto") -> list[tuple[str, str]]:
    """(backend, precision) of everything this version knows that fits what was asked for, installed or not.

    Args:
        backend: a name or auto.
        precision: a name or auto.
        device: auto, cpu, or GPUs.
    """
    return [
        (name, level)
        for name, kind in KINDS.items()
        if backend in ("auto", name) and (device == "auto" or kind.on_gpu == (device != "cpu"))
        for level in kind.precisions
        if precision in ("auto", level)
    ]


def make_backend(
    bundle: Bundle, backend: str, precision: str, threads: int, artefacts: Artefacts, gpu: str = "cuda:0"
) -> Backend:
    """One backend by name; those for GPUs run on ``gpu``.

    Raises:
        BackendError: it is not installed, or does not offer this precision here.
    """
    reason = why_not(backend, precision)
    if reason:
        raise BackendError(
            f"--backend {backend} --precision {precision}",
            expected="a backend that can be had on this machine",
            found=reason,
            remedy="see cellseg-batch doctor, or leave the choice to auto",
        )
    if backend == "openvino":
        from cellseg_batch.engine.inference.backends.openvino_cpu import OpenVinoBackend

        return OpenVinoBackend(bundle, precision, threads, artefacts)
    if KINDS[backend].on_gpu:
        from cellseg_batch.engine.inference.backends.cuda import Device

        if backend == "tensorrt":
            from cellseg_batch.engine.inference.backends.tensorrt_gpu import TensorRtBackend

            return TensorRtBackend(bundle, precision, Device(gpu), artefacts)
        from cellseg_batch.engine.inference.backends.torch_cuda import TorchCudaBackend

        return TorchCudaBackend(bundle, Device(gpu), compiled=backend == "torch-compile")
    from cellseg_batch.engine.inference.backends.torch_cpu import TorchBackend

    return TorchBackend(bundle, precision, threads)
