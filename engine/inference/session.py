"""Run a compiled network through sessions: a session cuts tiles out of pixels and returns logits.

If the network normalises bytes itself, bytes go in unchanged, which moves a quarter of the memory; other pixels are
normalised while they are cut.  It must not know slides or blocks.
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
from cellseg_batch.kernels.gather import by_channel, cut, gather


@dataclass(frozen=True)
class Network:
    """A network compiled for batches of N tiles of one pixel dtype; one thread at a time may run it.

    Attributes:
        model: compiled network, a `CompiledModel` or a `ByteModel`.
        shape: (N, C, T_y, T_x) of every batch.
        takes_bytes: whether the network normalises the tiles itself, so that a session only cuts them.
    """

    model: Callable[..., Logits]
    shape: Shape
    takes_bytes: bool


def compile_network(backend: Backend, shape: Shape, dtype: DTypeLike) -> Network:
    """Compile the network of ``backend`` for batches of ``shape`` that are cut out of pixels of ``dtype``."""
    of_bytes = backend.compile_bytes(shape) if np.dtype(dtype) == np.uint8 else None
    return Network(of_bytes or backend.compile(shape), shape, of_bytes is not None)


class Session:
    """A batch and its logits, for one thread at a time; several sessions may share a network.

    Args:
        network: the compiled network.
        run_lock: lock held while the network runs; share it between networks that must not run at the same time.

    Attributes:
        network: the compiled network.
        run_lock: lock held while the network runs.
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
        self._batch.fill(0)  # touch every page, so that a memory measurement from now on includes the batch
        self._constants: tuple[NDArray[np.float32], ...] = ()
        self._logits: Logits | None = None

    def fill(self, pixels: NDArray[Any], rows: NDArray[np.int64], columns: NDArray[np.int64], bounds: Bounds) -> None:
        """Put up to N tiles into the batch; the rest of the batch keeps old pixels, which do not matter.

        Pixels, rows and columns as in `cellseg_batch.kernels.gather.gather`.
        """
        tiles = self._tiles[: len(rows)]
        if self.network.takes_bytes:
            cut(pixels, rows, columns, tiles)
            self._constants = by_channel(bounds.low, bounds.scale, tiles.shape[1])
        else:
            gather(pixels, rows, columns, bounds.low, bounds.scale, tiles, bounds.clip)

    def logits(self) -> Logits:
        """Return the logits (N, K, T_y, T_x) of the batch, valid until this session's next call."""
        with self.run_lock:
            self._logits = self.network.model(self._batch, *self._constants, out=self._logits)
            return self._logits
