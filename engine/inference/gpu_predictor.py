"""Predict blocks on a GPU: raw pixels go up, masks come back, and everything between stays on the device.

    incoming    pinned host memory -> pixels of the read box
    computing   gather -> network -> stitch, in batches shared with other blocks (`gpu_batch_queue`)
    outgoing    mask, probability, class codes and counts -> pinned host memory; or the logits, where the host decodes

It has the interface of `cpu_predictor.CpuPredictor`.  Each thread waits once, for its own result.  torch allocates the
pinned memory and keeps freed memory for the next block.  Masks come back as bytes, because the writer takes bytes, and
unpacking bits costs the host more than it saves on the bus.

It has not run on a GPU yet; tests run it on the CPU, with the Triton kernels in their interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cellseg_batch.engine.errors import ComputeError
from cellseg_batch.engine.geometry import Block
from cellseg_batch.engine.inference.backends.cuda import is_out_of_memory
from cellseg_batch.engine.inference.backends.protocol import Logits
from cellseg_batch.engine.inference.cpu_predictor import stitch_on_host
from cellseg_batch.engine.inference.gpu_batch_queue import BatchQueue
from cellseg_batch.engine.inference.prediction import (
    BlockResult,
    PredictionRule,
    count_missing,
    no_foreground,
    refuse_nan,
    source_tables,
)
from cellseg_batch.engine.inference.stitching import Stitch, make_stitch
from cellseg_batch.engine.stage_clock import StageClock
from cellseg_batch.kernels import blend_triton, gather_triton, pixel_codes_triton, stitch_triton


@dataclass(frozen=True)
class GpuPredictor:
    """Predicts blocks of one slide on GPUs.

    Attributes:
        queue: lends the queue of the GPU for the next block, for tiles of the rule's shape.
        rule: prediction rule of the slide.
        clock: counts the stages; the stage "model" is the GPU's time for whole batches.
    """

    queue: Callable[[], AbstractContextManager[BatchQueue]]
    rule: PredictionRule
    clock: StageClock

    def predict(self, pixels: NDArray[Any], block: Block) -> BlockResult:
        """See `Predictor.predict`.

        Raises:
            ComputeError: the model returned NaN, or the GPU's memory is full even with batches of one tile.
        """
        if not block.tiles:
            return no_foreground(block, self.rule, count_missing(pixels, block))
        with self.queue() as queue:
            while True:
                with queue.admission.stay() as stay:
                    room_made = queue.room_made
                    try:
                        return self._compute(queue, pixels, block)
                    except Exception as error:
                        if not is_out_of_memory(error):
                            raise
                        reason = str(error).partition("\n")[0]
                    # Only here is the error gone, whose traceback holds the block's memory.
                    may_succeed = queue.make_room(room_made) or queue.admission.lower(stay)
                if not may_succeed:
                    raise ComputeError(
                        str(queue.device.torch_device),
                        expected="memory for a block and a batch of one tile",
                        found=f"a device whose memory is full ({reason})",
                        cause="another process on it, or large tiles",
                        remedy="choose a smaller `tile` or `block`",
                    )

    def _compute(self, queue: BatchQueue, pixels: NDArray[Any], block: Block) -> BlockResult:
        """Predict a block with tiles; raises an error that `is_out_of_memory` if the device's memory is full."""
        tiles = _BlockOnDevice(queue, self.rule, self.clock, pixels, block)
        try:
            queue.run(tiles)
        except BaseException:
            # Launched work still reads memory that would otherwise go to the next block.
            queue.incoming.synchronize()
            queue.computing.synchronize()
            raise
        if self.rule.on_host:
            logits = tiles.fetch_logits()
            self.clock.worked("model", queue.busy_seconds())
            return stitch_on_host(self.rule, pixels, block, logits, self.clock)
        mask, probability, classes, (foreground, undefined) = tiles.fetch()
        self.clock.worked("model", queue.busy_seconds())
        refuse_nan(block, undefined)
        return BlockResult(mask, probability, foreground, count_missing(pixels, block), classes)


