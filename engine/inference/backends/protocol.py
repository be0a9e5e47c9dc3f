"""What every backend provides."""

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

# How a network is converted for OpenVINO. It is part of the cache keys of networks and races, so raise it with every
# change to folding, equalising, rounding or quantising.
CONVERSION_VERSION = 2


class CompiledModel(Protocol):
    """A network ready to run at one batch shape."""

    def __call__(self, batch: NDArray[np.float32], /, *, out: Logits | None = None) -> Logits:
        """Logits (N, K, H, W) float32 of pixels (N, C, H, W) float32 in [0, 1].

        Not to be called from two threads at once.

        Args:
            batch: C-contiguous.
            out: logits of an earlier call, whose memory may be used for the result; a new array otherwise.
        """
        ...


class ByteModel(Protocol):
    """A network ready to run at one batch shape, on pixels that it normalises itself."""

    def __call__(self, batch: NDArray[np.uint8], low: float, scale: float, /, *, out: Logits | None = None) -> Logits:
        """Logits of ``clip((batch - low) * scale, 0, 1)`` for pixels (N, H, W, C) uint8; else as `CompiledModel`."""
        ...


class DeviceModel(CompiledModel, Protocol):
    """A compiled model whose batch and logits lie on a GPU, for those who fill and read them there.

    Attributes:
        pixels: (N, C, H, W) float16, always at the same address.
        logits: (N, K, H, W) float16, likewise.
    """

    pixels: Tensor
    logits: Tensor

    def enqueue(self) -> None:
        """Enqueue on the current stream: logits from what `pixels` will hold by then."""
        ...

    def repeat(self) -> None:
        """Compute the last batch again and wait for it: what the device takes, without the copies."""
        ...


class Backend(Protocol):
    """A bundle's network in one library at one precision.

    Attributes:
        name: the library.
        precision: fp32, bf16, fp16 or int8.
        version: of the library, for the manifest.
    """

    name: str
    precision: str
    version: str

    def compile(self, shape: Shape) -> CompiledModel:
        """Make the network ready for batches of ``shape`` (N, C, H, W)."""
        ...

    def compile_bytes(self, shape: Shape) -> ByteModel | None:
        """The same for pixels in bytes; None where that would gain nothing."""
        ...


@dataclass(frozen=True)
class BackendRequest:
    """What a backend is made for, besides the bundle.

    Attributes:
        name: of the backend, as several may share a module.
        precision: one that the module supports.
        threads: of a backend on the CPU.
        artefacts: where it keeps what is slow to make.
        gpu: of a backend on a GPU, as torch names it.
    """

    name: str
    precision: str
    threads: int
    artefacts: Artefacts
    gpu: str


class BackendModule(Protocol):
    """What the module that a backend's entry names must hold."""

    def supported_precisions(self) -> tuple[str, ...]:
        """The precisions that this machine runs natively; raises BackendError where the library cannot run at all."""
        ...

    def make(self, bundle: Bundle, request: BackendRequest) -> Backend:
        """The backend of a bundle's network; raises BackendError."""
        ...
