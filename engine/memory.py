"""Host memory: what the process holds, and what a plan will need at most."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import numpy as np
import psutil

from cellseg_batch.engine.geometry import BlockGrid
from cellseg_batch.engine.slides.slide import Slide

# zarr decodes this many chunks of one read at a time (zarr.config async.concurrency).
_CHUNKS_IN_FLIGHT = 10
# What the event loop of zarr, dask, thread stacks and the allocator's slack add to the blocks themselves.
RUN_OVERHEAD_BYTES = 96 << 20


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class BlockMemory:
    """Bytes that one block in flight holds at most.

    Attributes:
        pixels: the read box, as stored, and the chunks being decoded into it.
        output: mask, probability, and their encoded copies.
    """

    pixels: int
    output: int

    @property
    def total(self) -> int:
        """Bytes of one block."""
        return self.pixels + self.output


def block_memory(slide: Slide, level: int, channels: int, grid: BlockGrid, probability: bool) -> BlockMemory:
    """What a block of ``grid`` holds while it is read, computed and written."""
    itemsize = np.dtype(slide.dtype).itemsize
    height, width = slide.plane_shape(level)
    block_h, block_w = grid.block_shape
    read = min(block_h + 2 * grid.lattice.margin, height) * min(block_w + 2 * grid.lattice.margin, width)
    chunk = int(np.prod(slide.levels[level].chunks)) * itemsize
    written = block_h * block_w * (2 if probability else 1)
    # The encoder holds its input, the chunks that it cut out of it and the shard that it builds.
    return BlockMemory(pixels=read * channels * itemsize + _CHUNKS_IN_FLIGHT * chunk, output=3 * written)
