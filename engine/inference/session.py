"""A compiled network, and sessions on it: tiles cut out of pixels go in, logits come out.

Bytes go in as they are where the network normalises them itself, which moves a quarter of the memory; all else is
normalised while it is cut.  It must not know slides or blocks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cellseg_batch.engine.inference.backends.protocol import Backend, Logits, Shape
from cellseg_batch.engine.inference.normalise import Bounds
from cellseg_batch.kernels.gather import cut, gather


@dataclass(frozen=True)
class Network:
    """A network compiled for batches of N tiles of one type of pixels; it runs for one thread at a time.

    Attributes:
        model: what was compiled, a `CompiledModel` or a `ByteModel`.
        shape: (N, C, T_y, T_x) of every batch.
        takes_bytes: whether the network normalises the tiles itself, so that they are only cut.
    """

    model: Callable[..., Logits]
    shape: Shape
    takes_bytes: bool


def compile_network(backend: Backend, shape: Shape, dtype: DTypeLike) -> Network:
    """The network of ``backend`` for batches of ``shape`` that are cut out of pixels of a type."""
    of_bytes = backend.compile_bytes(shape) if np.dtype(dtype) == np.uint8 else None
    return Network(of_bytes or backend.compile(shape), shape, of_bytes is not None)


class Session:
    """A batch and its logits, for one thread at a time; several sessions may share a network.

    Args:
        network: that computes.
        run_lock: held while the network runs, shared with all that must not run meanwhile.

    Attributes:
        network: that computes.
        run_lock: held while the network runs.
    """

    def __init__(self, network: Network, run_lock: AbstractContextManager[Any] | None = None) -> None:
        self.network = network
        self.run_lock = run_lock or threading.RLock()
        count, channels, height, width = network.shape
        if network.takes_bytes:
            self._batch: NDArray[Any] = np.zeros((count, height, width, channels), np.uint8)
            self._tiles = np.moveaxis(self._batch, -1, 1)
        else:
            self._batch = self._tiles = np.zeros(network.shape, np.float32)
        self._batch.fill(0)  # memory that was only promised would be missed by who measures it now
        self._constants: tuple[float, ...] = ()
        self._logits: Logits | None = None

    def fill(self, pixels: NDArray[Any], rows: NDArray[np.int64], columns: NDArray[np.int64], bounds: Bounds) -> None:
        """Put up to N tiles into the batch; what those behind them show does not matter.

        Pixels, rows and columns as in `cellseg_batch.kernels.gather.gather`.
        """
        tiles = self._tiles[: len(rows)]
        if self.network.takes_bytes:
            cut(pixels, rows, columns, tiles)
            self._constants = bounds.low, bounds.scale
        else:
            gather(pixels, rows, columns, bounds.low, bounds.scale, tiles)

    def logits(self) -> Logits:
        """Logits (N, K, T_y, T_x) of the batch, valid until this session's next call."""
        with self.run_lock:
            self._logits = self.network.model(self._batch, *self._constants, out=self._logits)
            return self._logits
