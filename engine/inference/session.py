"""A compiled network and the batch that it is fed from: tiles cut out of pixels go in, logits come out.

Bytes go in as they are where the network normalises them itself, which moves a quarter of the memory; all else is
normalised while it is cut.  It must not know slides or blocks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import copy
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cellseg_batch.engine.inference.backends.protocol import Backend, Shape, Twinned
from cellseg_batch.engine.inference.normalise import Bounds
from cellseg_batch.kernels.gather import cut, gather


class Feed:
    """A compiled network for batches of N tiles of one type of pixels; used by one thread at a time.

    Args:
        backend: of the network.
        shape: (N, C, T_y, T_x) of every batch.
        dtype: of the pixels that will come.
        turn: shared with other models, of which only one is to run at a time.

    Attributes:
        shape: (N, C, T_y, T_x) of every batch.
        takes_bytes: whether the network normalises the tiles itself, so that they are only cut.
        model: what was compiled, a `CompiledModel` or a `ByteModel`.
        turn: held while the model runs.
    """

    def __init__(
        self, backend: Backend, shape: Shape, dtype: DTypeLike, turn: AbstractContextManager[Any] | None = None
    ) -> None:
        self.shape = shape
        of_bytes = backend.compile_bytes(shape) if np.dtype(dtype) == np.uint8 else None
        self.takes_bytes = of_bytes is not None
        self.model: Callable[..., NDArray[np.float32]] = of_bytes or backend.compile(shape)
        self.turn = turn or threading.RLock()
        self._make_batch()

    def _make_batch(self) -> None:
        count, channels, height, width = self.shape
        if self.takes_bytes:
            self._batch: NDArray[Any] = np.zeros((count, height, width, channels), np.uint8)
            self._tiles = np.moveaxis(self._batch, -1, 1)
        else:
            self._batch = self._tiles = np.zeros(self.shape, np.float32)
        self._constants: tuple[float, ...] = ()

    def twin(self) -> Feed | None:
        """The same network with a batch and logits of its own, to be filled and read while this one runs.

        None where the model cannot do that.
        """
        if not isinstance(self.model, Twinned):
            return None
        other = copy(self)
        other.model = self.model.twin()
        other._make_batch()
        other._batch.fill(0)  # so that who looks at the memory now sees it
        return other

    def fill(self, pixels: NDArray[Any], rows: NDArray[np.int64], columns: NDArray[np.int64], bounds: Bounds) -> None:
        """Put up to N tiles into the batch; what those behind them show does not matter.

        Pixels, rows and columns as in `cellseg_batch.kernels.gather.gather`.
        """
        tiles = self._tiles[: len(rows)]
        if self.takes_bytes:
            cut(pixels, rows, columns, tiles)
            self._constants = bounds.low, bounds.scale
        else:
            gather(pixels, rows, columns, bounds.low, bounds.scale, tiles)

    def logits(self) -> NDArray[np.float32]:
        """Logits (N, K, height, width) of the batch, valid until the next call."""
        with self.turn:
            return self.model(self._batch, *self._constants)
