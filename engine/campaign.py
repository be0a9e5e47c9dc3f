"""A run: every image of every input, one after the other, each failing alone.

This room decides what happens to a slide (skipped, continued, refused, done); the pixels pass through
`cellseg_batch.engine.pipeline`.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from cellseg_batch.engine.backends.backend import Backend, Shape
from cellseg_batch.engine.engines import Engines
from cellseg_batch.engine.errors import CellsegError, OutputError, ReadError
from cellseg_batch.engine.geometry import fit_lattice, lay_blocks
from cellseg_batch.engine.journal import Journal
from cellseg_batch.engine.machine import peak_resident_bytes, resident_bytes
from cellseg_batch.engine.memory import RUN_OVERHEAD_BYTES, block_memory
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
from cellseg_batch.engine.working_scale import settle_shrink, shrink_plan
from cellseg_batch.engine.writer import ImageWriter, consolidate_again, lay_out, list_label
from cellseg_batch.trainer.bundle import Bundle

_log = logging.getLogger(__name__)


class Observer(Protocol):
    """Told about a run while it goes on; implemented by the command line."""

    def racing(self) -> None:
        """The backends are raced for this model and machine, which happens once."""

    def found(self, images: int) -> None:
        """So many images will be processed."""

    def planned(self, plan: SlidePlan, peak_bytes: int, number: int, done: int) -> None:
        """Slide ``number`` is about to start.

        It will need at most ``peak_bytes`` of host memory; ``done`` of its pixels are on disk already.
        """

    def advanced(self, pixels: int) -> None:
        """So many more pixels are on disk."""

    def ended(self, report: SlideReport) -> None:
        """A slide is done, failed or skipped."""


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
    return run_images(images, settings, observer, StageClock(), started)


def run_images(
    images: list[Slide | Broken], settings: Settings, observer: Observer, clock: StageClock, started: float
) -> RunReport:
    """Segment ``images``, their stages counted by ``clock``; `run` says the rest."""
    bundle = load_model(settings.model)
    _refuse_margin_off_grid(settings, bundle)
    engines = Engines(bundle, settings, observer.racing)
    campaign = _Campaign(settings, bundle, engines, observer, clock)
    observer.found(len(images))
    slides = [campaign.process(image, number) for number, image in enumerate(images)]
    campaign.close()
    seconds = time.perf_counter() - started - engines.seconds
    return campaign.report(slides, seconds)


class _Campaign:
    """What the slides of one run share."""

    def __init__(
        self, settings: Settings, bundle: Bundle, engines: Engines, observer: Observer, clock: StageClock
    ) -> None:
        self.settings = settings
        self.bundle = bundle
        self.engines = engines
        self.observer = observer
        self.clock = clock
        self.taken: dict[Path, str] = {}
        self.largest: SlidePlan | None = None
        self.planned_peak = 0
        self.workers = 0
        self.written: set[Path] = set()
        self.warm: set[tuple[Shape, str, str, bool, int]] = set()

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

    def close(self) -> None:
        """Bring the consolidated metadata of the stores that have them up to date, once each."""
        for store in self.written:
            consolidate_again(store)

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
            workers=self.workers,
            peak_rss_bytes=peak_resident_bytes(),
            planned_peak_bytes=self.planned_peak,
            stages=dict(self.clock.seconds),
            slides=slides,
        )

    def _segment(self, slide: Slide, number: int) -> SlideReport:
        place = place_output(slide, self.settings.name, self.settings.output)
        folders = [place.labels_folder] + [place.probability_folder] * self.settings.probability
        for folder in folders:
            self._claim(folder, slide)
        journal = Journal(place.journal)
        begun = self._begun(journal, folders)
        plan = plan_slide(slide, place, self.settings, self.bundle.card, begun)
        if begun is not None:
            factor, finished = self.settings.shrink or int(begun["shrink"]), journal.finished()
            plan, backend = shrink_plan(plan, self.settings, self.bundle, factor), self._backend_of(begun, factor)
            plan = adopt_manifest(plan, begun, self._manifest(plan, backend), finished is not None)
            if finished is not None:
                totals = finished["foreground"], finished["missing"]
                return self._describe(plan, "skipped", totals, "finished before")
        with SlideReader(slide, plan.level.level, plan.channels.indices) as reader:
            if begun is None:
                factor = settle_shrink(plan, self.settings, self.engines, reader)
                plan = shrink_plan(plan, self.settings, self.bundle, factor)
                backend = self.engines.shrunk(self.engines.chosen, factor)
            return self._carry_out(plan, backend, begun is not None, journal, reader, number)

    def _manifest(self, plan: SlidePlan, backend: Backend) -> dict[str, Any]:
        return plan.manifest(self.bundle.shrunk(plan.shrink), backend)

    def _carry_out(
        self, plan: SlidePlan, backend: Backend, resumed: bool, journal: Journal, reader: SlideReader, number: int
    ) -> SlideReport:
        place = plan.place
        runner = self._warm_runner(plan, backend, reader)
        plan, workers = self._fit_memory(plan, resumed)
        layout = lay_out(plan.slide, plan.level.level, plan.grid, place.zarr_format)
        labels = ImageWriter(place.store, place.labels, layout)
        probability = ImageWriter(place.companion, place.probability, layout) if plan.probability else None
        if not resumed:
            manifest = self._manifest(plan, backend)
            journal.start(manifest)
            provenance = {**manifest, "certificate": self.engines.certificate_of(backend)}
            labels.create(place.source, is_label=True, provenance=provenance)
            if probability is not None:
                probability.create(None, is_label=False, provenance=provenance)
            journal.record("created", 0, {})
        pipeline = Pipeline(plan, reader, runner, labels, probability, journal, self.clock, self.observer.advanced)
        before = pipeline.pixels_done()
        self.observer.planned(plan, self.planned_peak, number, before)
        failures = pipeline.run(workers)
        if failures:
            kept = f" [{len(failures)} of {len(plan.grid)} blocks failed; the others are kept]"
            return SlideReport(plan.slide.location, "failed", failures[0].detail + kept * (len(plan.grid) > 1))
        totals = pipeline.totals()
        list_label(place.store, place.labels.rpartition("/")[0], place.name, place.zarr_format)
        self.written.update(image.store for image in (labels, probability) if image is not None)
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

    def _begun(self, journal: Journal, folders: list[Path]) -> dict[str, Any] | None:
        """The manifest of this run's own earlier work, None when there is nothing to go on with.

        Raises:
            OutputError: something of that name is there and is not this run's own.
        """
        manifest = journal.manifest()
        there = [folder for folder in folders if folder.exists()]
        if self.settings.overwrite or not there:
            return None
        if manifest is None:
            raise OutputError(
                str(there[0]),
                expected="nothing of that name, or this run's own unfinished work",
                found="an image without a journal",
                cause="it was written by something else",
                remedy="choose another --name, or --overwrite to replace it",
            )
        return manifest if there == folders and journal.numbers("created") else None

    def _backend_of(self, begun: dict[str, Any], factor: int) -> Backend:
        """The backend that an earlier run was begun with, as far as the user did not ask for another one."""
        settings, chosen, used = self.settings, self.engines.chosen, begun["backend"]
        return self.engines.backend(
            used["name"] if settings.backend == "auto" else chosen.name,
            used["precision"] if settings.precision == "auto" else chosen.precision,
            factor,
        )

    def _warm_runner(self, plan: SlidePlan, backend: Backend, reader: SlideReader) -> Runner:
        """A runner that has segmented one tile, so that everything is compiled and its memory can be seen."""
        model = self.engines.compiled(backend, plan.shape)
        arguments = (model, plan.shape, plan.grid.lattice, plan.bounds, plan.threshold, plan.probability)
        kind = (plan.shape, plan.slide.dtype, plan.slide.axes, plan.probability, plan.shrink)
        if kind not in self.warm:
            tile = lay_blocks(plan.grid.lattice, block=1)[0]
            with self.engines.counted(), suppress(ReadError):  # a damaged first chunk costs its block, not the slide
                Runner(*arguments, clock=StageClock()).segment(reader.read(0, tile.read_box), tile)
            self.warm.add(kind)
        return Runner(*arguments, clock=self.clock)

    def _fit_memory(self, plan: SlidePlan, resumed: bool) -> tuple[SlidePlan, int]:
        """The plan and the number of workers that stay under ``--max-memory``; a resumed plan keeps its blocks.

        Raises:
            OutputError: not even one small block at a time does.
        """
        held = max(resident_bytes() + RUN_OVERHEAD_BYTES, peak_resident_bytes())
        limit = self.settings.max_memory
        while True:
            block = block_memory(plan.slide, plan.level.level, len(plan.channels.indices), plan.grid, plan.probability)
            workers = min(self.settings.workers, len(plan.grid))
            if limit is not None:
                workers = min(workers, max(1, (limit - held) // block))
            need = held + workers * block
            if limit is None or need <= limit:
                break
            rows, columns = plan.grid.cores
            if resumed or (rows, columns) == (1, 1):
                raise OutputError(
                    plan.slide.location,
                    expected=f"a run within --max-memory {limit / 1e6:.0f} MB",
                    found=f"{held / 1e6:.0f} MB for the model and {block / 1e6:.0f} MB for one block",
                    remedy="allow more memory, or use a smaller --tile",
                )
            plan = replace(plan, grid=replace(plan.grid, cores=(-(-rows // 2), -(-columns // 2))))
        if self.largest is None or plan.pixels > self.largest.pixels:
            self.largest = plan
        self.planned_peak = max(self.planned_peak, need)
        self.workers = max(self.workers, workers)
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
            shrink=plan.shrink,
        )


def _refuse_margin_off_grid(settings: Settings, bundle: Bundle) -> None:
    """Refuse before any slide is opened what would fail for every slide."""
    fit_lattice((1, 1), settings.tile, pick_margin(settings, bundle.card), bundle.card.total_stride)
