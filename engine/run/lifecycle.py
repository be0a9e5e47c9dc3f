"""Before a slide's first block and after its last one: what is there already, plan, outputs; and the closing entry.

Both are tasks for any worker, as blocks are.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from cellseg_batch.engine.errors import OutputError
from cellseg_batch.engine.inference.backends.protocol import Backend, flexible_form
from cellseg_batch.engine.inference.backends.registry import KINDS
from cellseg_batch.engine.inference.model_pool import Engines
from cellseg_batch.engine.run.completeness import demand_complete
from cellseg_batch.engine.run.measure_pass import measured_channels
from cellseg_batch.engine.run.memory_model import block_memory
from cellseg_batch.engine.run.open_slide import BLOCKS, output_images, scratch_of
from cellseg_batch.engine.run.output_paths import Place
from cellseg_batch.engine.run.pipeline import passes_of, totals
from cellseg_batch.engine.run.results import SlideReport
from cellseg_batch.engine.run.slide_plan import SlideJob, SlidePlan, adopt_manifest, plan_slide
from cellseg_batch.engine.run.worker import Worker
from cellseg_batch.engine.run.working_scale import settle_shrink, shrink_plan
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.slides.label_layout import lay_out
from cellseg_batch.engine.slides.reader import SlideReader
from cellseg_batch.engine.slides.slide import Slide
from cellseg_batch.engine.slides.writer import list_label
from cellseg_batch.engine.storage.journal import Journal, sweep_partials


@dataclass(frozen=True)
class Request:
    """A slide, and where its output goes."""

    slide: Slide
    place: Place


def prepare_slide(worker: Worker, request: Request) -> SlideJob | SlideReport:
    """Settle all that decides a slide's pixels and make its output; a report if it was finished before.

    Raises:
        SlideError: it cannot be processed as asked.
    """
    slide, place, settings, engines = request.slide, request.place, worker.settings, worker.engines
    journal = Journal(place.journal)
    begun = _begun(place, settings, journal)
    plan = plan_slide(slide, place, settings, engines.bundle.card, begun)
    if begun is not None:
        factor, finished = settings.shrink or int(begun["shrink"]), journal.finished()
        plan, backend = (
            shrink_plan(plan, settings, engines.bundle, factor),
            _backend_of(begun, settings, engines, factor),
        )
        plan = adopt_manifest(plan, begun, _manifest(plan, engines, backend), finished is not None)
        if finished is not None:
            return describe(plan, "skipped", finished, "finished before")
    reader = SlideReader(slide, plan.level.level, plan.channels.indices)
    try:
        if begun is None:
            factor = settle_shrink(plan, settings, engines, reader)
            plan = shrink_plan(plan, settings, engines.bundle, factor)
            backend = engines.shrunk(engines.chosen, factor)
            plan = replace(plan, trim=plan.trim and flexible_form(backend) is not None)
        ready = worker.warm_up(plan, backend, reader)
        job = _fit_memory(plan, backend, settings, worker.held, begun is not None)
        if begun is None:
            _create_outputs(job.plan, engines, backend, journal)
        else:
            for folder in (journal.folder, *place.folders(plan.probability)):
                sweep_partials(folder)
            if _lacks_scratch(plan, journal):  # a label needs codes of other blocks too
                journal.start(begun)
                _create_scratch(plan, journal)
            job = replace(job, done=sum(plan.grid[index].box.area for index in journal.numbers(BLOCKS)))
    except BaseException:
        reader.close()
        raise
    worker.keep_open(job, reader, ready)
    return job


def finish_slide(worker: Worker, job: SlideJob) -> SlideReport:
    """List the label, after a look whether it is complete, and close the journal.

    Raises:
        OutputError: it is not.
    """
    place, journal = job.plan.place, Journal(job.plan.place.journal)
    with worker.opened(job) as slide:
        demand_complete(journal, [*slide.images], ((one.part, one.count) for one in passes_of(job.plan)))
    counts = totals(job.plan, journal)
    scratch, _ = scratch_of(job.plan)
    if scratch is not None:
        scratch.remove()
    list_label(place.store, place.labels.rpartition("/")[0], place.name, place.zarr_format)
    journal.finish(counts)
    return replace(describe(job.plan, "done", counts), pixels=job.plan.pixels - job.done)


def describe(plan: SlidePlan, status: str, counts: dict[str, int], reason: str = "") -> SlideReport:
    """The report of a slide whose blocks are all on disk.

    Args:
        plan: of the slide.
        status: done or skipped.
        counts: as `cellseg_batch.engine.run.pipeline.totals` has them.
        reason: why it was skipped.
    """
    slide, level = plan.slide, plan.level.level
    return SlideReport(
        path=slide.location,
        status=status,
        reason=reason,
        labels=str(plan.place.labels_folder),
        table=str(plan.place.objects) if plan.objects else None,
        shape=lay_out(slide, level, plan.grid, plan.place.zarr_format).shapes[0],
        level=level,
        pixel_size_um=plan.level.pixel_size_um,
        blocks=len(plan.grid),
        tiles=plan.tiles,
        foreground_fraction=counts["foreground"] / plan.pixels,
        missing_pixels=counts["missing"],
        skipped_tiles=counts["skipped_tiles"],
        objects=counts.get("objects"),
        unreached_pixels=counts.get("unreached", 0),
        shrink=plan.shrink,
        channels=slide.channel_names(plan.channels.indices),
        notes=(f"{counts['missing']} NaN pixels taken as 0",) if counts["missing"] else (),
    )


def _begun(place: Place, settings: Settings, journal: Journal) -> dict[str, Any] | None:
    """The manifest of this run's own earlier work, None when there is nothing to go on with.

    Raises:
        OutputError: something of that name is there and is not this run's own.
    """
    manifest = journal.manifest()
    folders = place.folders(settings.probability)
    there = [folder for folder in folders if folder.exists()]
    if settings.overwrite or not there:
        return None
    if manifest is None:
        raise OutputError(
            str(there[0]),
            expected="nothing of that name, or this run's own unfinished work",
            found="an image without a journal",
            cause="it was written by something else",
            remedy="choose another --name, or --overwrite to replace it",
        )
    # Begun with another --probability, other folders are there, and it is refused when the manifests are compared.
    as_begun = there == folders or manifest["probability"] != settings.probability
    return manifest if as_begun and journal.numbers("created") else None


def _backend_of(begun: dict[str, Any], settings: Settings, engines: Engines, factor: int) -> Backend:
    """The backend that an earlier run was begun with, as far as the user did not ask for another one."""
    chosen, used = engines.chosen, begun["backend"]
    return engines.backend(
        used["name"] if settings.backend == "auto" else chosen.name,
        used["precision"] if settings.precision == "auto" else chosen.precision,
        factor,
    )


def _manifest(plan: SlidePlan, engines: Engines, backend: Backend) -> dict[str, Any]:
    return plan.manifest(engines.bundle.shrunk(plan.shrink), backend)


def _create_outputs(plan: SlidePlan, engines: Engines, backend: Backend, journal: Journal) -> None:
    place, manifest = plan.place, _manifest(plan, engines, backend)
    # For whoever reads the journal alone, wherever it and the stores beside it may have been moved to together.
    passes = {one.part: one.count for one in passes_of(plan)}
    folders = {place.labels: place.labels_folder, place.probability: place.probability_folder}
    images = {path: os.path.relpath(str(folder), str(journal.folder)) for path, folder in folders.items()}
    journal.start({**manifest, "passes": passes, "images": images})
    provenance = {**manifest, "certificate": engines.certificate_of(backend)}
    labels, probability = output_images(plan)
    labels.create("mask" if plan.instances is None else "instances", place.source, provenance)
    if probability is not None:
        probability.create("probability", None, provenance)
    _create_scratch(plan, journal)


def _create_scratch(plan: SlidePlan, journal: Journal) -> None:
    """Make what lies between the passes, after all else that tasks find there."""
    for scratch in filter(None, scratch_of(plan)):
        scratch.create()
    journal.record("created", 0, {})


def _lacks_scratch(plan: SlidePlan, journal: Journal) -> bool:
    """Whether a task is left that needs the scratch and there is none, as it goes when a slide is finished."""
    scratch, _ = scratch_of(plan)
    left = chain.from_iterable(journal.missing(one.part, one.count) for one in passes_of(plan) if one.scratch)
    return scratch is not None and not scratch.exists() and next(left, None) is not None


def block_bytes(plan: SlidePlan, on_gpu: bool) -> int:
    """Bytes of host memory that a block of a slide holds at most."""
    channels = measured_channels(plan.slide) if plan.objects else plan.channels.indices
    return block_memory(
        plan.slide, plan.level.level, len(channels), plan.grid, plan.needs_probability, on_gpu, plan.frame
    )


def _fit_memory(plan: SlidePlan, backend: Backend, settings: Settings, held: int, resumed: bool) -> SlideJob:
    """The plan with blocks that stay under ``--max-memory`` beside ``held`` bytes; a resumed plan keeps its blocks.

    Raises:
        OutputError: not even one small block at a time does.
    """
    limit = settings.max_memory
    while True:
        block = block_bytes(plan, KINDS[backend.name].on_gpu)
        workers = settings.workers
        if limit is not None:
            workers = min(workers, max(1, (limit - held) // block))
        peak = held + workers * block
        if limit is None or peak <= limit:
            identity = backend.name, backend.precision, backend.version
            return SlideJob(plan, identity, block, limit and limit - held, workers, peak, done=0)
        rows, columns = plan.grid.cores
        if resumed or (rows, columns) == (1, 1):
            raise OutputError(
                plan.slide.location,
                expected=f"a run within --max-memory {limit / 1e6:.0f} MB",
                found=f"{held / 1e6:.0f} MB for the model and {block / 1e6:.0f} MB for one block",
                remedy="allow more memory, or use a smaller --tile",
            )
        plan = replace(plan, grid=replace(plan.grid, cores=(-(-rows // 2), -(-columns // 2))))