class _BlockOnDevice:
    """Hold a block's pixels, mask, probability and classes on the device; the queue takes it as the block's `Tiles`.

    It holds everything until the results are on the host, so no stream gets memory that another stream still reads.
    """

    def __init__(
        self, queue: BatchQueue, rule: PredictionRule, clock: StageClock, pixels: NDArray[Any], block: Block
    ) -> None:
        self.count = len(block.tiles)
        self._rule = rule
        self._block = block
        self._queue, self._device = queue, queue.device
        with clock.stage("upload"), self._device.on(self._queue.incoming):
            self._pixels = self._device.send(_to_kernel_dtype(pixels))
            self.arrived = self._device.event()
            self.arrived.record(self._queue.incoming)
        with self._device.on(self._queue.computing):
            # Pixels outside all tiles are background.
            self._mask = self._device.zeros(block.box.shape, torch.uint8)
            self._probability = self._device.zeros(block.box.shape, torch.uint8) if rule.probability else None
            self._classes = self._device.zeros(block.box.shape, torch.uint8) if rule.classes else None
            self._stitch = None if rule.on_host else self._make_stitch()
        self._logits: dict[int, Tensor] = {}
        self._counts: Tensor | None = None
        self._finished = self._device.event()

    def _make_stitch(self) -> Stitch:
        return make_stitch(
            self._rule,
            self._block,
            self._mask,
            self._probability,
            self._classes,
            kernels=stitch_triton if self._rule.stitch == "crop" else blend_triton,
            codes=pixel_codes_triton,
            empty=partial(self._device.empty, dtype=torch.half),
        )

    def gather(self, first: int, last: int, pixels: Tensor) -> None:
        """See `Tiles.gather`."""
        lattice, bounds = self._rule.lattice, self._rule.bounds
        tables = source_tables(self._block.tiles[first:last], lattice.shape, self._block.read_box)
        gather_triton.gather(self._pixels, *tables, bounds.low, bounds.scale, pixels, bounds.clip)

    def stitch(self, first: int, last: int, logits: Tensor) -> None:
        """See `Tiles.stitch`; after the last tile the results can be fetched."""
        if self._stitch is None:
            self._logits[first] = logits.clone()  # the next batch overwrites them
        else:
            self._stitch.add(first, logits)
        if last == self.count:
            self._counts = None if self._stitch is None else torch.stack(self._stitch.finish()).sum(0)
            self._finished.record(self._queue.computing)

    def fetch_logits(self) -> list[tuple[int, Logits]]:
        """Wait for the logits and return the first tile and the float32 logits (n, K, T_y, T_x) of each batch."""
        done = self._device.event()
        with self._device.on(self._queue.outgoing):
            self._queue.outgoing.wait_event(self._finished)
            batches = [(first, self._device.receive(logits)) for first, logits in sorted(self._logits.items())]
            done.record(self._queue.outgoing)
        done.synchronize()
        return [(first, logits.float().numpy()) for first, logits in batches]

    def fetch(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None, NDArray[np.uint8] | None, tuple[int, int]]:
        """Wait for the results: mask, probability and class codes, each (h, w), and (foreground pixels, NaN logits)."""
        assert self._counts is not None
        done = self._device.event()
        with self._device.on(self._queue.outgoing):
            self._queue.outgoing.wait_event(self._finished)
            mask, counts = self._device.receive(self._mask), self._device.receive(self._counts)
            probability, classes = (
                None if image is None else self._device.receive(image).numpy()
                for image in (self._probability, self._classes)
            )
            done.record(self._queue.outgoing)
        done.synchronize()
        foreground, undefined = counts.tolist()
        return mask.numpy(), probability, classes, (foreground, undefined)


def _to_kernel_dtype(pixels: NDArray[Any]) -> NDArray[Any]:
    """Return pixels in a dtype that the gather kernel reads; other dtypes become float32, in which it computes."""
    if pixels.dtype.kind == "b":
        return pixels.view(np.uint8)
    return pixels if pixels.dtype in (np.uint8, np.uint16, np.float32) else pixels.astype(np.float32)
