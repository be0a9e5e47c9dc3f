"""Prepare a slide before its first block, and finish it after its last one.

Preparing checks for earlier work, plans the slide and creates its outputs; finishing writes the closing record.  Both
are tasks for any worker, as blocks are.  A run that continues the output of an earlier run must make the same decisions
on its pixels, or is refused with the difference: another machine, another model or other settings cannot change a
half-finished output.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from itertools import chain

from cellseg_batch.engine.backend_table import KNOWN_BACKENDS
from cellseg_batch.engine.errors import OutputError
from cellseg_batch.engine.inference.backends.protocol import Backend
from cellseg_batch.engine.inference.model_pool import ModelPool
from cellseg_batch.engine.inference.normalise import settle_bounds
from cellseg_batch.engine.inference.tissue import Tissue
from cellseg_batch.engine.run.completeness import demand_complete
from cellseg_batch.engine.run.input_state import files_state, has_changed
from cellseg_batch.engine.run.measure_pass import measured_channels
from cellseg_batch.engine.run.memory_model import block_memory, star_memory
from cellseg_batch.engine.run.open_slide import OpenSlide, scratch_of
from cellseg_batch.engine.run.output_images import CELLS, output_images
from cellseg_batch.engine.run.output_paths import OutputPaths, output_paths
from cellseg_batch.engine.run.pipeline import Pass, passes_of, totals
from cellseg_batch.engine.run.prepared_slide import PreparedSlide
from cellseg_batch.engine.run.records import (
    BLOCKS,
    BackendIdentity,
    Decisions,
    FinishedRecord,
    Manifest,
    ModelIdentity,
)
from cellseg_batch.engine.run.results import SlideReport
from cellseg_batch.engine.run.slide_plan import SlidePlan, open_reader, plan_slide
from cellseg_batch.engine.run.slide_tissue import settle_tissue, write_mask
from cellseg_batch.engine.run.worker import AnyWorker, Worker
from cellseg_batch.engine.run.working_scale import lay_tiles, settle_downscale
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.slides.pixel_meaning import TISSUE
from cellseg_batch.engine.slides.reader import SlideReader
from cellseg_batch.engine.slides.slide import Slide
from cellseg_batch.engine.slides.writer import list_label
from cellseg_batch.engine.storage.journal import Journal, sweep_partials
from cellseg_batch.engine.storage.records import plain
from cellseg_batch.trainer.bundle import Bundle
from cellseg_batch.trainer.card import Card

# A limit leaves room for the idle networks of other slides if it is so many times what a run needs with those so far.
_ROOM = 2


@dataclass(frozen=True)
class Request:
    """A slide to prepare, and the paths of its output."""

    slide: Slide
    paths: OutputPaths


def prepare_slide(worker: AnyWorker, request: Request) -> PreparedSlide | SlideReport:
    """Settle all decisions on a slide's pixels and create its output; call it with the lock of the output.

    Returns:
        The prepared slide, or the report of a slide that was finished before.

    Raises:
        SlideError: the slide cannot be processed with these settings.
    """
    own_worker, journal = worker.here(), Journal(request.paths.journal)
    settings, bundle = own_worker.settings, own_worker.model_pool.bundle
    report = report_if_finished(settings, bundle, request)
    if report is not None:
        return report
    manifest = _manifest_to_continue(settings, bundle.card, request, journal)
    with own_worker.turn_to_prepare():
        if manifest is None:
            return _begin(own_worker, request)
        return _continue(own_worker, request, journal, manifest)


def look_for_finished(settings: Settings, bundle: Bundle, slide: Slide) -> SlideReport | None:
    """Do `report_if_finished` for a slide in the place that it has; no lock is needed."""
    return report_if_finished(settings, bundle, Request(slide, output_paths(slide, settings.name, settings.output)))


def report_if_finished(settings: Settings, bundle: Bundle, request: Request) -> SlideReport | None:
    """The report of a slide that an earlier run has finished; None if it is to be prepared.  Writes nothing.

    It needs no backend, as nothing is left to compute.

    Raises:
        SlideError: the slide has been finished with other settings, or lacks one of its output images.
    """
    journal = Journal(request.paths.journal)
    finished = None if settings.overwrite else journal.finished(FinishedRecord)
    manifest = None if finished is None else _manifest_to_continue(settings, bundle.card, request, journal)
    if finished is None or manifest is None:
        return None
    backend = _earlier_backend(manifest, settings)  # of the earlier version, which does not matter any more
    plan = _plan_again(settings, bundle, request, journal, manifest, backend)
    return describe(plan, "skipped", finished, "finished before")


def finish_slide(worker: AnyWorker, prepared: PreparedSlide) -> SlideReport:
    """Check that the output is complete, list it among the image's labels, and close the journal.

    Raises:
        OutputError: the output is incomplete.
    """
    plan = prepared.plan
    paths, journal = plan.paths, Journal(plan.paths.journal)
    with worker.here().slides.opened(plan, prepared.backend) as slide:
        demand_complete(journal, list(slide.images.values()), prepared.passes)
    figures = totals(plan, journal)
    for folder in scratch_of(plan).folders:
        folder.remove()
    for output in plan.outputs:
        if output.meaning.is_label:
            labels, _, name = output.path.rpartition("/")
            list_label(output.store, labels, name, paths.zarr_format)
    journal.finish(figures)
    return replace(describe(plan, "done", figures), pixels=plan.computed_pixels - prepared.pixels_done)


def describe(plan: SlidePlan, status: str, figures: FinishedRecord, reason: str = "") -> SlideReport:
    """The report of a slide whose blocks are all on disk.

    Args:
        plan: plan of the slide.
        status: done or skipped.
        figures: figures of the slide.
        reason: reason why the slide was skipped; "" if it was not.
    """
    slide, level = plan.slide, plan.level.level
    return SlideReport(
        path=slide.location,
        status=status,
        reason=reason,
        labels=str(plan.paths.labels_folder),
        table=str(plan.paths.table) if plan.objects else None,
        outputs={output.name: str(output.folder) for output in plan.outputs},
        shape=plan.layout.shapes[0],
        level=level,
        pixel_size_um=plan.level.pixel_size_um,
        blocks=len(plan.grid),
        tiles=plan.tiles,
        foreground_fraction=figures.foreground / plan.pixels,
        missing_pixels=figures.missing,
        skipped_tiles=figures.skipped_tiles,
        outside_tiles=figures.outside_tiles,
        expansion_px=None if plan.cells is None else plan.cells.distance,
        region_area=None if plan.region is None else plan.region.identity.area,
        tissue_area=None if plan.tissue is None else plan.tissue.area,
        objects=figures.objects,
        classes={one.name: one.pixels / plan.pixels for one in figures.classes},
        unreached_pixels=figures.unreached,
        downscale=plan.downscale,
        channels=slide.channel_names(plan.channels.indices),
        notes=figures.notes + plan.notes + plan.remarks_on_tissue,
    )


def _manifest_to_continue(settings: Settings, card: Card, request: Request, journal: Journal) -> Manifest | None:
    """The manifest of an earlier run with these output images; None if there is nothing to continue.

    Raises:
        OutputError: an image without a journal has the name of an output image, or a finished slide lacks an image.
    """
    outputs = output_images(request.paths, settings, card)
    present = [output.folder for output in outputs if output.folder.exists()]
    if settings.overwrite or not present:
        return None
    manifest = journal.manifest(Manifest)
    if manifest is None:
        raise OutputError(
            str(present[0]),
            expected="nothing of that name, or this run's own unfinished work",
            found="an image without a journal",
            cause="it was written by something else",
            remedy="choose another `name`, or `overwrite` to replace it",
        )
    if manifest.images.keys() != {output.path for output in outputs}:
        return manifest  # refused later, by the comparison of decisions
    if len(present) == len(outputs):
        # A block is only recorded after all outputs are made; before the first one there is nothing to continue.
        return manifest if journal.is_finished or journal.numbers(BLOCKS) else None
    if journal.is_finished:
        missing = next(output for output in outputs if output.folder not in present)
        raise OutputError(
            str(missing.folder),
            expected=f"the {missing.name} of a finished slide",
            found=f"no {missing.folder}",
            cause="it was removed",
            remedy="use another `name`, or `overwrite` to begin anew",
        )
    return None


def _begin(worker: Worker, request: Request) -> PreparedSlide:
    """Prepare a slide that has no output to continue."""
    settings, model_pool = worker.settings, worker.model_pool
    card = model_pool.bundle.card
    with _closed_on_error(open_reader(request.slide, settings, card)) as reader:
        bounds = settle_bounds(reader, card.input.normalisation)
        plan = plan_slide(request.slide, request.paths, settings, card, bounds)
        _refuse_images_of_another(plan)
        tissue = settle_tissue(reader, settings)
        plan = compile_plan(worker, plan, settle_downscale(plan, settings, model_pool, reader), reader, tissue)
        backend = model_pool.downscaled(model_pool.chosen, plan.downscale)
        prepared = _fit_run(worker, plan, backend, reader)
        with worker.slides.opened(prepared.plan, prepared.backend, reader) as open_slide:
            _create_outputs(open_slide, prepared, model_pool, backend)
            if TISSUE.name in open_slide.images:
                write_mask(open_slide.images[TISSUE.name], tissue)
    return prepared


def compile_plan(worker: Worker, plan: SlidePlan, factor: int, reader: SlideReader, tissue: Tissue | None) -> SlidePlan:
    """Lay a slide's tiles and blocks for images downscaled by ``factor``, and compile its network and kernels.

    The worker's ``warm_up`` notes the memory that they take.
    """
    settings, model_pool = worker.settings, worker.model_pool
    backend = model_pool.downscaled(model_pool.chosen, factor)
    plan = lay_tiles(plan, settings, model_pool.bundle, factor, backend.name, tissue)
    plan = plan.with_blocks(settings.block_side(backend.name)).with_region(settings).with_tissue(tissue)
    worker.warm_up.compile_for(plan, backend, reader)
    return plan


def _plan_again(
    settings: Settings, bundle: Bundle, request: Request, journal: Journal, manifest: Manifest, backend: BackendIdentity
) -> SlidePlan:
    """The plan of a slide that an earlier run has begun, and that ``backend`` computes.

    Raises:
        SlideError: the image or the settings have changed.
    """
    earlier = manifest.decisions
    _refuse_changed_image(request.slide, manifest, journal)
    plan = plan_slide(request.slide, request.paths, settings, bundle.card, earlier.normalisation)
    plan = lay_tiles(plan, settings, bundle, _earlier_downscale(manifest, settings), backend.name)
    if settings.skips_background and earlier.tissue_tiles is not None:
        plan = replace(plan, tissue=earlier.tissue_tiles)
        if settings.tile is None:  # the lattice was chosen by the tissue
            plan = plan.with_cores(earlier.lattice.core)
    plan = plan.with_region(settings)
    _refuse_changes(plan, earlier, plan.decisions(_identity_of_model(bundle), backend))
    return replace(plan, grid=replace(plan.grid, cores=manifest.blocks))


def _continue(worker: Worker, request: Request, journal: Journal, manifest: Manifest) -> PreparedSlide:
    """Prepare a slide that an earlier run has begun and not finished."""
    settings, model_pool = worker.settings, worker.model_pool
    earlier = _earlier_backend(manifest, settings)
    backend = model_pool.backend(earlier.name, earlier.precision, _earlier_downscale(manifest, settings))
    plan = _plan_again(settings, model_pool.bundle, request, journal, manifest, _identity_of(backend))
    with _closed_on_error(SlideReader(plan.slide, plan.level.level, plan.channels.indices)) as reader:
        worker.warm_up.compile_for(plan, backend, reader)
        prepared = _fit_run(worker, plan, backend, reader, keeps_blocks=True)
        for folder in (journal.folder, *(output.folder for output in plan.outputs)):
            sweep_partials(folder)
        # Labels need codes of other blocks too, so without scratch all blocks are computed again.
        if _lacks_scratch(plan, prepared.passes, journal):
            journal.start(manifest)
            _create_scratch(plan)
        blocks_done = (plan.computed(plan.grid[index]) for index in journal.numbers(BLOCKS))
        pixels_done = sum(tile.core.within(block.box).area for block in blocks_done for tile in block.tiles)
        tasks_done = ((slide_pass, len(journal.numbers(slide_pass.name))) for slide_pass in prepared.passes)
        progress_done = sum(prepared.progress_of(slide_pass, tasks) for slide_pass, tasks in tasks_done)
        prepared = replace(prepared, pixels_done=pixels_done, progress_done=progress_done)
        with worker.slides.opened(plan, prepared.backend, reader):
            pass  # its first task finds it open
    return prepared


@contextmanager
def _closed_on_error(reader: SlideReader) -> Iterator[SlideReader]:
    """Close a reader if the context ends with an error."""
    try:
        yield reader
    except BaseException:
        reader.close()
        raise


def _earlier_backend(manifest: Manifest, settings: Settings) -> BackendIdentity:
    """The backend and precision of an earlier run, unless the user asks for others."""
    earlier = manifest.decisions.backend
    return replace(
        earlier,
        name=earlier.name if settings.backend == "auto" else settings.backend,
        precision=earlier.precision if settings.precision == "auto" else settings.precision,
    )


def _earlier_downscale(manifest: Manifest, settings: Settings) -> int:
    """The factor by which an earlier run downscaled a slide, unless the user asks for another."""
    return settings.downscale or manifest.decisions.downscale


def _identity_of(backend: Backend) -> BackendIdentity:
    return BackendIdentity(backend.name, backend.precision, backend.version)


def _identity_of_model(bundle: Bundle) -> ModelIdentity:
    return ModelIdentity(bundle.card.name, bundle.sha256)


def _refuse_changes(plan: SlidePlan, earlier: Decisions, decisions: Decisions) -> None:
    """Refuse to continue an earlier run with decisions that give other pixels.

    Raises:
        OutputError: the decisions differ.
    """
    if changes := earlier.changes(decisions):
        raise OutputError(
            str(plan.paths.labels_folder),
            expected="the settings that these labels were begun with",
            found="; ".join(changes),
            remedy="use the same settings, another `name`, or `overwrite` to begin anew",
        )


def _refuse_changed_image(slide: Slide, manifest: Manifest, journal: Journal) -> None:
    """Refuse to continue an earlier run, or to call it finished, if the image has other pixels now.

    Raises:
        OutputError: the pixels differ.
        ReadError: they cannot be read.
    """
    if has_changed(slide, journal, manifest):
        begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(journal.begun()))
        raise OutputError(
            slide.location,
            expected="the pixels that its labels were made of",
            found="others",
            cause=f"it has changed since {begun}",
            remedy="use `overwrite` to segment it as it is now",
        )


def _refuse_images_of_another(plan: SlidePlan) -> None:
    """Refuse to write cells or tissue over the labels of a run of that name, or labels over another run's of these.

    Raises:
        OutputError: there is such a run.
    """
    paths = plan.paths
    for output in plan.outputs[1:]:
        other = paths.journal.with_name(output.folder.name)
        if output.store == paths.store and Journal(other).is_begun:
            raise OutputError(
                str(output.folder),
                expected=f"no labels of another run in the place of the {output.name}",
                found=f"those of the run `name={other.name}`",
                remedy="choose another `name`",
            )
    for kind in (CELLS, TISSUE.name):
        other = paths.journal.with_name(paths.name.removesuffix(f"_{kind}"))
        if other.name == paths.name or not other.name or not Journal(other).is_begun:
            continue
        manifest = Journal(other).manifest(Manifest)
        if manifest is not None and paths.labels in manifest.images:
            raise OutputError(
                str(paths.labels_folder),
                expected="nothing of another run in the place of the labels",
                found=f"the {kind} of the run `name={other.name}`",
                remedy="choose another `name`",
            )


def _create_outputs(slide: OpenSlide, prepared: PreparedSlide, model_pool: ModelPool, backend: Backend) -> None:
    """Begin the journal with a manifest, and create the output images and the scratch."""
    plan, journal = slide.plan, slide.journal
    # Relative paths, so that the journal leads to its images even after both were moved together.
    images = {output.path: os.path.relpath(str(output.folder), str(journal.folder)) for output in plan.outputs}
    manifest = Manifest(
        decisions=plan.decisions(_identity_of_model(model_pool.bundle), prepared.backend),
        blocks=plan.grid.cores,
        passes={slide_pass.name: slide_pass.count for slide_pass in prepared.passes},
        images=images,
        location=plan.slide.location,
        mask="" if plan.region is None else str(plan.region.path),
        software=_software(),
        input_files=files_state(plan.slide, plan.level.level),
    )
    journal.start(manifest)
    provenance = {
        "location": manifest.location,
        **plain(manifest.decisions),
        "software": manifest.software,
        "race_result": model_pool.race_result_of(backend),
    }
    for output in plan.outputs:
        slide.images[output.name].create(output.meaning, output.source, provenance)
    _create_scratch(plan)


def _create_scratch(plan: SlidePlan) -> None:
    """Create the scratch."""
    for folder in scratch_of(plan).folders:
        folder.create()


def _lacks_scratch(plan: SlidePlan, passes: tuple[Pass, ...], journal: Journal) -> bool:
    """Whether a missing task needs the scratch although there is none: it is deleted once a slide is finished."""
    folders = scratch_of(plan).folders
    scratch_passes = (slide_pass for slide_pass in passes if slide_pass.scratch)
    missing = chain.from_iterable(journal.missing(slide_pass.name, slide_pass.count) for slide_pass in scratch_passes)
    return bool(folders) and not folders[0].exists() and next(missing, None) is not None


def _block_bytes(plan: SlidePlan, on_gpu: bool) -> int:
    """Bytes of host memory that a block of a slide holds at most."""
    channels = measured_channels(plan.slide) if plan.objects else plan.channels.indices
    read = max(channels) - min(channels) + 1
    held = read if read == len(channels) else read + len(channels)  # others between them are read, and left out
    images = plan.images_of_bytes + (plan.region is not None)
    stars = 0 if plan.stars is None else star_memory(plan.grid, plan.stars, plan.threshold, on_gpu)
    return stars + block_memory(plan.slide, plan.level.level, held, plan.grid, images, on_gpu, plan.frame, plan.spread)


def _fit_run(
    worker: Worker, plan: SlidePlan, backend: Backend, reader: SlideReader, keeps_blocks: bool = False
) -> PreparedSlide:
    """Fit the blocks of a slide as `fit_memory` does; if there is little room, with no network beside the slide's own.

    What a slide may have then does not depend on those before it.
    """
    settings, held_bytes = worker.settings, worker.warm_up.held_bytes
    free = fit_memory(plan, backend, replace(settings, max_memory=None), held_bytes)
    limit = settings.max_memory
    if limit is None or KNOWN_BACKENDS[backend.name].on_gpu or _ROOM * free.peak_bytes <= limit:
        return fit_memory(plan, backend, settings, held_bytes, keeps_blocks)
    worker.take_turns()
    held_bytes = worker.warm_up.held_by(plan, backend, reader)
    return replace(fit_memory(plan, backend, settings, held_bytes, keeps_blocks), takes_turns=True)


def fit_memory(
    plan: SlidePlan, backend: Backend, settings: Settings, held_bytes: int, keeps_blocks: bool = False
) -> PreparedSlide:
    """Halve the blocks of a slide until a run stays under the setting `max_memory`.

    Args:
        plan: plan of the slide.
        backend: backend that computes it.
        settings: settings of the run.
        held_bytes: host memory in bytes that the process holds besides blocks.
        keeps_blocks: whether the blocks must stay as they are.

    Raises:
        OutputError: even one block at a time, as small as allowed, needs more memory.
    """
    limit = settings.max_memory
    while True:
        bytes_of_block = _block_bytes(plan, KNOWN_BACKENDS[backend.name].on_gpu)
        workers = settings.workers
        if limit is not None:
            workers = min(workers, max(1, (limit - held_bytes) // bytes_of_block))
        peak_bytes = held_bytes + workers * bytes_of_block
        if limit is None or peak_bytes <= limit:
            budget = None if limit is None else limit - held_bytes
            passes, identity = tuple(passes_of(plan)), _identity_of(backend)
            return PreparedSlide(plan, identity, passes, bytes_of_block, budget, workers, peak_bytes)
        rows, columns = plan.grid.cores
        if keeps_blocks or (rows, columns) == (1, 1):
            raise OutputError(
                plan.slide.location,
                expected=f"a run within `max_memory` of {limit / 1e6:.0f} MB",
                found=f"{held_bytes / 1e6:.0f} MB for the model and {bytes_of_block / 1e6:.0f} MB for one block",
                remedy="allow more memory, or use a smaller `tile`" + (" or less of `expand`" if plan.spread else ""),
            )
        plan = replace(plan, grid=replace(plan.grid, cores=(-(-rows // 2), -(-columns // 2))))


@cache
def _software() -> dict[str, str]:
    """Versions of packages for the manifest, by name."""
    return {name: version(name) for name in ("cellseg-batch", "zarr", "numpy")}
