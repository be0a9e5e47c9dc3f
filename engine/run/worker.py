"""What one process keeps while tasks pass through it: compiled models, open slides, a clock.

The threads of a run share the one of their process.  Sent to another process, a worker becomes that process's own.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

from cellseg_batch.engine.errors import CellsegError, OutputError
from cellseg_batch.engine.inference.choice import Choice
from cellseg_batch.engine.inference.model_pool import ModelPool
from cellseg_batch.engine.machine import bound_heaps
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

# A task that its store fails is tried again after so many seconds each: stores have hiccups.
_PAUSES = (0.1, 0.4)


@dataclass(frozen=True)
class Outcome:
    """What became of a task of a pass.

    Attributes:
        number: of the task.
        reason: why it was given up; "" if it is done.
        stages: busy seconds of the process since its last outcome.
    """

    number: int
    reason: str
    stages: dict[str, float]


class Worker:
    """One process's models and open slides, shared by its threads.

    Args:
        settings: of the run.
        model_pool: makes and keeps the models.
        clock: busy seconds of the process.

    Attributes:
        settings, model_pool, clock: as given.
        budget: host memory that the process's blocks share.
        slides: that are open.
        warm_up: what is compiled.
    """

    def __init__(self, settings: Settings, model_pool: ModelPool, clock: StageClock) -> None:
        self.settings = settings
        self.model_pool = model_pool
        self.clock = clock
        self.budget = MemoryBudget()
        self.slides = OpenSlides(model_pool, clock)
        self.warm_up = WarmUp(model_pool, self.budget)

    def here(self) -> Worker:
        """This worker: its tasks are calls of threads of its process."""
        return self

    def run(self, prepared: PreparedSlide, slide_pass: Pass, number: int) -> Outcome:
        """Do one task of a pass and journal it, or why it was given up: that costs the task and nothing else.

        Raises:
            OutputError: the output cannot be written, which no other task could do either.
        """
        reason = ""
        with self.budget.take(prepared.block_bytes, prepared.budget_bytes):
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
                    where = prepared.plan.slide.location, slide_pass.name, number
                    _log.debug("%s: task %s/%d failed", *where, exc_info=True)
                    reason = error.detail if isinstance(error, CellsegError) else f"{type(error).__name__}: {error}"
                    Journal(prepared.plan.paths.journal).fail(slide_pass.name, number, reason)
                    break
        return Outcome(number, reason, self.clock.drain())

    def close(self) -> None:
        """Close every slide."""
        self.slides.close()

    def _do(self, prepared: PreparedSlide, slide_pass: Pass, number: int) -> None:
        with self.slides.opened(prepared.plan, prepared.backend) as slide:
            if slide.journal.has(slide_pass.name, number):
                return  # by a worker that died before it could say so
            with noting_writes() as written, noting_seconds() as seconds:
                result = slide_pass.task(slide, number)
            with self.clock.stage("write"):
                slide.journal.record(slide_pass.name, number, TaskRecord(tuple(written), result, seconds))


@dataclass(frozen=True)
class WorkerElsewhere:
    """Stands for the worker of whatever process a task is sent to, and is sent with it.

    Attributes:
        settings: of the run.
        choice: of the backend.
        run_id: of the run; a process keeps one worker, for the run that it works on.
    """

    settings: Settings
    choice: Choice
    run_id: str

    def here(self) -> Worker:
        """The worker of this process, made when the first task of the run arrives."""
        with _present_lock:
            if self.run_id not in _present:
                for other in list(_present):
                    _present.pop(other).close()
                bound_heaps()
                model_pool = ModelPool(load_model(self.settings.model), self.settings, choice=self.choice)
                _present[self.run_id] = Worker(self.settings, model_pool, StageClock())
            return _present[self.run_id]

    def close(self) -> None:
        """Processes close their slides themselves."""


AnyWorker = Worker | WorkerElsewhere

_present: dict[str, Worker] = {}
_present_lock = threading.Lock()


def run_task(worker: AnyWorker, prepared: PreparedSlide, slide_pass: Pass, number: int) -> Outcome:
    """Do task ``number`` of a pass in this process; as `Worker.run`."""
    return worker.here().run(prepared, slide_pass, number)
