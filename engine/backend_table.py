"""List every backend and precision that this version knows, one entry each; no other module lists their names.

The list imports no library, so settings can be checked without one.  Only the module of a backend and its entry here
may know the backend's name; `cellseg_batch.engine.inference.backends.registry` makes backends from both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cellseg_batch.trainer.card import FORMATS, ONNX, SAFETENSORS


@dataclass(frozen=True)
class Package:
    """A Python package, and the command that installs it."""

    name: str
    remedy: str


@dataclass(frozen=True)
class BackendEntry:
    """A library that can run a network.

    Attributes:
        package: the library.
        module: module of the backend, in `cellseg_batch.engine.inference.backends`.
        precisions: precisions that it may offer.
        formats: formats of weights that it runs; see `cellseg_batch.trainer.card.FORMATS`.
        on_gpu: whether it runs on a GPU, or on the CPU.
        extras: precision -> package that it needs besides the library.
        decisive: names of other packages that may affect its speed or its results.
        preload: whether worker processes may share its module, loaded before they fork.
        proof: the command that tests it, for a backend that has not run on hardware yet; "" for the others.
        proof_part: part of ``benchmarks/gpu.sh`` that proves it; "" for backends that are proven.
        eager: name of a backend of the same precisions that compiles at once, if this one compiles for tens of seconds;
            "" for the others.  It may run fewer formats.
    """

    package: Package
    module: str
    precisions: tuple[str, ...]
    formats: tuple[str, ...] = (SAFETENSORS,)
    on_gpu: bool = False
    extras: Mapping[str, Package] = field(default_factory=dict)
    decisive: tuple[str, ...] = ()
    preload: bool = False
    proof: str = ""
    proof_part: str = ""
    eager: str = ""


@dataclass(frozen=True)
class Limits:
    """Limits within which a backend may be used.

    Attributes:
        flipped: largest share of pixels on the other side of the threshold.
        object_f1: smallest F1 of objects.
    """

    flipped: float
    object_f1: float


@dataclass(frozen=True)
class Precision:
    """A precision in which a network is computed.

    Attributes:
        limits: limits that the gate demands.
        on_request: whether it can win a race only if the user asked for it by name.
    """

    limits: Limits = Limits(5e-4, 0.995)
    on_request: bool = False


_TORCH_ON_GPU = BackendEntry(
    Package("torch", "install the CUDA build of torch"),
    "torch_cuda",
    ("fp16",),
    on_gpu=True,
    decisive=("triton",),
    preload=True,
    proof="bash benchmarks/gpu.sh",
    proof_part="tests",
)

KNOWN_BACKENDS: Mapping[str, BackendEntry] = {
    "torch": BackendEntry(Package("torch", "pip install torch"), "torch_cpu", ("fp32", "bf16"), preload=True),
    "openvino": BackendEntry(
        Package("openvino", "pip install openvino"),
        "openvino_cpu",
        ("fp32", "bf16", "int8"),
        FORMATS,
        extras={"int8": Package("nncf", "pip install 'cellseg-batch[int8]'")},
    ),
    "onnxruntime": BackendEntry(
        Package("onnxruntime", "pip install 'cellseg-batch[onnx]'"),
        "onnxruntime_cpu",
        ("fp32",),
        (ONNX,),
        decisive=("onnx",),
    ),
    "torch-cuda": _TORCH_ON_GPU,
    "torch-compile": replace(_TORCH_ON_GPU, proof_part="compile-tests", eager="torch-cuda"),
    "tensorrt": BackendEntry(
        Package("tensorrt", "pip install 'cellseg-batch[tensorrt]'"),
        "tensorrt_gpu",
        ("fp16",),
        FORMATS,
        on_gpu=True,
        decisive=("torch-tensorrt", "triton"),
        proof="pytest -m tensorrt",
        proof_part="tensorrt-tests",
        eager="torch-cuda",
    ),
}

KNOWN_PRECISIONS: Mapping[str, Precision] = {
    "fp32": Precision(),
    "bf16": Precision(),
    "fp16": Precision(),
    # It flips 2e-4 more of the pixels than bf16; a user who asks for it by name accepts that for its speed.
    "int8": Precision(Limits(6e-4, 0.99), on_request=True),
}

LIKELY_WINNERS = (("openvino", "bf16"), ("openvino", "fp32"))
"""(backend, precision) of what wins races on CPUs, the likeliest first."""
