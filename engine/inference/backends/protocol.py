"""Define the interfaces of a backend, of its module and of the models that it compiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.storage.cache import Artefacts
from cellseg_batch.trainer.bundle import Bundle

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, int, int, int]
Logits = NDArray[np.float32]
Numbers = NDArray[np.float32]

# Version of the conversion to OpenVINO and TensorRT. It is part of the cache keys of networks and races: raise it with
# every change to folding, equalising, rounding or quantising, or to plain graphs.
CONVERSION_VERSION = 4


class CompiledModel(Protocol):
    """A network ready to run at one batch shape."""

    def __call__(self, batch: NDArray[np.float32], /, *, out: Logits | None = None) -> Logits:
        """Return logits (N, K, H, W) float32 of pixels (N, C, H, W) float32 in [0, 1].

        Two threads must not call it at once.

        Args:
            batch: pixels, C-contiguous.
            out: logits of an earlier call, whose memory the result may reuse; None makes a new array.
        """
        ...


class ByteModel(Protocol):
    """A network ready to run at one batch shape; it takes bytes and normalises them itself."""

    def __call__(
        self, batch: NDArray[np.uint8], low: Numbers, scale: Numbers, /, *, out: Logits | None = None
    ) -> Logits:
        """Return logits of pixels (N, H, W, C) uint8, which become ``(batch - low) * scale``, clipped as the card says.

        Low and scale are (C,) float32; see `CompiledModel` for the rest.
        """
        ...


class DeviceModel(CompiledModel, Protocol):
    """A compiled model with its batch and logits on a GPU, for callers that fill and read them on the GPU.

    Attributes:
        pixels: (N, C, H, W) float16, always at the same address.
        logits: (N, K, H, W) float16, always at the same address.
    """

    pixels: Tensor
    logits: Tensor

    def enqueue(self) -> None:
        """Enqueue the network on the current stream; it reads `pixels` and writes `logits` when its turn comes."""
        ...

    def repeat(self) -> None:
        """Compute the last batch again and wait for it, without copies, to time the device alone."""
        ...


class Backend(Protocol):
    """A bundle's network in one library at one precision.

    Attributes:
        name: name of the backend, such as openvino.
        precision: fp32, bf16, fp16 or int8.
        version: version of the library, for the manifest.
    """

    name: str
    precision: str
    version: str

    def compile(self, shape: Shape) -> CompiledModel:
        """Make the network ready for batches of ``shape`` (N, C, H, W)."""
        ...

    def compile_bytes(self, shape: Shape) -> ByteModel | None:
        """Make the network ready for pixels in bytes; None if that would gain nothing."""
        ...


@dataclass(frozen=True)
class BackendRequest:
    """Options for making a backend, besides the bundle.

    Attributes:
        name: name of the backend, because several backends may share a module.
        precision: a precision that the module supports.
        threads: number of threads, for a backend on the CPU.
        artefacts: cache for compiled networks.
        gpu: torch's name of the GPU, for a backend on a GPU.
    """

    name: str
    precision: str
    threads: int
    artefacts: Artefacts
    gpu: str


class BackendModule(Protocol):
    """The functions of a backend's module, which its entry in the backend table names."""

    def supported_precisions(self) -> tuple[str, ...]:
        """Return the precisions that this machine runs natively.

        Raises:
            BackendError: the library cannot run here.
        """
        ...

    def make(self, bundle: Bundle, request: BackendRequest) -> Backend:
        """Make the backend of a bundle's network; raises BackendError."""
        ...
