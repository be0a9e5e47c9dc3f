"""What one process keeps while tasks pass through it: compiled models, open slides, a clock.

The threads of a run share the one of their process.  Sent to another process, a worker becomes that process's own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from cellseg_batch.engine.errors import CellsegError, OutputError, ReadError
from cellseg_batch.engine.inference.backends.protocol import Backend
from cellseg_batch.engine.inference.choice import Choice
from cellseg_batch.engine.inference.model_pool import ModelPool
from cellseg_batch.engine.inference.prediction import PredictionRule
from cellseg_batch.engine.inference.predictor import Predictor, make_predictor
from cellseg_batch.engine.machine import bound_heaps, peak_resident_bytes, resident_bytes
from cellseg_batch.engine.models import load_model
from cellseg_batch.engine.run.memory_model import RUN_OVERHEAD_BYTES, Room
from cellseg_batch.engine.run.open_slide import BLOCKS, OpenSlide, Pass, middle_of, output_images, scratch_of
from cellseg_batch.engine.run.slide_plan import SlideJob, SlidePlan
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.slides.reader import SlideReader
from cellseg_batch.engine.stage_clock import StageClock, noting_seconds
from cellseg_batch.engine.storage.checksums import noting_writes
from cellseg_batch.engine.storage.journal import Journal
from cellseg_batch.engine.storage.object_stores import may_pass
from cellseg_batch.kernels.warm_up import compile_kernels

_log = logging.getLogger(__name__)

# Slides that nothing works on stay open, as their next block is often on its way.
_IDLE_SLIDES = 2


# A task that its store fails is tried again after so many seconds each: stores have hiccups.
_PAUSES = (0.1, 0.4)


@dataclass(frozen=True)
class Outcome:
    """What became of a task of a pass.

    Attributes:
        number: of the task.
        pixels: newly segmented.
        reason: why it was given up; "" if it is done.
        stages: busy seconds of the process since its last outcome.
    """

    number: int
    pixels: int
    reason: str
    stages: dict[str, float]


class Worker:
    """One process's models and open slides, shared by its threads.

    Args:
        settings: of the run.
        choice: of the backend.
        run: identifies the run; a worker that is sent to another process becomes that process's one for this run.
        model_pool: makes and keeps the models; made when first needed if left out.
        clock: busy seconds of the process.

    Attributes:
        settings: of the run.
        clock: busy seconds of the process.
        held: bytes that the process holds besides what blocks need, as far as it has been seen.
    """

    def __init__(
        self,
        settings: Settings,
        choice: Choice,
        run: str,
        model_pool: ModelPool | None = None,
        clock: StageClock | None = None,
    ) -> None:
        self.clock = clock or StageClock()
        self.settings = settings
        self._choice, self._run = choice, run
        self._model_pool = model_pool
        self.held = 0
        self._room = Room()
        self._open: OrderedDict[SlideJob, _Entry] = OrderedDict()
        self._lock = threading.Lock()
        self._making = threading.Lock()
        self._warm: set[tuple[object, ...]] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        """What travels is what another process needs to make its own."""
        return _worker_of_this_process, (self.settings, self._choice, self._run)

    @property
    def model_pool(self) -> ModelPool:
        """Makes and keeps the models."""
        with self._making:
            if self._model_pool is None:
                bundle = load_model(self.settings.model)
                self._model_pool = ModelPool(bundle, self.settings, choice=self._choice)
            return self._model_pool

    def run(self, job: SlideJob, work: Pass, number: int) -> Outcome:
        """Do one task of a pass and journal it, or why it was given up: that costs the task and nothing else.

        Raises:
            OutputError: the output cannot be written, which no other task could do either.
        """
        reason = ""
        with self._room.take(job.block_bytes, job.room_bytes):
            for pause in (*_PAUSES, None):
                try:
                    self._do(job, work, number)
                    break
                except Exception as error:
                    if pause is not None and may_pass(error):
                        time.sleep(pause)
                        continue
                    if isinstance(error, OutputError):
                        raise
                    where = job.plan.slide.location, work.part, number
                    _log.debug("%s: task %s/%d failed", *where, exc_info=True)
                    reason = error.detail if isinstance(error, CellsegError) else f"{type(error).__name__}: {error}"
                    Journal(job.plan.place.journal).fail(work.part, number, reason)
                    break
        pixels = job.plan.grid[number].box.area if work.part == BLOCKS and not reason else 0
        return Outcome(number, pixels, reason, self.clock.drain())

    def _do(self, job: SlideJob, work: Pass, number: int) -> None:
        with self.opened(job) as slide:
            if slide.journal.has(work.part, number):
                return  # by a worker that died before it could say so
            with noting_writes() as written, noting_seconds() as seconds:
                record = work.task(slide, number)
            with self.clock.stage("write"):
                slide.journal.record(work.part, number, {**record, "written": written, "seconds": seconds})

    def warm_up(self, plan: SlidePlan, backend: Backend, reader: SlideReader) -> None:
        """Segment the tile in the middle, so that everything is compiled and its memory can be seen.

        The result is dropped: the tile is computed again as part of its block.
        """
        kind = (
            plan.shape,
            plan.slide.dtype,
            plan.slide.axes,
            plan.probability,
            plan.instances,
            plan.objects,
            plan.downscale,
        )
        with self.model_pool.models_lock:
            if kind in self._warm:
                return
            tiles = replace(plan.grid, cores=(1, 1))
            tile = tiles[middle_of(tiles)]
            # A damaged chunk costs its block, not the slide.
            with suppress(ReadError):
                pixels = reader.read(tile.plane, tile.read_box)
                with self.model_pool.counted(), ThreadPoolExecutor(1) as beside:
                    kernels = beside.submit(
                        compile_kernels,
                        pixels.dtype,
                        probability=plan.needs_probability,
                        blend=plan.stitch == "blend",
                        instances=plan.instances is not None,
                        objects=plan.objects,
                    )
                    self._predictor(plan, backend, StageClock()).predict(pixels, tile)
                    kernels.result()
            now = resident_bytes() + RUN_OVERHEAD_BYTES - self._room.taken
            self.held = max(self.held, now, 0 if self._warm else peak_resident_bytes())
            self._warm.add(kind)

    def keep_open(self, job: SlideJob, reader: SlideReader) -> None:
        """Take over a reader that is open already."""
        with self._lock:
            self._open[job] = _Entry(self._open_slide(job, reader))
            self._close_idle(_IDLE_SLIDES)

    def close(self) -> None:
        """Close every slide."""
        with self._lock:
            self._close_idle(0)

    @contextmanager
    def opened(self, job: SlideJob) -> Iterator[OpenSlide]:
        """The slide of ``job``, open for as long as the context lasts."""
        with self._lock:
            entry = self._open.setdefault(job, _Entry())
            self._open.move_to_end(job)
            entry.users += 1
        try:
            with entry.lock:
                if entry.slide is None:
                    reader = SlideReader(job.plan.slide, job.plan.level.level, job.plan.channels.indices)
                    entry.slide = self._open_slide(job, reader)
            yield entry.slide
        finally:
            with self._lock:
                entry.users -= 1
                self._close_idle(_IDLE_SLIDES)

    def _close_idle(self, keep: int) -> None:
        idle = [job for job, entry in self._open.items() if not entry.users]
        for job in idle[: len(idle) - keep]:
            slide = self._open.pop(job).slide
            if slide is not None:
                slide.reader.close()

    def _open_slide(self, job: SlideJob, reader: SlideReader) -> OpenSlide:
        plan, (name, precision, version) = job.plan, job.backend
        place = plan.place
        backend = self.model_pool.backend(name, precision, plan.downscale)
        if backend.version != version:
            raise OutputError(
                str(place.labels_folder),
                expected=f"{name} {version} in every worker, as these labels were begun with it",
                found=backend.version,
                remedy="install one version everywhere",
            )
        labels, probability = output_images(plan)
        scratch, certainty = scratch_of(plan)
        return OpenSlide(
            plan=plan,
            reader=reader,
            predictor=self._predictor(plan, backend, self.clock),
            labels=labels,
            probability=probability,
            scratch=scratch,
            certainty=certainty,
            journal=Journal(place.journal),
            clock=self.clock,
        )

    def _predictor(self, plan: SlidePlan, backend: Backend, clock: StageClock) -> Predictor:
        rule = PredictionRule(
            lattice=plan.grid.lattice,
            shape=plan.shape,
            dtype=plan.slide.dtype,
            bounds=plan.bounds,
            threshold=plan.threshold,
            probability=plan.needs_probability,
            stitch=plan.stitch,
            downscale=plan.downscale,
            instances=plan.instances,
        )
        return make_predictor(self.model_pool, backend, rule, clock)


def _worker_of_this_process(settings: Settings, choice: Choice, run: str) -> Worker:
    with _present_lock:
        if run not in _present:
            for other in list(_present):
                _present.pop(other).close()
            bound_heaps()
            _present[run] = Worker(settings, choice, run)
        return _present[run]


_present: dict[str, Worker] = {}
_present_lock = threading.Lock()


class _Entry:
    """A slide that is open, or is being opened, and how many threads use it."""

    def __init__(self, slide: OpenSlide | None = None) -> None:
        self.slide = slide
        self.users = 0
        self.lock = threading.Lock()
