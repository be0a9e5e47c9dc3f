"""Queue the tiles of many blocks in front of a compiled network, and launch them on one GPU in full batches.

Threads add the tiles of their blocks; the thread that completes a batch launches it, so the small fields of many slides
fill batches together.  An incomplete batch is launched once the device has begun the batch before it: to wait longer
for tiles would leave the device idle.  A launch does not wait for the device.  It must not know pixels, slides or
kernels.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, Protocol

import torch
from torch import Tensor

from cellseg_batch.engine.inference.backends.cuda import Device, is_out_of_memory
from cellseg_batch.engine.inference.backends.protocol import DeviceModel
from cellseg_batch.engine.inference.gpu_admission import Admission

_log = logging.getLogger(__name__)


class Tiles(Protocol):
    """The tiles of one block, numbered from 0.

    Both methods enqueue on the current stream; they may be called again for the same tiles, with the same effect.

    Attributes:
        count: number of tiles.
        arrived: event after which the tiles can be gathered.
    """

    count: int
    arrived: Any

    def gather(self, first: int, last: int, pixels: Tensor) -> None:
        """Fill ``pixels`` (last - first, C, T_y, T_x) with the tiles from ``first`` up to but without ``last``."""
        ...

    def stitch(self, first: int, last: int, logits: Tensor) -> None:
        """Take the logits (last - first, K, T_y, T_x) of these tiles; the tiles come in order."""
        ...


@dataclass(eq=False)
class _Entry:
    """A block in the queue: its tiles, the number still to be launched, and the error of a failed launch."""

    tiles: Tiles
    left: int
    error: Exception | None = None


class BatchQueue:
    """The tiles that wait for one compiled network on one device.

    Args:
        device: the device that computes.
        compile_model: compiles the network for a batch of the given number of tiles.
        batch: tiles per batch.
        admission: admits blocks to the device, shared by all queues of it.
        drop_idle: drops networks that no block uses; returns whether there was one.

    Attributes:
        device, admission: as given.
        batch: tiles per batch from now on; halved when the device's memory is full.
        room_made: how often memory was freed because it was full.
        incoming, computing, outgoing: streams for pixels, for the computation, and for results.
    """

    def __init__(
        self,
        device: Device,
        compile_model: Callable[[int], DeviceModel],
        batch: int,
        admission: Admission,
        drop_idle: Callable[[], bool],
    ) -> None:
        self.device = device
        self.batch = batch
        self.admission = admission
        self.room_made = 0
        self.incoming, self.computing, self.outgoing = (device.stream() for _ in range(3))
        self._compile = compile_model
        self._drop_idle = drop_idle
        self._model: DeviceModel | None = None
        self._waiting: deque[tuple[_Entry, int]] = deque()
        self._last_start = device.event()
        self._timed: deque[tuple[Any, Any]] = deque()
        self._lock = threading.Lock()

    def run(self, tiles: Tiles) -> None:
        """Launch every tile of a block and return when the last tile is enqueued; any thread may call it.

        Raises:
            torch.OutOfMemoryError: the device's memory is full even with single tiles.
            Exception: whatever the network or a kernel raised.
        """
        entry = _Entry(tiles, tiles.count)
        with self._lock:
            self._waiting.extend((entry, number) for number in range(tiles.count))
            while len(self._waiting) >= self.batch:
                self._launch()
        while entry.left:
            last_start = self._last_start
            last_start.synchronize()
            with self._lock:
                if entry.left and self._last_start is last_start:  # no batch was launched meanwhile
                    self._launch()
        if entry.error is not None:
            try:
                raise entry.error
            finally:
                # The traceback holds this frame: with a reference back, the block would stay in memory for long.
                entry.error = None

    def make_room(self, since: int) -> bool:
        """Free memory of the device, which was full for the caller: drop idle networks, or else halve the batch.

        Args:
            since: `room_made` when the caller began; if room was made since then, nothing more is freed.

        Returns:
            Whether another attempt may succeed: False if batches already hold a single tile.
        """
        with self._lock:
            return self.room_made != since or self._make_room()

    def busy_seconds(self) -> float:
        """Return the seconds of device time for the batches finished since the last call."""
        seconds = 0.0
        with self._lock:
            while self._timed and self._timed[0][1].query():
                start, end = self._timed.popleft()
                seconds += start.elapsed_time(end) / 1000
        return seconds

    def _launch(self) -> None:
        """Launch the first waiting batch; if memory was full and could be freed, leave its tiles waiting."""
        batch = list(islice(self._waiting, self.batch))
        try:
            self._enqueue(batch)
        except Exception as error:
            if not is_out_of_memory(error):
                self._fail(batch, error)
                return
            # A new error, because the traceback of this one holds what was made until memory was full.
            failure = torch.OutOfMemoryError(str(error))
        else:
            for entry, _ in batch:
                self._waiting.popleft()
                entry.left -= 1
            return
        if not self._make_room():
            self._fail(batch, failure)

    def _fail(self, batch: list[tuple[_Entry, int]], error: Exception) -> None:
        """Have every block of a batch fail with ``error``."""
        failed = {entry for entry, _ in batch}
        for entry in failed:
            entry.left, entry.error = 0, error
        self._waiting = deque(waiting for waiting in self._waiting if waiting[0] not in failed)

    def _enqueue(self, batch: list[tuple[_Entry, int]]) -> None:
        if self._model is None:
            self._model = self._compile(self.batch)
        parts = list(_parts(batch))
        start, end = self.device.event(), self.device.event()
        with self.device.on(self.computing):
            for tiles, *_ in parts:
                self.computing.wait_event(tiles.arrived)
            start.record(self.computing)
            for tiles, first, last, span in parts:
                tiles.gather(first, last, self._model.pixels[span])
            # The part of the buffer behind the last tile keeps old pixels; its logits are not read.
            self._model.enqueue()
            for tiles, first, last, span in parts:
                tiles.stitch(first, last, self._model.logits[span])
            end.record(self.computing)
        self._last_start = start
        self._timed.append((start, end))

    def _make_room(self) -> bool:
        """Do what `make_room` does; the next launch compiles a network that was dropped."""
        if not self._drop_idle():
            if self.batch == 1:
                return False
            self.device.settle()  # the network may still run
            self._model = None
            self.batch //= 2
            _log.warning(
                "the memory of %s is full: batches of %d tiles from now on, whose logits may round otherwise",
                self.device.torch_device,
                self.batch,
            )
        self.device.settle()
        self.room_made += 1
        return True


def _parts(batch: list[tuple[_Entry, int]]) -> Iterator[tuple[Tiles, int, int, slice[int, int, None]]]:
    """Yield each block's share of a batch: (tiles, first, last, span in the batch); ``last`` is excluded."""
    start = 0
    for entry, share in groupby(batch, key=lambda waiting: waiting[0]):
        numbers = [number for _, number in share]
        yield entry.tiles, numbers[0], numbers[-1] + 1, slice(start, start + len(numbers))
        start += len(numbers)
