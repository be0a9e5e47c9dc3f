"""What every backend provides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, int, int, int]

# Counts the ways in which networks were made for OpenVINO.  Networks and races are kept under it, so raise it with
# every change to folding, equalising, rounding or quantising.
CONVERSION_VERSION = 2


class CompiledModel(Protocol):
    """A network ready to run at one batch shape."""

    def __call__(self, batch: NDArray[np.float32], /) -> NDArray[np.float32]:
        """Logits (N, K, H, W) float32 of pixels (N, C, H, W) float32 in [0, 1].

        Not to be called from two threads at once; the result is valid until the next call.
        """
        ...


class ByteModel(Protocol):
    """A network ready to run at one batch shape, on pixels that it normalises itself."""

    def __call__(self, batch: NDArray[np.uint8], low: float, scale: float, /) -> NDArray[np.float32]:
        """Logits of ``clip((batch - low) * scale, 0, 1)`` for pixels (N, H, W, C) uint8; else as `CompiledModel`."""
        ...


@runtime_checkable
class Twinned(Protocol):
    """A compiled model of which there can be another one in next to no memory."""

    def twin(self) -> Self:
        """The same network with logits of its own; the two are not to be called at once."""
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
