"""A run: every image of every input through one pool of workers, each failing alone.

This room decides what happens to a slide (skipped, continued, refused, left to another run, done); the pixels pass
through `run.pipeline`, in whatever order `scheduling.scheduler` hands out the tasks.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from cellseg_batch.engine.errors import CellsegError, OutputError
from cellseg_batch.engine.geometry import fit_lattice
from cellseg_batch.engine.inference.backends.registry import preloaded_modules
from cellseg_batch.engine.inference.choice import choose_backend, settings_elsewhere
from cellseg_batch.engine.inference.model_pool import ModelPool
from cellseg_batch.engine.machine import peak_resident_bytes
from cellseg_batch.engine.models import load_model
from cellseg_batch.engine.run.failed_images import FailedImages, location
from cellseg_batch.engine.run.lifecycle import Request, finish_slide, prepare_slide
from cellseg_batch.engine.run.output_paths import Place, place_output, refuse_output_inside
from cellseg_batch.engine.run.pipeline import passes_of
from cellseg_batch.engine.run.results import RunReport, SlideReport
from cellseg_batch.engine.run.slide_plan import SlideJob, SlidePlan, pick_margin
from cellseg_batch.engine.run.worker import Outcome, Worker
from cellseg_batch.engine.scheduling.dask_pools import open_pool
from cellseg_batch.engine.scheduling.scheduler import TaskGroup, Workflow, ask, call_alone, run_workflows
from cellseg_batch.engine.scheduling.signals import Stop
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.slides.discover import EVERY_FIELD, find_images
from cellseg_batch.engine.slides.plate import FieldChoice
from cellseg_batch.engine.slides.slide import Broken, Slide
from cellseg_batch.engine.slides.writer import consolidate_again
from cellseg_batch.engine.stage_clock import StageClock
from cellseg_batch.engine.storage.journal import Journal
from cellseg_batch.engine.storage.lock import BusyError, Locks
from cellseg_batch.trainer.bundle import Bundle

_log = logging.getLogger(__name__)


class Observer(Protocol):
    """Told about a run while it goes on; implemented by the command line."""

    def racing(self) -> None:
        """The backends are raced for this model and machine, which happens once."""

    def found(self, images: int) -> None:
        """So many images will be processed."""

    def planned(self, plan: SlidePlan, peak_bytes: int, number: int, done: int) -> None:
        """Slide ``number`` is about to start, perhaps while others go on.

        The run will need at most ``peak_bytes`` of host memory; ``done`` of the slide's pixels are on disk already.
        """

    def advanced(self, pixels: int) -> None:
        """So many more pixels are on disk."""

    def ended(self, report: SlideReport) -> None:
        """A slide is done, failed, skipped or held."""


def run(
    inputs: list[Path], settings: Settings, observer: Observer, started: float | None = None, stop: Stop | None = None
) -> RunReport:
    """Segment every image below ``inputs``.

    Args:
        inputs: files, zarr stores or folders of them.
        settings: what was asked for.
        observer: told as things happen.
        started: ``time.perf_counter()`` at the command's start; now when left out.
        stop: asks the run to end early.

    Returns:
        The report; images that failed are in it with their reasons.

    Raises:
        UsageError: nothing can be run as asked.
        Stopped: it was asked to end.
    """
    begun = time.perf_counter()
    started = begun if started is None else started
    refuse_output_inside(settings.output, inputs)
    choice = FieldChoice(settings.wells, settings.fields)
    images = [image for path in inputs for image in find_images(path, settings.axes, choice)]
    report = run_images(images, settings, observer, StageClock(), started, stop)
    report = replace(report, starting_seconds=begun - started)
    if not settings.objects:
        return report
    from cellseg_batch.engine.reports.plates import summarise_plates  # and with it pyarrow

    if choice != EVERY_FIELD:
        images = [image for path in inputs for image in find_images(path, settings.axes)]
    return replace(report, plates=summarise_plates(images, report.slides, settings.name, settings.output))


def run_images(
    images: list[Slide | Broken],
    settings: Settings,
    observer: Observer,
    clock: StageClock,
    started: float,
    stop: Stop | None = None,
) -> RunReport:
    """Segment ``images``, their stages counted by ``clock``; `run` says the rest."""
    bundle = load_model(settings.model)
    _refuse_margin_off_grid(settings, bundle)
    campaign = _Campaign(settings, bundle, observer, clock)
    if settings.retry_failed:
        images = [image for image in images if campaign.failures.has(image)]
    observer.found(len(images))
    slides = campaign.run(images, stop)
    return campaign.report(slides, time.perf_counter() - started)


class _Campaign:
    """What the slides of one run share."""

    def __init__(self, settings: Settings, bundle: Bundle, observer: Observer, clock: StageClock) -> None:
        self.settings = settings
        self.card = bundle.card
        self.observer = observer
        self.clock = clock
        self.taken: dict[Path, str] = {}
        self.written: set[Path] = set()
        self.largest: SlidePlan | None = None
        self.planned_peak = 0
        self.workers = 0
        self.locks = Locks()
        self.failures = FailedImages(settings.name, settings.output)
        self.pool = open_pool(settings, _imports(settings))
        try:
            self._choose_backend(settings, bundle)
        except BaseException:
            self.pool.close(wait=False)
            raise

    def _choose_backend(self, settings: Settings, bundle: Bundle) -> None:
        begun = time.perf_counter()
        if settings.scheduler == "threads":
            self.model_pool: ModelPool | None = ModelPool(bundle, settings, self.observer.racing)
            self.choice = self.model_pool.choice
        else:
            # Not on this machine, which may be a login node without the workers' devices.
            self.model_pool, settings = None, settings_elsewhere(settings)
            self.choice = call_alone(self.pool, choose_backend, settings)
        self.compile_seconds = time.perf_counter() - begun
        self.worker = Worker(settings, self.choice, uuid4().hex, self.model_pool, self.clock)

    def run(self, images: list[Slide | Broken], stop: Stop | None) -> list[SlideReport]:
        """Take every image through the pool; reports in the order of the images."""
        reports: dict[int, SlideReport] = {}
        workflows = (self._workflow(image, number, reports) for number, image in enumerate(images))
        try:
            for number in run_workflows(workflows, self.pool, stop):
                self.observer.ended(reports[number])
        finally:
            self.worker.close()
            self.locks.close()
        for store in self.written:
            consolidate_again(store)
        return [reports[number] for number in range(len(images))]

    def _workflow(self, image: Slide | Broken, number: int, reports: dict[int, SlideReport]) -> Workflow[int]:
        """Segment one image; whatever goes wrong with it is in its report."""
        try:
            report = yield from self._segment(image, number)
        except BusyError as error:
            report = SlideReport(location(image), "held", error.detail)
        except CellsegError as error:
            _log.debug("%s failed", location(image), exc_info=True)
            report = SlideReport(location(image), "failed", error.detail)
        except Exception as error:  # a campaign of thousands of slides must not die of one
            _log.debug("%s failed", location(image), exc_info=True)
            report = SlideReport(location(image), "failed", f"{type(error).__name__}: {error} (see --debug)")
        if report.status == "failed":
            self.failures.note(image, report.reason)
        elif report.status != "held":
            self.failures.forget(image)
        reports[number] = report
        return number

    def _segment(self, image: Slide | Broken, number: int) -> Workflow[SlideReport]:
        if isinstance(image, Broken):
            return SlideReport(image.path, "failed", image.reason)
        place = place_output(image, self.settings.name, self.settings.output)
        self._claim(place, image)
        finished = Journal(place.journal).finished() is not None and not self.settings.overwrite
        if finished and all(folder.exists() for folder in place.folders(self.settings.probability)):
            return (yield from self._work_on(image, place, number))  # nothing will be written
        with self.locks.hold(place.lock):
            return (yield from self._work_on(image, place, number))

    def _work_on(self, slide: Slide, place: Place, number: int) -> Workflow[SlideReport]:
        """The workflow of a slide: prepare it, do every pass, finish it."""
        job = yield from ask(partial(prepare_slide, self.worker), Request(slide, place))
        if isinstance(job, SlideReport):
            return job
        self._announce(job, number)
        journal = Journal(place.journal)
        for one in passes_of(job.plan):
            failures: dict[int, str] = {}
            yield TaskGroup(
                call=partial(self.worker.run, job, one),
                items=journal.missing(one.part, one.count),
                collect=partial(self._collect, failures),
                lost=partial(_give_up, journal, one.part, failures),
            )
            if failures:
                kept = f" [{len(failures)} of {one.count} blocks failed; the others are kept]"
                return SlideReport(slide.location, "failed", failures[min(failures)] + kept * (one.count > 1))
            self.locks.check(place.lock)
        report = yield from ask(partial(finish_slide, self.worker), job)
        self.written.update(place.stores(job.plan.probability))
        return report

    def _collect(self, failures: dict[int, str], outcome: Outcome) -> None:
        if outcome.reason:
            failures[outcome.number] = outcome.reason
        self.clock.add(outcome.stages)
        self.observer.advanced(outcome.pixels)

    def _announce(self, job: SlideJob, number: int) -> None:
        if self.largest is None and self.model_pool is not None:
            # What is compiled later, while blocks are under way, is part of the run.
            self.compile_seconds = self.model_pool.seconds
        if self.largest is None or job.plan.pixels > self.largest.pixels:
            self.largest = job.plan
        self.planned_peak = max(self.planned_peak, job.peak_bytes)
        self.workers = max(self.workers, job.workers)
        self.observer.planned(job.plan, self.planned_peak, number, job.done)

    def _claim(self, place: Place, slide: Slide) -> None:
        """Keep two images of one run from writing to one place."""
        for folder in place.folders(self.settings.probability):
            owner = self.taken.setdefault(folder, slide.location)
            if owner != slide.location:
                raise OutputError(
                    str(folder),
                    expected="a place of its own for each image's labels",
                    found=f"the place of {owner}",
                    cause="two inputs of one name",
                    remedy="run them one by one with different --name or --output",
                )

    def report(self, slides: list[SlideReport], seconds: float) -> RunReport:
        """The report of the whole run, which took ``seconds`` with compiling."""
        largest = self.largest
        return RunReport(
            seconds=seconds - self.compile_seconds,
            compile_seconds=self.compile_seconds,
            backend=self.choice.backend,
            precision=self.choice.precision,
            tile=largest.grid.lattice.tile if largest else (0, 0),
            margin=pick_margin(self.settings, self.card),
            batch=self.settings.batch,
            block=largest.grid.block_shape if largest else (0, 0),
            workers=self.workers,
            peak_rss_bytes=peak_resident_bytes(),
            planned_peak_bytes=self.planned_peak,
            stages=self.clock.seconds,
            slides=slides,
        )


def _imports(settings: Settings) -> list[str]:
    """What every worker process needs, as far as it is known before the backend is chosen."""
    return ["cellseg_batch.engine.run.worker", *preloaded_modules(settings.backend)]


def _give_up(journal: Journal, part: str, failures: dict[int, str], number: int, loss: BaseException) -> None:
    """Note a task that its worker processes died of."""
    failures[number] = (
        f"the processes that worked on it died ({type(loss).__name__}); use more memory, or see their logs"
    )
    journal.fail(part, number, failures[number])


def _refuse_margin_off_grid(settings: Settings, bundle: Bundle) -> None:
    """Refuse before any slide is opened what would fail for every slide."""
    fit_lattice((1, 1), settings.tile, pick_margin(settings, bundle.card), bundle.card.total_stride)
