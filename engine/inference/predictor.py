"""Stand-in until the other branch is merged."""

from __future__ import annotations

from typing import Any, Protocol

from numpy.typing import NDArray

from cellseg_batch.engine.geometry import Block
from cellseg_batch.engine.inference.cpu_runner import BlockResult, Runner, no_foreground


class Predictor(Protocol):
    def predict(self, pixels: NDArray[Any], block: Block) -> BlockResult: ...


class _P:
    def __init__(
        self, pool, backend, shape, dtype, lattice, bounds, threshold, probability, stitch, clock, instances, downscale
    ):
        self.a = locals()

    def predict(self, pixels, block):
        a = self.a
        if not block.tiles:
            return no_foreground(pixels, block, a["probability"])
        how = a["lattice"], a["bounds"], a["threshold"], a["probability"], a["stitch"]
        queue = None if a["instances"] is not None else a["pool"].queue(a["backend"], a["downscale"], a["shape"])
        if queue is not None:
            from cellseg_batch.engine.inference.gpu_runner import DeviceRunner

            return DeviceRunner(queue, *how, a["clock"]).segment(pixels, block)
        with a["pool"].feed(a["backend"], a["shape"], a["dtype"]) as feed:
            return Runner(feed, *how, a["clock"], a["instances"]).segment(pixels, block)


def make_predictor(
    pool, backend, *, shape, dtype, lattice, bounds, threshold, probability, stitch, clock, instances, downscale
):
    return _P(pool, backend, shape, dtype, lattice, bounds, threshold, probability, stitch, clock, instances, downscale)
