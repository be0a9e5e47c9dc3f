"""What every backend provides."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Shape = tuple[int, int, int, int]


class CompiledModel(Protocol):
    """A network ready to run at one batch shape."""

    def __call__(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits (N, K, H, W) float32 of pixels (N, C, H, W) float32 in [0, 1].

        Not to be called from two threads at once; the result is valid until the next call.
        """
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
