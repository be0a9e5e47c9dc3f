"""A run: every image of every input, one after the other, each failing alone.

This room decides what happens to a slide (skipped, continued, refused, done); the pixels pass through
`cellseg_batch.engine.pipeline`.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from cellseg_batch.engine.backends.backend import Backend, CompiledModel, Shape
from cellseg_batch.engine.backends.choose import choose_backend, make_backend
from cellseg_batch.engine.errors import CellsegError, OutputError
from cellseg_batch.engine.geometry import fit_lattice, lay_blocks
from cellseg_batch.engine.journal import Journal
from cellseg_batch.engine.memory import RUN_OVERHEAD_BYTES, block_memory, peak_resident_bytes, resident_bytes
from cellseg_batch.engine.models import load_model
from cellseg_batch.engine.pipeline import Pipeline
from cellseg_batch.engine.place import place_output, refuse_output_inside
from cellseg_batch.engine.plan import SlidePlan, adopt_manifest, pick_margin, plan_slide
from cellseg_batch.engine.reader import SlideReader
from cellseg_batch.engine.report import RunReport, SlideReport
from cellseg_batch.engine.runner import Runner
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.slides.discover import find_images
from cellseg_batch.engine.slides.slide import Broken, Slide
from cellseg_batch.engine.stages import StageClock
from cellseg_batch.engine.writer import ImageWriter, lay_out, list_label
from cellseg_batch.trainer.bundle import Bundle

_log = logging.getLogger(__name__)


class Observer(Protocol):
    """Told about a run while it goes on; implemented by the command line."""

    def found(self, images: int) -> None:
        """So many images will be processed."""

    def planned(self, plan: SlidePlan, peak_bytes: int, number: int) -> None:
        """Slide ``number`` is about to start; it will need at most ``peak_bytes`` of host memory."""

    def advanced(self, pixels: int) -> None:
        """So many more pixels are on disk."""

    def ended(self, report: SlideReport) -> None:
        """A slide is done, failed or skipped."""


class Engines:
    """The backends and compiled models of a run, each made once and kept.

    Args:
        bundle: the model.
        settings: say which backend, precision and threads.
    """

    def __init__(self, bundle: Bundle, settings: Settings) -> None:
        self.bundle = bundle
        self.seconds = 0.0
        self._threads = settings.threads or len(os.sched_getaffinity(0))
        start = time.perf_counter()
        self.chosen = choose_backend(bundle, settings.backend, settings.precision, self._threads)
        self.seconds += time.perf_counter() - start
        self._backends = {(self.chosen.name, self.chosen.precision): self.chosen}
        self._compiled: tuple[tuple[str, str, Shape], CompiledModel] | None = None

    def backend(self, name: str, precision: str) -> Backend:
        """A backend by name, for a run that was begun with it.

        Raises:
            BackendError: it is not to be had here.
        """
        start = time.perf_counter()
        if (name, precision) not in self._backends:
            self._backends[name, precision] = make_backend(self.bundle, name, precision, self._threads)
        self.seconds += time.perf_counter() - start
        return self._backends[name, precision]

    def compiled(self, backend: Backend, shape: Shape) -> CompiledModel:
        """The model compiled for a batch shape; only the last one is kept, as each holds its own memory."""
        key = (backend.name, backend.precision, shape)
        if self._compiled is None or self._compiled[0] != key:
            start = time.perf_counter()
            self._compiled = None
            self._compiled = (key, backend.compile(shape))
            self.seconds += time.perf_counter() - start
        return self._compiled[1]


def run(inputs: list[Path], settings: Settings, observer: Observer, started: float | None = None) -> RunReport:
    """Segment every image below ``inputs``.

    Args:
        inputs: files, zarr stores or folders of them.
        settings: what was asked for.
        observer: told as things happen.
        started: ``time.perf_counter()`` at the command's start; now when left out.

    Returns:
        The report; images that failed are in it with their reasons.

    Raises:
        UsageError: nothing can be run as asked.
    """
    started = time.perf_counter() if started is None else started
    refuse_output_inside(settings.output, inputs)
    images = [image for path in inputs for image in find_images(path, settings.axes)]
    bundle = load_model(settings.model)
    _refuse_margin_off_grid(settings, bundle)
    engines = Engines(bundle, settings)
    campaign = _Campaign(settings, bundle, engines, observer)
    observer.found(len(images))
    slides = [campaign.process(image, number) for number, image in enumerate(images)]
    seconds = time.perf_counter() - started - engines.seconds
    return campaign.report(slides, seconds)


class _Campaign:
    """What the slides of one run share."""

    def __init__(self, settings: Settings, bundle: Bundle, engines: Engines, observer: Observer) -> None:
        self.settings = settings
        self.bundle = bundle
        self.engines = engines
        self.observer = observer
        self.clock = StageClock()
        self.taken: dict[Path, str] = {}
        self.largest: SlidePlan | None = None
        self.planned_peak = 0
        self.warm: set[tuple[Shape, str, str, bool]] = set()

    def process(self, image: Slide | Broken, number: int) -> SlideReport:
        """Segment one image; whatever goes wrong with it is in the report that comes back."""
        if isinstance(image, Broken):
            report = SlideReport(image.path, "failed", image.reason)
        else:
            try:
                report = self._segment(image, number)
            except CellsegError as error:
                _log.debug("%s failed", image.location, exc_info=True)
                report = SlideReport(image.location, "failed", error.detail)
            except Exception as error:  # a campaign of thousands of slides must not die of one
                _log.debug("%s failed", image.location, exc_info=True)
                report = SlideReport(image.location, "failed", f"{type(error).__name__}: {error} (see --debug)")
        self.observer.ended(report)
        return report

    def report(self, slides: list[SlideReport], seconds: float) -> RunReport:
        """The report of the whole run."""
        largest = self.largest
        return RunReport(
            seconds=seconds,
            compile_seconds=self.engines.seconds,
            backend=self.engines.chosen.name,
            precision=self.engines.chosen.precision,
            tile=largest.grid.lattice.tile if largest else (0, 0),
            margin=pick_margin(self.settings, self.bundle.card),
            batch=self.settings.batch,
            block=largest.grid.block_shape if largest else (0, 0),
            workers=self.settings.workers,
            peak_rss_bytes=peak_resident_bytes(),
            planned_peak_bytes=self.planned_peak,
            stages=dict(self.clock.seconds),
            slides=slides,
        )

    def _segment(self, slide: Slide, number: int) -> SlideReport:
        place = place_output(slide, self.settings.name, self.settings.output)
        self._claim(place.labels_folder, slide)
        plan = plan_slide(slide, place, self.settings, self.bundle.card)
        journal = Journal(place.journal)
        plan, backend, resumed = self._settle(plan, journal)
        finished = journal.finished() if resumed else None
        if finished is not None:
            return self._describe(plan, "skipped", (finished["foreground"], finished["missing"]), "finished before")

        with SlideReader(slide, plan.level.level, plan.channels.indices) as reader:
            return self._carry_out(plan, backend, resumed, journal, reader, number)

    def _carry_out(
        self, plan: SlidePlan, backend: Backend, resumed: bool, journal: Journal, reader: SlideReader, number: int
    ) -> SlideReport:
        place = plan.place
        runner = self._warm_runner(plan, backend, reader)
        plan, workers = self._fit_memory(plan, resumed)
        self.observer.planned(plan, self.planned_peak, number)
        layout = lay_out(plan.slide, plan.level.level, plan.grid, place.zarr_format)
        labels = ImageWriter(place.store, place.labels, layout)
        probability = ImageWriter(place.companion, place.probability, layout) if plan.probability else None
        if not resumed:
            journal.start(plan.manifest(self.bundle, backend))
            labels.create(place.source, is_label=True)
            if probability is not None:
                probability.create(None, is_label=False)
            journal.record("created", 0, {})
        pipeline = Pipeline(plan, reader, runner, labels, probability, journal, self.clock, self.observer.advanced)
        before = pipeline.pixels_done()
        failures = pipeline.run(workers)
        if failures:
            kept = f" [{len(failures)} of {len(plan.grid)} blocks failed; the others are kept]"
            return SlideReport(plan.slide.location, "failed", failures[0].detail + kept * (len(plan.grid) > 1))
        totals = pipeline.totals()
        list_label(place.store, place.labels.rpartition("/")[0], place.name, place.zarr_format)
        journal.finish({"foreground": totals[0], "missing": totals[1]})
        return replace(self._describe(plan, "done", totals), pixels=plan.pixels - before)

    def _claim(self, folder: Path, slide: Slide) -> None:
        """Keep two images of one run from writing to one place."""
        owner = self.taken.setdefault(folder, slide.location)
        if owner != slide.location:
            raise OutputError(
                str(folder),
                expected="a place of its own for each image's labels",
                found=f"the place of {owner}",
                cause="two inputs of one name",
                remedy="run them one by one with different --name or --output",
            )

    def _settle(self, plan: SlidePlan, journal: Journal) -> tuple[SlidePlan, Backend, bool]:
        """The plan, its backend, and whether it goes on with work that is already there.

        Raises:
            OutputError: labels of that name are there and are not this run's own.
        """
        settings, chosen = self.settings, self.engines.chosen
        manifest = journal.manifest()
        folder = plan.place.labels_folder
        if settings.overwrite or not folder.exists():
            return plan, chosen, False
        if manifest is None:
            raise OutputError(
                str(folder),
                expected="no labels of that name, or this run's own unfinished ones",
                found="labels without a journal",
                cause="they were written by something else",
                remedy="choose another --name, or --overwrite to replace them",
            )
        if not journal.numbers("created"):
            return plan, chosen, False
        begun = manifest["backend"]
        backend = self.engines.backend(
            begun["name"] if settings.backend == "auto" else chosen.name,
            begun["precision"] if settings.precision == "auto" else chosen.precision,
        )
        return adopt_manifest(plan, manifest, plan.manifest(self.bundle, backend)), backend, True

    def _warm_runner(self, plan: SlidePlan, backend: Backend, reader: SlideReader) -> Runner:
        """A runner that has segmented one tile, so that everything is compiled and its memory can be seen."""
        model = self.engines.compiled(backend, plan.shape)
        arguments = (model, plan.shape, plan.grid.lattice, plan.bounds, plan.threshold, plan.probability)
        kind = (plan.shape, plan.slide.dtype, plan.slide.axes, plan.probability)
        if kind not in self.warm:
            start = time.perf_counter()
            tile = lay_blocks(plan.grid.lattice, block=1)[0]
            Runner(*arguments, clock=StageClock()).segment(reader.read(0, tile.read_box), tile)
            self.warm.add(kind)
            self.engines.seconds += time.perf_counter() - start
        return Runner(*arguments, clock=self.clock)

    def _fit_memory(self, plan: SlidePlan, resumed: bool) -> tuple[SlidePlan, int]:
        """The plan and the number of workers that stay under ``--max-memory``; a resumed plan keeps its blocks.

        Raises:
            OutputError: not even one small block at a time does.
        """
        held = resident_bytes() + RUN_OVERHEAD_BYTES
        limit = self.settings.max_memory
        while True:
            block = block_memory(plan.slide, plan.level.level, len(plan.channels.indices), plan.grid, plan.probability)
            workers = min(self.settings.workers, len(plan.grid))
            if limit is not None:
                workers = min(workers, max(1, (limit - held) // block.total))
            need = held + workers * block.total
            if limit is None or need <= limit:
                break
            rows, columns = plan.grid.cores
            if resumed or (rows, columns) == (1, 1):
                raise OutputError(
                    plan.slide.location,
                    expected=f"a run within --max-memory {limit / 1e6:.0f} MB",
                    found=f"{held / 1e6:.0f} MB for the model and {block.total / 1e6:.0f} MB for one block",
                    remedy="allow more memory, or use a smaller --tile",
                )
            plan = replace(plan, grid=replace(plan.grid, cores=(-(-rows // 2), -(-columns // 2))))
        if self.largest is None or plan.pixels > self.largest.pixels:
            self.largest = plan
        self.planned_peak = max(self.planned_peak, need, peak_resident_bytes())
        return plan, workers

    def _describe(self, plan: SlidePlan, status: str, totals: tuple[int, int], reason: str = "") -> SlideReport:
        slide, level = plan.slide, plan.level.level
        foreground, missing = totals
        return SlideReport(
            path=slide.location,
            status=status,
            reason=reason,
            labels=str(plan.place.labels_folder),
            shape=lay_out(slide, level, plan.grid, plan.place.zarr_format).shapes[0],
            level=level,
            pixel_size_um=plan.level.pixel_size_um,
            blocks=len(plan.grid),
            tiles=plan.tiles,
            foreground_fraction=foreground / plan.pixels,
            missing_pixels=missing,
        )


def _refuse_margin_off_grid(settings: Settings, bundle: Bundle) -> None:
    """Refuse before any slide is opened what would fail for every slide."""
    fit_lattice((1, 1), settings.tile, pick_margin(settings, bundle.card), bundle.card.total_stride)
