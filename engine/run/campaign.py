"""Run a campaign: send every image of every input through one pool of workers, so that each can fail alone.

The campaign decides what happens to a slide (skipped, continued, refused, left to another run, done).  The pixels pass
through `pipeline`, in the order in which `scheduling.scheduler` hands out the tasks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from cellseg_batch.engine.errors import CellsegError, OutputError, SlideError, brief
from cellseg_batch.engine.inference.backends.registry import preloaded_modules
from cellseg_batch.engine.inference.choice import Choice, choose_backend, settings_elsewhere
from cellseg_batch.engine.inference.model_pool import ModelPool
from cellseg_batch.engine.machine import peak_resident_bytes
from cellseg_batch.engine.models import load_model
from cellseg_batch.engine.run.failed_images import FailedImages, location
from cellseg_batch.engine.run.lifecycle import Request, finish_slide, look_for_finished, prepare_slide
from cellseg_batch.engine.run.output_images import claim_outputs
from cellseg_batch.engine.run.output_paths import refuse_unwritable
from cellseg_batch.engine.run.prepared_slide import PreparedSlide
from cellseg_batch.engine.run.results import EndedTask, RunReport, SlideReport
from cellseg_batch.engine.run.run_images import find_run_images
from cellseg_batch.engine.run.slide_plan import SlidePlan, choose_input, input_pixels, lay_lattice, pick_margin
from cellseg_batch.engine.run.slide_region import region_path
from cellseg_batch.engine.run.worker import AnyWorker, Outcome, Worker, WorkerElsewhere, run_task
from cellseg_batch.engine.scheduling.dask_pools import open_pool, threads_per_process
from cellseg_batch.engine.scheduling.scheduler import (
    Pool,
    TaskGroup,
    ThreadPool,
    Workflow,
    ask,
    call_alone,
    run_workflows,
)
from cellseg_batch.engine.scheduling.signals import Stop
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.slides.slide import Slide, UnreadableImage
from cellseg_batch.engine.slides.writer import consolidate_again
from cellseg_batch.engine.stage_clock import STAGES, StageClock
from cellseg_batch.engine.storage.journal import Journal
from cellseg_batch.engine.storage.lock import BusyError, Locks
from cellseg_batch.trainer.bundle import Bundle

_log = logging.getLogger(__name__)


class Observer(Protocol):
    """Told about a run while it goes on; an exception that it raises ends the run."""

    def racing(self) -> None:
        """The backends are raced for this model and machine, which happens once."""

    def compiling(self) -> None:
        """A network or a kernel is compiled, which happens once on this machine; called by any thread."""

    def found(self, images: int, pixels: Mapping[str, int]) -> None:
        """``images`` images will be processed; ``pixels`` says how large those are that can be, by their locations."""

    def planned(self, plan: SlidePlan, peak_bytes: int, number: int, done: float) -> None:
        """Slide ``number`` is about to start, perhaps while others go on.

        The run will need at most ``peak_bytes`` of host memory; ``done`` pixels are done already, as `advanced` counts.
        """

    def advanced(self, task: EndedTask) -> None:
        """A task has ended, and with it so many more pixels are done."""

    def ended(self, report: SlideReport) -> None:
        """A slide is done, failed, skipped or held."""


class Unheard:
    """Observer that tells nobody, for runs whose report says all."""

    def racing(self) -> None:
        """See `Observer`."""

    def compiling(self) -> None:
        """See `Observer`."""

    def found(self, images: int, pixels: Mapping[str, int]) -> None:
        """See `Observer`."""

    def planned(self, plan: SlidePlan, peak_bytes: int, number: int, done: float) -> None:
        """See `Observer`."""

    def advanced(self, task: EndedTask) -> None:
        """See `Observer`."""

    def ended(self, report: SlideReport) -> None:
        """See `Observer`."""


def run(
    inputs: list[Path], settings: Settings, observer: Observer, started: float | None = None, stop: Stop | None = None
) -> RunReport:
    """Segment every image below ``inputs``.

    Args:
        inputs: files, zarr stores or folders of them; none with a manifest.
        settings: settings of the run.
        observer: told of every event.
        started: ``time.perf_counter()`` at the command's start; None takes the present time.
        stop: asks the run to end early.

    Returns:
        The report; failed images are in it with their reasons.

    Raises:
        UsageError: the run cannot start with these inputs and settings.
        Stopped: ``stop`` asked the run to end.
    """
    search_started = time.perf_counter()
    started = search_started if started is None else started
    bundle = load_model(settings.model)
    refuse_unwritable(settings.output)
    images = find_run_images(inputs, settings, bundle.card)
    report = _run(bundle, images, settings, observer, StageClock(), started, stop, None)
    return replace(report, starting_seconds=search_started - started)


def run_images(
    images: Sequence[Slide | UnreadableImage],
    settings: Settings,
    observer: Observer,
    clock: StageClock | None = None,
    started: float | None = None,
    stop: Stop | None = None,
    model_pool: ModelPool | None = None,
) -> RunReport:
    """Segment ``images``.

    Args:
        images: the images, opened or refused.
        settings, observer, started, stop: as in `run`.
        clock: counts the busy seconds of each stage, if this process does the work.
        model_pool: model pool of the settings' model and backend, if there is one already.

    Returns:
        The report, as in `run`.

    Raises:
        UsageError, Stopped: as in `run`.
    """
    started = time.perf_counter() if started is None else started
    bundle = load_model(settings.model) if model_pool is None else model_pool.bundle
    return _run(bundle, images, settings, observer, clock or StageClock(), started, stop, model_pool)


def _run(
    bundle: Bundle,
    images: Sequence[Slide | UnreadableImage],
    settings: Settings,
    observer: Observer,
    clock: StageClock,
    started: float,
    stop: Stop | None,
    model_pool: ModelPool | None,
) -> RunReport:
    _refuse_margin_off_grid(settings, bundle)
    campaign = Campaign(settings, bundle, observer, clock, model_pool)
    if settings.retry_failed:
        images = [image for image in images if campaign.failures.has(image)]
    slides = campaign.run(images, stop)
    return replace(campaign.report(slides, time.perf_counter() - started), images=tuple(images))


class Campaign:
    """The state that the slides of one run share.

    Args:
        settings: settings of the run.
        bundle: the model.
        observer: told of every event.
        clock: counts the busy seconds of each stage, if this process does the work.
        model_pool: model pool of the bundle, if there is one already.
    """

    def __init__(
        self,
        settings: Settings,
        bundle: Bundle,
        observer: Observer,
        clock: StageClock,
        model_pool: ModelPool | None = None,
    ) -> None:
        self.settings = settings
        self.card = bundle.card
        self.observer = observer
        self.failures = FailedImages(settings.name, settings.output)
        self.choice = Choice("", "", None)  # until a slide needs a backend
        self.compile_seconds = 0.0
        self._bundle = bundle
        self._clock = clock
        self._model_pool = model_pool
        self._written_stores: set[Path] = set()
        self._figures = _Figures()
        self._locks = Locks()

    def run(self, images: Sequence[Slide | UnreadableImage], stop: Stop | None) -> list[SlideReport]:
        """Process every image and return the reports, in the order of the images."""
        reports: dict[int, SlideReport] = {}
        slides: dict[int, Slide] = {}
        with closing(self._locks):
            for number, image in enumerate(images):
                try:
                    slides[number] = self._usable(image)
                except Exception as error:  # a campaign of thousands of images must survive any error of one image
                    reports[number] = self._noted(image, _failed(image, error))
            pixels = {slide.location: input_pixels(slide, self.settings, self.card) for slide in slides.values()}
            self.observer.found(len(images), pixels)
            for report in reports.values():
                self.observer.ended(report)
            slides = self._unfinished(slides, reports, stop)
            if slides:  # else no backend is needed, and none is raced
                self._segment_all(slides, reports, stop)
        return [reports[number] for number in range(len(images))]

    def _usable(self, image: Slide | UnreadableImage) -> Slide:
        """The image with the path of its region, if its metadata allow it to be segmented with these settings.

        Raises:
            SlideError: they do not.
        """
        if isinstance(image, UnreadableImage):
            raise SlideError.with_detail(image.path, image.reason)
        choose_input(image, self.settings, self.card)
        mask = region_path(image, self.settings)
        return image if mask is None else replace(image, asked=replace(image.asked, mask=mask))

    def _unfinished(
        self, slides: dict[int, Slide], reports: dict[int, SlideReport], stop: Stop | None
    ) -> dict[int, Slide]:
        """The slides that no earlier run has finished; the reports of the others are put into ``reports``."""
        if self.settings.overwrite:
            return slides
        look = partial(look_for_finished, self.settings, self._bundle)
        workflows = (self._workflow(slide, number, reports, ask(look, slide)) for number, slide in slides.items())
        with closing(run_workflows(workflows, ThreadPool(self.settings.workers), stop)) as looked_at:
            for number in looked_at:
                if number in reports:
                    self.observer.ended(reports[number])
        return {number: slide for number, slide in slides.items() if number not in reports}

    def _segment_all(self, slides: Mapping[int, Slide], reports: dict[int, SlideReport], stop: Stop | None) -> None:
        """Segment the slides in a pool and put a report of each under its number into ``reports``."""
        pool = self._open_pool(sum(input_pixels(slide, self.settings, self.card) for slide in slides.values()))
        workflows = (
            self._workflow(slide, number, reports, self._segment(slide, number)) for number, slide in slides.items()
        )
        try:
            with closing(run_workflows(workflows, pool, stop)) as ended:
                for number in ended:
                    self.observer.ended(reports[number])
        finally:
            self.worker.close()
        for store in self._written_stores:
            try:
                consolidate_again(store)
            except OutputError as error:  # the labels are whole, but readers of consolidated metadata do not see them
                note = f"its labels are missing in the consolidated metadata of {store}: {error.detail}"
                for number, report in reports.items():
                    if report.labels and report.labels.startswith(f"{store}/"):
                        reports[number] = replace(report, notes=(*report.notes, note))

    def _open_pool(self, pixels: int) -> Pool:
        """Open a pool of workers and choose the backend that they use for so many pixels."""
        pool = open_pool(self.settings, _imports(self.settings))
        try:
            self._choose_backend(pool, pixels)
        except BaseException:
            pool.close(wait=False)
            raise
        return pool

    def _choose_backend(self, pool: Pool, pixels: int) -> None:
        started = time.perf_counter()
        settings, model_pool = self.settings, self._model_pool
        self._pool_seconds_before = 0.0 if model_pool is None else model_pool.seconds
        if settings.scheduler == "threads":
            tell = self.observer
            model_pool = model_pool or ModelPool(
                self._bundle, settings, tell.racing, pixels=pixels, compiling=tell.compiling
            )
            self.choice = model_pool.choice
            self.worker: AnyWorker = Worker(settings, model_pool, self._clock)
        else:
            # Choose in a worker: this machine may be a login node without the workers' devices.
            workers = max(settings.workers, threads_per_process(settings))  # blocks in flight in one process
            settings = replace(settings_elsewhere(settings), workers=workers)
            self.choice = call_alone(pool, partial(choose_backend, pixels=pixels), settings)
            self.worker = WorkerElsewhere(settings, self.choice, uuid4().hex)
        self.compile_seconds = time.perf_counter() - started

    def _workflow(
        self, slide: Slide, number: int, reports: dict[int, SlideReport], steps: Workflow[SlideReport | None]
    ) -> Workflow[int]:
        """Take the steps for one slide and put their report, if there is one, into ``reports``, errors included."""
        try:
            report = yield from steps
        except BusyError as error:
            report = SlideReport(slide.location, "held", error.detail)
        except Exception as error:
            report = _failed(slide, error)
        if report is not None:
            reports[number] = self._noted(slide, report)
        return number

    def _noted(self, image: Slide | UnreadableImage, report: SlideReport) -> SlideReport:
        """The report with the remarks on the image's metadata; notes for later runs whether the image has failed."""
        notes = (image.notes if isinstance(image, Slide) else ()) + report.notes
        if report.status == "failed":
            if not self.failures.note(image, report.reason):
                notes += ("the failure could not be noted, so `retry_failed` will not find it",)
        elif report.status != "held":
            self.failures.forget(image)
        return replace(report, notes=notes)

    def _segment(self, slide: Slide, number: int) -> Workflow[SlideReport]:
        """Segment one slide, holding the lock of its output."""
        paths = claim_outputs(slide, self.settings, self.card)
        with self._locks.hold(paths.lock):
            return (yield from self._segment_slide(Request(slide, paths), number))

    def _segment_slide(self, request: Request, number: int) -> Workflow[SlideReport]:
        """Prepare a slide, do every pass over it, finish it."""
        slide, paths = request.slide, request.paths
        prepared = yield from ask(partial(prepare_slide, self.worker), request, partial(self._announce, number))
        if isinstance(prepared, SlideReport):
            return prepared
        journal = Journal(paths.journal)
        for slide_pass in prepared.passes:
            failures: dict[int, str] = {}
            told = EndedTask(slide.location, slide_pass.name, 0, prepared.progress_of(slide_pass))
            yield TaskGroup(
                call=partial(run_task, self.worker, prepared, slide_pass),
                items=journal.missing(slide_pass.name, slide_pass.count),
                collect=partial(self._collect, told, failures),
                lost=partial(self._give_up, journal, told, failures),
            )
            if failures:
                summary = f" [{len(failures)} of {slide_pass.count} blocks failed; the others are kept]"
                reason = failures[min(failures)] + summary * (slide_pass.count > 1)
                return SlideReport(slide.location, "failed", reason)
            self._locks.check(paths.lock)
        report = yield from ask(partial(finish_slide, self.worker), prepared)
        self._written_stores.update(output.store for output in prepared.plan.outputs)
        return report

    def _collect(self, told: EndedTask, failures: dict[int, str], outcome: Outcome) -> None:
        self._tell(told, outcome.number, outcome.reason, failures)
        self._figures.count(outcome)

    def _give_up(
        self, journal: Journal, told: EndedTask, failures: dict[int, str], number: int, loss: BaseException
    ) -> None:
        """Note a task that killed its worker processes."""
        reason = f"the processes that worked on it died ({type(loss).__name__}); use more memory, or see their logs"
        journal.fail(told.pass_name, number, reason)
        self._tell(told, number, reason, failures)

    def _tell(self, told: EndedTask, number: int, reason: str, failures: dict[int, str]) -> None:
        if reason:
            failures[number] = reason
        pixels = 0.0 if reason else told.pixels
        self.observer.advanced(replace(told, number=number, pixels=pixels, reason=reason))

    def _announce(self, number: int, prepared: PreparedSlide | SlideReport) -> None:
        if isinstance(prepared, SlideReport):
            return  # another run has just finished it
        if self._figures.largest is None and isinstance(self.worker, Worker):
            # Compiling that happens later, beside blocks in flight, counts as part of the run.
            self.compile_seconds = self.worker.model_pool.seconds - self._pool_seconds_before
        self._figures.plan(prepared)
        self.observer.planned(prepared.plan, self._figures.planned_peak_bytes, number, prepared.progress_done)

    def report(self, slides: list[SlideReport], seconds: float) -> RunReport:
        """The report of the whole run, which took ``seconds``, compiling included."""
        largest = self._figures.largest
        grid = largest.plan.grid if largest else None
        backend, precision = (largest.backend.name, largest.backend.precision) if largest else ("", "")
        is_chosen = (backend, precision) == (self.choice.backend, self.choice.precision)  # else of an earlier run
        return RunReport(
            seconds=seconds - self.compile_seconds,
            compile_seconds=self.compile_seconds,
            backend=backend,
            precision=precision,
            short_race=is_chosen and self.choice.is_likely,
            tile=grid.lattice.tile if grid else None,
            margin=pick_margin(self.settings, self.card),
            batch=self.settings.batch,
            block=grid.block_shape if grid else None,
            workers=self._figures.workers,
            peak_rss_bytes=max(peak_resident_bytes(), self._figures.peak_bytes),
            planned_peak_bytes=self._figures.planned_peak_bytes,
            stages=self._figures.stages,
            slides=slides,
        )


