"""Segment one tile before a slide's blocks, so that models and kernels are compiled and their memory is known."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace

from cellseg_batch.engine.backend_table import KNOWN_BACKENDS
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

# Seconds between two looks at the memory.
_INTERVAL = 0.005


class WarmUp:
    """Compiles models and kernels in a process, and notes the memory that the process then holds.

    On CPUs a tile of a new size is segmented while no block is in flight, and the most memory that the process takes
    meanwhile is noted: eager networks give back what they take.

    Args:
        model_pool: model pool of the process.
        budget: memory budget of the process's blocks, which do not count as held memory.
        limited: whether the run must stay below a limit: then the networks that are not in use are dropped beforehand,
            so that the figures do not depend on the slides that came before.

    Attributes:
        held_bytes: host memory in bytes that the process holds at most besides its blocks, as observed so far.
    """

    def __init__(self, model_pool: ModelPool, budget: MemoryBudget, limited: bool = False) -> None:
        self.held_bytes = 0
        self._model_pool = model_pool
        self._budget = budget
        self._limited = limited
        # Kind of a tile -> its number of pixels -> host memory in bytes that the process held with its network.
        self._held: dict[tuple[object, ...], dict[int, int]] = {}
        # Not the pool's lock: a network may take minutes to compile, and other threads go on with theirs.
        self._lock = threading.Lock()

    def compile_for(self, plan: SlidePlan, backend: Backend, reader: SlideReader) -> None:
        """Segment the tile in the middle of a slide, which is seldom empty, and drop the result.

        Do nothing after a tile of the same kind that was at least as large: a smaller tile compiles no further kernel
        and needs no more memory.
        """
        if not self._held:
            self.held_bytes = peak_resident_bytes()
        self._observe(resident_bytes())  # with the networks of all slides so far
        size = math.prod(plan.shape)
        self._measure(plan, backend, reader, lambda sizes: max(sizes, default=0) >= size)

    def held_by(self, plan: SlidePlan, backend: Backend, reader: SlideReader) -> int:
        """Host memory in bytes that the process holds besides its blocks, with the network of a slide and no other."""
        size = math.prod(plan.shape)
        self._measure(plan, backend, reader, lambda sizes: size in sizes)
        return self._held[_kind(plan)][size]

    def held_for(self, plan: SlidePlan) -> int:
        """What `held_by` gives, as far as it was measured: for a tile of that kind that is at least as large.

        Without a limit it is `held_bytes`, as the networks of other slides are kept too.
        """
        sizes = self._held.get(_kind(plan), {}) if self._limited else {}
        return min((held for size, held in sizes.items() if size >= math.prod(plan.shape)), default=self.held_bytes)

    def _measure(
        self, plan: SlidePlan, backend: Backend, reader: SlideReader, suffices: Callable[[Collection[int]], bool]
    ) -> None:
        """Segment a tile of a slide and note the memory, unless the sizes of its kind that are noted suffice."""
        sizes = self._held.setdefault(_kind(plan), {})
        if suffices(sizes):
            return  # without waiting for the network of another slide
        # Compiling for a GPU may take minutes, and takes memory of the GPU.
        alone = nullcontext() if KNOWN_BACKENDS[backend.name].on_gpu else self._budget.untaken()
        with alone, self._lock:
            if suffices(sizes):
                return
            if self._limited:
                self._model_pool.drop_idle()
            tile = _middle_of(replace(plan.grid, cores=(1, 1)))
            # A damaged chunk costs its block, not the slide.
            with _noting_peak() as peaks, suppress(ReadError):
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
            sizes[math.prod(plan.shape)] = self._observe(peaks[0])

    def _observe(self, nbytes: int) -> int:
        """Note that so much memory is resident, and return what the process then holds besides its blocks."""
        held = nbytes + RUN_OVERHEAD_BYTES - self._budget.taken
        self.held_bytes = max(self.held_bytes, held)
        return held


def _kind(plan: SlidePlan) -> tuple[object, ...]:
    """All but its size that decides which kernels and networks a tile needs."""
    return (
        plan.slide.dtype,
        plan.slide.axes,
        plan.images_of_bytes,
        plan.instances,
        plan.makes_ids,
        plan.cells is not None,
        plan.objects,
        plan.downscale,
    )


@contextmanager
def _noting_peak() -> Iterator[list[int]]:
    """A list of one figure: the largest resident memory of the process in bytes, once the context has ended.

    The system's own figure is that of the whole life of the process.
    """
    peaks, ended = [resident_bytes()], threading.Event()

    def watch() -> None:
        while not ended.wait(_INTERVAL):
            peaks[0] = max(peaks[0], resident_bytes())

    watching = threading.Thread(target=watch, name="memory")
    watching.start()
    try:
        yield peaks
    finally:
        ended.set()
        watching.join()


def _middle_of(grid: BlockGrid) -> Block:
    """The block in the middle of the middle plane."""
    rows, columns = grid.grid
    return grid[(grid.planes // 2 * rows + rows // 2) * columns + columns // 2]
