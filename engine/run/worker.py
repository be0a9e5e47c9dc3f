"""Do the tasks of a pass in one process, which keeps compiled models, open slides and a clock for them.

The threads of a process share one worker.  `WorkerElsewhere` travels to other processes and stands for theirs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from cellseg_batch.engine.backend_table import KNOWN_BACKENDS
from cellseg_batch.engine.errors import CellsegError, OutputError, brief
from cellseg_batch.engine.inference.choice import Choice
from cellseg_batch.engine.inference.model_pool import ModelPool
from cellseg_batch.engine.machine import bound_heaps, peak_resident_bytes
from cellseg_batch.engine.models import load_model
from cellseg_batch.engine.run.memory_model import MemoryBudget
from cellseg_batch.engine.run.open_slide import OpenSlides
from cellseg_batch.engine.run.pipeline import Pass
from cellseg_batch.engine.run.prepared_slide import PreparedSlide
from cellseg_batch.engine.run.records import TaskRecord
from cellseg_batch.engine.run.warm_up import WarmUp
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.stage_clock import StageClock, noting_seconds
from cellseg_batch.engine.storage.checksums import noting_writes
from cellseg_batch.engine.storage.journal import Journal
from cellseg_batch.engine.storage.object_stores import may_pass

_log = logging.getLogger(__name__)

# Seconds to wait before each retry of a task after an error of a disk or store, which may pass.
_PAUSES = (0.1, 0.4)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a task of a pass.

    Attributes:
        number: number of the task.
        reason: reason why it was given up; "" if it is done.
        stages: busy seconds of each stage in the process since its last outcome.
        peak_bytes: largest resident memory of the process so far, in bytes.
    """

    number: int
    reason: str
    stages: dict[str, float]
    peak_bytes: int


class Worker:
    """One process's models and open slides, shared by its threads.

    Args:
        settings: settings of the run.
        model_pool: makes and keeps the models.
        clock: adds up the busy seconds of the process.

    Attributes:
        settings, model_pool, clock: as given.
        budget: host memory that the process's blocks share.
        slides: the open slides.
        warm_up: compiles models and kernels, and notes the memory that they take.
    """

    def __init__(self, settings: Settings, model_pool: ModelPool, clock: StageClock) -> None:
        self.settings = settings
        self.model_pool = model_pool
        self.clock = clock
        self.budget = MemoryBudget()
        self.slides = OpenSlides(model_pool, clock)
        self._limited = settings.max_memory is not None and not KNOWN_BACKENDS[model_pool.chosen.name].on_gpu
        self.warm_up = WarmUp(model_pool, self.budget, self._limited)
        self._preparing = threading.Lock()
        self._tight = False

    def here(self) -> Worker:
        """This worker itself, as the threads of its process do its tasks."""
        return self

    @contextmanager
    def turn_to_prepare(self) -> Iterator[None]:
        """Wait until a slide may be prepared: below a limit of memory after others, and if it is tight after blocks."""
        with ExitStack() as turn:
            if self._limited:
                turn.enter_context(self._preparing)
            if self._tight:
                turn.enter_context(self.budget.untaken())
                self.model_pool.drop_idle()
            yield

    def take_turns(self) -> None:
        """From now on, hold one network at a time, as the limit of memory leaves no room for others."""
        self._tight = True
        self.model_pool.keep_one()

    def run(self, prepared: PreparedSlide, slide_pass: Pass, number: int) -> Outcome:
        """Do one task of a pass and journal its result; if it fails, journal the reason and give up this task alone.

        Raises:
            OutputError: the output cannot be written, so other tasks would fail too.
        """
        reason = ""
        if prepared.takes_turns:
            self.take_turns()
        with self.budget.take(prepared.block_bytes, prepared.budget_bytes, prepared.turn):
            for pause in (*_PAUSES, None):
                try:
                    self._do(prepared, slide_pass, number)
                    break
                except Exception as error:
                    if pause is not None and may_pass(error):
                        time.sleep(pause)
                        continue
                    if isinstance(error, OutputError):
                        raise
                    task = prepared.plan.slide.location, slide_pass.name, number
                    _log.debug("%s: task %s/%d failed", *task, exc_info=True)
                    reason = error.detail if isinstance(error, CellsegError) else brief(error)
                    Journal(prepared.plan.paths.journal).fail(slide_pass.name, number, reason)
                    break
        return Outcome(number, reason, self.clock.drain(), peak_resident_bytes())

    def close(self) -> None:
        """Close every slide."""
        self.slides.close()

    def _do(self, prepared: PreparedSlide, slide_pass: Pass, number: int) -> None:
        with self.slides.opened(prepared.plan, prepared.backend) as slide:
            if slide.journal.has(slide_pass.name, number):
                return  # a worker did it, but died before it could return the outcome
            with noting_writes() as written, noting_seconds() as seconds:
                result = slide_pass.task(slide, number)
            with self.clock.stage("write"):
                slide.journal.record(slide_pass.name, number, TaskRecord(tuple(written), result, seconds))


@dataclass(frozen=True)
class WorkerElsewhere:
    """Stands for the worker of the process that a task is sent to, and is sent with the task.

    Attributes:
        settings: settings of the run.
        choice: choice of the backend.
        run_id: id of the run; a process keeps one worker, for the run that it works on.
    """

    settings: Settings
    choice: Choice
    run_id: str

    def here(self) -> Worker:
        """The worker of this process, made when the first task of the run arrives."""
        with _workers_lock:
            if self.run_id not in _workers:
                for earlier_run in list(_workers):
                    _workers.pop(earlier_run).close()
                bound_heaps()
                model_pool = ModelPool(load_model(self.settings.model), self.settings, choice=self.choice)
                _workers[self.run_id] = Worker(self.settings, model_pool, StageClock())
            return _workers[self.run_id]

    def close(self) -> None:
        """Do nothing: processes close their slides themselves."""


AnyWorker = Worker | WorkerElsewhere

# Id of a run -> this process's worker for it; at most one entry.
_workers: dict[str, Worker] = {}
_workers_lock = threading.Lock()


def run_task(worker: AnyWorker, prepared: PreparedSlide, slide_pass: Pass, number: int) -> Outcome:
    """Do task ``number`` of a pass with the worker of this process, as `Worker.run` does."""
    return worker.here().run(prepared, slide_pass, number)