class _Figures:
    """Figures of all slides of a campaign together.

    Attributes:
        largest: the slide with most pixels; None before the first plan.
        planned_peak_bytes: planned peak of host memory of the slide that needs most, in bytes.
        workers: number of blocks in flight of the slide that allows most.
        stages: busy seconds of each stage, over all workers.
        peak_bytes: largest resident memory of a worker process, in bytes.
    """

    def __init__(self) -> None:
        self.largest: PreparedSlide | None = None
        self.planned_peak_bytes = 0
        self.workers = 0
        self.stages = dict.fromkeys(STAGES, 0.0)
        self.peak_bytes = 0

    def plan(self, prepared: PreparedSlide) -> None:
        """Take in the plan of a slide."""
        if self.largest is None or prepared.plan.pixels > self.largest.plan.pixels:
            self.largest = prepared
        self.planned_peak_bytes = max(self.planned_peak_bytes, prepared.peak_bytes)
        self.workers = max(self.workers, prepared.workers)

    def count(self, outcome: Outcome) -> None:
        """Take in the busy seconds and the memory of a worker."""
        for stage, seconds in outcome.stages.items():
            self.stages[stage] += seconds
        self.peak_bytes = max(self.peak_bytes, outcome.peak_bytes)


def _failed(image: Slide | UnreadableImage, error: Exception) -> SlideReport:
    """The report of an image that an error ended."""
    _log.debug("%s failed", location(image), exc_info=error)
    return SlideReport(location(image), "failed", error.detail if isinstance(error, CellsegError) else brief(error))


def _imports(settings: Settings) -> list[str]:
    """Modules that every worker process needs, as far as they are known before the backend is chosen."""
    return ["cellseg_batch.engine.run.worker", *preloaded_modules(settings.backend)]


def _refuse_margin_off_grid(settings: Settings, bundle: Bundle) -> None:
    """Refuse a tile and margin that would fail for every slide, before any slide is opened."""
    lay_lattice((1, 1), settings, bundle.card)
