"""Segment one tile before a slide's blocks, so that models and kernels are compiled and their memory is known."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

from cellseg_batch.engine.errors import ReadError
from cellseg_batch.engine.geometry import Block, BlockGrid
from cellseg_batch.engine.inference.backends.protocol import Backend
from cellseg_batch.engine.inference.model_pool import ModelPool
from cellseg_batch.engine.inference.predictor import make_predictor
from cellseg_batch.engine.machine import peak_resident_bytes, resident_bytes
from cellseg_batch.engine.run.memory_model import RUN_OVERHEAD_BYTES, MemoryBudget
from cellseg_batch.engine.run.slide_plan import SlidePlan
from cellseg_batch.engine.slides.reader import SlideReader
from cellseg_batch.engine.stage_clock import StageClock
from cellseg_batch.kernels.warm_up import compile_kernels


class WarmUp:
    """Compiles models and kernels in a process, and notes the memory that the process then holds.

    Args:
        model_pool: model pool of the process.
        budget: memory budget of the process's blocks, which do not count as held memory.

    Attributes:
        held_bytes: host memory in bytes that the process holds besides its blocks, as observed so far.
    """

    def __init__(self, model_pool: ModelPool, budget: MemoryBudget) -> None:
        self.held_bytes = 0
        self._model_pool = model_pool
        self._budget = budget
        self._largest: dict[tuple[object, ...], int] = {}
        # Not the pool's lock: a network may take minutes to compile, and other threads go on with theirs.
        self._lock = threading.Lock()

    def compile_for(self, plan: SlidePlan, backend: Backend, reader: SlideReader) -> None:
        """Segment the tile in the middle of a slide, which is seldom empty, and drop the result.

        Do nothing after a tile of the same kind that was at least as large: a smaller tile compiles no further kernel
        and needs no more memory.
        """
        slide = plan.slide
        kind = (
            slide.dtype,
            slide.axes,
            plan.images_of_bytes,
            plan.instances,
            plan.makes_ids,
            plan.cells is not None,
            plan.objects,
            plan.downscale,
        )
        size = math.prod(plan.shape)
        if self._has(kind, size):
            return  # without waiting for the network of another slide
        with self._lock:
            if self._has(kind, size):
                return
            tile = _middle_of(replace(plan.grid, cores=(1, 1)))
            # A damaged chunk costs its block, not the slide.
            with suppress(ReadError):
                pixels = reader.read(tile.plane, tile.read_box)
                with self._model_pool.counted(), ThreadPoolExecutor(1) as beside:
                    kernels = beside.submit(
                        compile_kernels,
                        pixels.dtype,
                        probability=plan.needs_probability,
                        blend=plan.stitch == "blend",
                        classes=plan.decoder == "classes",
                        instances=plan.instances is not None,
                        stars=plan.stars is not None,
                        cells=plan.cells is not None,
                        objects=plan.objects or (plan.region is not None and plan.makes_ids),
                        compiling=self._model_pool.compiling,
                    )
                    make_predictor(self._model_pool, backend, plan.prediction, StageClock()).predict(pixels, tile)
                    kernels.result()
            held_now = resident_bytes() + RUN_OVERHEAD_BYTES - self._budget.taken
            self.held_bytes = max(self.held_bytes, held_now, 0 if self._largest else peak_resident_bytes())
            self._largest[kind] = size

    def _has(self, kind: tuple[object, ...], size: int) -> bool:
        return size <= self._largest.get(kind, 0)


def _middle_of(grid: BlockGrid) -> Block:
    """The block in the middle of the middle plane."""
    rows, columns = grid.grid
    return grid[(grid.planes // 2 * rows + rows // 2) * columns + columns // 2]
