"""Full batches for one GPU from the tiles of many blocks: the queue in front of a compiled network.

Threads put the tiles of their blocks in; whoever completes a batch launches it, so that the small fields of many
slides fill batches together.  What does not fill a batch is launched when the device has begun the last one: nothing
that comes later could join it without letting the device wait.  Launching waits for nothing.  It must not know
pixels, slides or kernels.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, Protocol

from torch import Tensor

from cellseg_batch.engine.errors import ComputeError
from cellseg_batch.engine.inference.backends.cuda import Device, is_out_of_memory
from cellseg_batch.engine.inference.backends.protocol import DeviceModel

_log = logging.getLogger(__name__)


class Tiles(Protocol):
    """The tiles of one block, numbered from 0.

    Both methods enqueue on the current stream; they may be called again for the same tiles, with the same effect.

    Attributes:
        count: how many.
        arrived: event after which they can be gathered.
    """

    count: int
    arrived: Any

    def gather(self, first: int, last: int, pixels: Tensor) -> None:
        """Fill ``pixels`` (last - first, C, T_y, T_x) with tiles ``first`` to ``last``, the latter excluded."""
        ...

    def stitch(self, first: int, last: int, logits: Tensor) -> None:
        """Take the logits (last - first, K, T_y, T_x) of these tiles, which come in order."""
        ...


@dataclass(eq=False)
class _Entry:
    """A block in the queue: its tiles, how many are still to be launched, and why that failed."""

    tiles: Tiles
    left: int
    error: Exception | None = None


class BatchQueue:
    """The tiles that wait for one compiled network on one device.

    Args:
        device: that computes.
        compile_model: makes the network ready for batches of so many tiles.
        batch: tiles of a batch.

    Attributes:
        batch: tiles of a batch from now on; halved whenever the device's memory is full.
        incoming, computing, outgoing: streams for pixels, for everything between, for results.
    """

    def __init__(self, device: Device, compile_model: Callable[[int], DeviceModel], batch: int) -> None:
        self.device = device
        self.batch = batch
        self.incoming, self.computing, self.outgoing = (device.stream() for _ in range(3))
        self._compile = compile_model
        self._model: DeviceModel | None = None
        self._waiting: deque[tuple[_Entry, int]] = deque()
        self._begun = device.event()
        self._timed: deque[tuple[Any, Any]] = deque()
        self._lock = threading.Lock()

    def run(self, tiles: Tiles) -> None:
        """Launch every tile of a block; by any thread, which returns when the last one is enqueued.

        Raises:
            ComputeError: the device's memory is full even with single tiles.
            Exception: whatever the network or a kernel raised.
        """
        entry = _Entry(tiles, tiles.count)
        with self._lock:
            self._waiting.extend((entry, number) for number in range(tiles.count))
            while len(self._waiting) >= self.batch:
                self._launch()
        while entry.left:
            begun = self._begun
            begun.synchronize()
            with self._lock:
                if entry.left and self._begun is begun:  # nothing was launched meanwhile
                    self._launch()
        if entry.error is not None:
            raise entry.error

    def make_room(self) -> None:
        """Halve the batch, because memory for something else could not be had.

        Raises:
            ComputeError: batches hold single tiles already.
        """
        with self._lock:
            self._halve()

    def busy_seconds(self) -> float:
        """Seconds that the device took for the batches that it finished since the last call."""
        seconds = 0.0
        with self._lock:
            while self._timed and self._timed[0][1].query():
                begun, ended = self._timed.popleft()
                seconds += begun.elapsed_time(ended) / 1000
        return seconds

    def _launch(self) -> None:
        """Launch the first batch that waits; where memory is full it stays waiting, for smaller batches."""
        batch = list(islice(self._waiting, self.batch))
        try:
            try:
                self._enqueue(batch)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._halve()
                return
        except Exception as error:
            failed = {entry for entry, _ in batch}
            for entry in failed:
                entry.left, entry.error = 0, error
            self._waiting = deque(share for share in self._waiting if share[0] not in failed)
            return
        for entry, _ in batch:
            self._waiting.popleft()
            entry.left -= 1

    def _enqueue(self, batch: list[tuple[_Entry, int]]) -> None:
        if self._model is None:
            self._model = self._compile(self.batch)
        parts = list(_parts(batch))
        begun, ended = self.device.event(), self.device.event()
        with self.device.on(self.computing):
            for tiles, *_ in parts:
                self.computing.wait_event(tiles.arrived)
            begun.record(self.computing)
            for tiles, first, last, span in parts:
                tiles.gather(first, last, self._model.pixels[span])
            # Places behind the last tile hold what they held; their logits go nowhere.
            self._model.enqueue()
            for tiles, first, last, span in parts:
                tiles.stitch(first, last, self._model.logits[span])
            ended.record(self.computing)
        self._begun = begun
        self._timed.append((begun, ended))

    def _halve(self) -> None:
        """Let go of the network, once it is idle; the next launch compiles it for half as many tiles."""
        self.device.settle()
        self._model = None
        self.device.settle()
        if self.batch == 1:
            raise ComputeError(
                str(self.device.torch_device),
                expected="memory for a block and a batch of one tile",
                found="a device whose memory is full",
                cause="another process on it, or large tiles",
                remedy="choose a smaller `tile` or `block`, or fewer `workers`",
            )
        self.batch //= 2
        _log.warning(
            "the memory of %s is full: batches of %d tiles from now on, whose logits may round otherwise",
            self.device.torch_device,
            self.batch,
        )


def _parts(batch: list[tuple[_Entry, int]]) -> Iterator[tuple[Tiles, int, int, slice[int, int, None]]]:
    """Every block's share of a batch: (tiles, first, last, span in the batch)."""
    start = 0
    for entry, share in groupby(batch, key=lambda one: one[0]):
        numbers = [number for _, number in share]
        yield entry.tiles, numbers[0], numbers[-1] + 1, slice(start, start + len(numbers))
        start += len(numbers)
