"""Estimate a run before it starts: blocks, bytes, files, memory, and time from a few seconds of measurement.

Up to eight images, the largest, are looked at and their networks compiled as a run does.  The measurement segments a
few tiles of the largest image into a temporary folder.  Nothing is written beside the inputs.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil

from cellseg_batch.engine.errors import OutputError, SlideError
from cellseg_batch.engine.geometry import BlockGrid, Box
from cellseg_batch.engine.inference.model_pool import ModelPool
from cellseg_batch.engine.inference.normalise import Bounds, settle_bounds
from cellseg_batch.engine.machine import resident_bytes
from cellseg_batch.engine.models import load_model
from cellseg_batch.engine.objects.merge import FinalIds
from cellseg_batch.engine.run.campaign import Unheard, run_images
from cellseg_batch.engine.run.lifecycle import compile_plan, fit_memory
from cellseg_batch.engine.run.measure_pass import measured_channels
from cellseg_batch.engine.run.memory_model import RUN_OVERHEAD_BYTES
from cellseg_batch.engine.run.open_slide import image_writers, scratch_of
from cellseg_batch.engine.run.output_paths import output_paths
from cellseg_batch.engine.run.pipeline import passes_of
from cellseg_batch.engine.run.results import RunReport
from cellseg_batch.engine.run.run_images import find_run_images
from cellseg_batch.engine.run.slide_plan import SlidePlan, open_reader, plan_slide
from cellseg_batch.engine.run.slide_tissue import as_map, settle_tissue
from cellseg_batch.engine.run.worker import Worker
from cellseg_batch.engine.run.working_scale import lay_tiles, possible_downscales, settle_downscale
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.slides.label_layout import Layout
from cellseg_batch.engine.slides.reader import SlideReader
from cellseg_batch.engine.slides.slide import Slide, UnreadableImage
from cellseg_batch.engine.stage_clock import StageClock
from cellseg_batch.engine.storage.atomic_files import BUCKET
from cellseg_batch.trainer.card import Card

# Tiles along each side of the part that is measured.
_TILES = 2
# This many images, the largest, are looked at; each look takes up to a few seconds.
_MOST_LOOKS = 8
# Memory that a process holds in a run, as a multiple of what this one holds: threads with blocks of several images
# leave up to a tenth more behind.
_HELD = 1.1
_COUNTS = ("blocks", "tiles", "bytes_in", "bytes_out", "files")
# The merge writes each field of `FinalIds` as a file, in a folder of their own beside the folder of all scratch.
_FILES_OF_FINAL_IDS = len(FinalIds.__dataclass_fields__) + 2
# The note of a place's owner; below `output` the owner's two notes and their two folders.
_NOTES = 5
# Stages that run on other threads while the device is busy.
_BESIDE = ("read", "seeds", "growth", "suppress", "draw", "expand", "measure", "write", "pyramid")


@dataclass(frozen=True)
class SlideEstimate:
    """Estimated cost of one image.

    Attributes:
        path: the image, as a user would type it.
        reason: why the image cannot be segmented; "" if it can.
        pixels: number of pixels to segment, over all planes.
        blocks, tiles: numbers of blocks and of tiles to compute.
        tissue: share of the image that is not taken for glass; None if no glass is left out, or it was not looked at.
        bytes_in: bytes of decoded pixels to read, halos included.
        bytes_out: bytes of the outputs before compression, pyramid included.
        files: largest number of files and folders that the run makes, those between passes included.
        objects: number of objects, at the density of the measured part; None for a mask.
        peak_bytes: host memory of a worker process; 0 if nothing could be measured.
        seconds: time on one worker process, at the measured rate.
    """

    path: str
    reason: str = ""
    pixels: int = 0
    blocks: int = 0
    tiles: int = 0
    tissue: float | None = None
    bytes_in: int = 0
    bytes_out: int = 0
    files: int = 0
    objects: int | None = None
    peak_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """Estimated cost of a run.

    Attributes:
        processes: number of worker processes, each taken to be as fast as this process.
        measured_mpx: Mpx that the measurement segmented.
        mpx_per_s: rate of one process in Mpx/s.
        backend, precision: backend and precision that the run would use.
        unseen: number of images beyond the largest ones whose pixels were not looked at: their memory is that of the
            downscale that needs most, their other counts are those of no downscale.
        slides: one entry per image.
    """

    processes: int
    measured_mpx: float
    mpx_per_s: float
    backend: str
    precision: str
    unseen: int = 0
    slides: list[SlideEstimate] = field(default_factory=list)

    @property
    def refused(self) -> list[SlideEstimate]:
        """The images that cannot be segmented."""
        return [slide for slide in self.slides if slide.reason]

    @property
    def seconds(self) -> float:
        """Seconds of the whole run, not counting processes that wait for the last block of another."""
        return sum(slide.seconds for slide in self.slides) / self.processes

    @property
    def peak_bytes(self) -> int:
        """Largest host memory of a worker process."""
        return max((slide.peak_bytes for slide in self.slides), default=0)

    def total(self, name: str) -> int:
        """Sum of a count over all images."""
        return sum(getattr(slide, name) for slide in self.slides)

    def to_json(self) -> dict[str, Any]:
        """The estimate as plain JSON values."""
        content = asdict(self)
        slides = content.pop("slides")
        totals = {name: self.total(name) for name in ("pixels", *_COUNTS)}
        summary = {"images": len(self.slides), "refused": len(self.refused), "seconds": self.seconds}
        return {**summary, **totals, "peak_bytes": self.peak_bytes, **content, "slides": slides}


@dataclass(frozen=True)
class _Image:
    """An image with its estimate so far.

    Attributes:
        entry: the estimate.
        plans: the plans that a run may make of it: several if its downscale is unknown, none if it is refused.
    """

    entry: SlideEstimate
    plans: tuple[SlidePlan, ...] = ()


@dataclass(frozen=True)
class _Rate:
    """What segmenting a sample took.

    Attributes:
        pixels: number of pixels of the sample; 0 if there was none or it failed.
        seconds: seconds per pixel of a long run.
        objects: objects per pixel; None for a mask.
    """

    pixels: int = 0
    seconds: float = 0.0
    objects: float | None = None


def estimate(inputs: list[Path], settings: Settings, processes: int, say: Callable[[str], None]) -> Estimate:
    """Estimate a run of ``settings`` over every image below ``inputs``.

    Args:
        inputs: files, zarr stores or folders of them; none with a manifest.
        settings: settings of the run.
        processes: number of worker processes that share the work.
        say: told in a few words what is being done.

    Raises:
        UsageError: nothing can be run as asked.
    """
    bundle = load_model(settings.model)
    say("reading the metadata of the images")
    images = [_lay(image, settings, bundle.card) for image in find_run_images(inputs, settings, bundle.card)]
    if not any(image.plans for image in images):
        return Estimate(processes, 0.0, 0.0, "", "", slides=[image.entry for image in images])
    pixels = sum(image.entry.pixels for image in images)
    racing = partial(say, "choosing a backend for this model on this machine, once")
    worker = Worker(settings, ModelPool(bundle, settings, racing, pixels=pixels), StageClock())
    say("looking at windows of the largest images")
    # Below a limit, the figures are those of slides that take turns.
    in_use = settings.workers if settings.max_memory is None else 0
    with _Networks(worker.model_pool, in_use) as networks:
        images = _settle(worker, images, networks)
        largest = max(images, key=lambda image: image.entry.pixels if image.plans else -1)
        say("segmenting a sample to measure the rate")
        rate, reason = _measure(worker, largest.plans[0]) if largest.plans else (_Rate(), "")
        # The measurement loads what writes the outputs, which a run holds beside its later networks.
        held_bytes = round(_HELD * max(worker.warm_up.held_bytes, resident_bytes() + RUN_OVERHEAD_BYTES))
    if reason:
        refused = _Image(replace(largest.entry, reason=f"a sample of it could not be segmented: {reason}"))
        images = [refused if image is largest else image for image in images]
    return Estimate(
        processes=processes,
        measured_mpx=rate.pixels / 1e6,
        mpx_per_s=1e-6 / rate.seconds if rate.seconds else 0.0,
        backend=worker.model_pool.chosen.name,
        precision=worker.model_pool.chosen.precision,
        unseen=sum(len(image.plans) > 1 for image in images),
        slides=[_weigh(image, worker, held_bytes, rate) for image in images],
    )


def _lay(image: Slide | UnreadableImage, settings: Settings, card: Card) -> _Image:
    """Estimate and plan of an image from its metadata alone, as if it were not downscaled."""
    if isinstance(image, UnreadableImage):
        return _Image(SlideEstimate(image.path, image.reason))
    try:
        paths = output_paths(image, settings.name, settings.output)
        # The bounds decide no figure here, and sampling them would take long for many slides.
        plan = plan_slide(image, paths, settings, card, Bounds((0.0,), (1.0,))).with_region(settings)
    except SlideError as error:
        return _Image(SlideEstimate(image.location, error.detail))
    return _Image(_count(plan), (plan,))


class _Networks:
    """The networks that are in use at a time: in a run, those of as many images as there are blocks in flight.

    Args:
        model_pool: makes and keeps the networks.
        most: number of blocks in flight.
    """

    def __init__(self, model_pool: ModelPool, most: int) -> None:
        self._model_pool = model_pool
        self._most = most
        self._in_use: dict[tuple[Any, ...], ExitStack] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for network in self._in_use.values():
            network.close()

    def use(self, plan: SlidePlan) -> None:
        """Put the network of a plan to use, and if there are too many take the first one out of use."""
        backend = self._model_pool.downscaled(self._model_pool.chosen, plan.downscale)
        key = backend, plan.shape, plan.slide.dtype
        if key in self._in_use or self._model_pool.has_queue(backend):  # the networks of GPUs take no host memory
            return
        self._in_use[key] = ExitStack()
        self._in_use[key].enter_context(self._model_pool.in_use(*key))
        if len(self._in_use) > self._most:
            self._in_use.pop(next(iter(self._in_use))).close()


def _settle(worker: Worker, images: list[_Image], networks: _Networks) -> list[_Image]:
    """Settle the downscale of the largest images as a run does, and have the networks of all images compiled.

    Of any other image every plan that a run may make is kept.
    """
    by_pixels = sorted(range(len(images)), key=lambda number: -images[number].entry.pixels)
    looked_at = set(by_pixels[:_MOST_LOOKS])
    settled = list(images)
    unseen: dict[tuple[str, str, int], SlidePlan] = {}
    # As in a run that meets small tiles first: their networks stay while those of larger ones are compiled.
    numbers = [number for number, image in enumerate(images) if image.plans]
    for number in sorted(numbers, key=lambda number: math.prod(images[number].plans[0].shape)):
        if number in looked_at:
            settled[number] = _look(worker, images[number])
            for plan in settled[number].plans:
                networks.use(plan)
        else:
            settled[number] = _lay_every_downscale(worker, images[number])
            unseen |= {(plan.slide.dtype, plan.slide.axes, plan.downscale): plan for plan in settled[number].plans}
    for plan in unseen.values():  # the largest of each kind, as tiles grow
        with suppress(SlideError), SlideReader(plan.slide, plan.level.level, plan.channels.indices) as reader:
            networks.use(compile_plan(worker, plan, plan.downscale, reader, None))
    return settled


def _look(worker: Worker, image: _Image) -> _Image:
    """The image with the plan that a run makes, after a look at windows of it."""
    settings, model_pool = worker.settings, worker.model_pool
    try:
        laid = image.plans[0]
        card = model_pool.bundle.card
        with open_reader(laid.slide, settings, card) as reader:
            plan = plan_slide(laid.slide, laid.paths, settings, card, settle_bounds(reader, card.input.normalisation))
            factor = settle_downscale(plan, settings, model_pool, reader)
            plan = compile_plan(worker, plan, factor, reader, settle_tissue(reader, settings))
    except SlideError as error:
        return _Image(replace(image.entry, reason=error.detail))
    return _Image(image.entry, (plan,))


def _lay_every_downscale(worker: Worker, image: _Image) -> _Image:
    """The image with every plan that a run may make, without a look at its pixels."""
    settings, model_pool = worker.settings, worker.model_pool
    (plan,) = image.plans
    factors = possible_downscales(plan, settings, model_pool.bundle)
    name = model_pool.chosen.name
    plans = (lay_tiles(plan, settings, model_pool.bundle, factor, name) for factor in factors)
    side = settings.block_side(name)
    return _Image(image.entry, tuple(plan.with_blocks(side).with_region(settings) for plan in plans))


def _count(plan: SlidePlan) -> SlideEstimate:
    """Estimate of a slide from its plan alone: pixels, blocks, bytes and files."""
    layouts = [writer.layout for writer in image_writers(plan).values()]
    computed = plan.computed_tiles
    return SlideEstimate(
        path=plan.slide.location,
        pixels=plan.computed_pixels,
        blocks=len(plan.grid),
        tiles=plan.tiles if computed is None else int(computed.sum()) * plan.grid.planes,
        tissue=None if plan.tissue is None else plan.tissue.area / math.prod(plan.grid.lattice.shape),
        bytes_in=values_read(plan) * np.dtype(plan.slide.dtype).itemsize,
        bytes_out=sum(math.prod(shape) * np.dtype(one.dtype).itemsize for one in layouts for shape in one.shapes),
        files=sum(map(most_files, layouts))
        + most_records([slide_pass.count for slide_pass in passes_of(plan)])
        + most_scratch_files(plan),
    )


def values_read(plan: SlidePlan) -> int:
    """Number of values to read, over all channels: to segment, and to measure objects.

    Measuring also reads a few px around each block; these are not counted.
    """
    measured = len(measured_channels(plan.slide)) * plan.computed_pixels if plan.objects else 0
    if plan.computed_tiles is None:
        read = pixels_read(plan.grid)
    else:
        read = sum(block.read_box.area for block in plan.grid if plan.computed(block).tiles)
    return read * len(plan.channels.indices) + measured


def pixels_read(grid: BlockGrid) -> int:
    """Number of pixels in the read boxes of all blocks."""
    rows, columns = grid.grid
    heights = sum(grid[row * columns].read_box.shape[0] for row in range(rows))
    widths = sum(grid[column].read_box.shape[1] for column in range(columns))
    return heights * widths * grid.planes


def most_files(layout: Layout) -> int:
    """Number of files and folders of an output image with foreground in each of its shards or chunks."""
    count = 0
    for level, shape in enumerate(layout.shapes):
        chunks, shards = layout.storage(level)
        sides = shards if layout.zarr_format == 3 else chunks
        grid = [-(-length // side) for length, side in zip(shape, sides, strict=True)]
        # A folder for each index but the last. Three more: the array's folder, its metadata, the folder of its chunks.
        count += math.prod(grid) + sum(math.prod(grid[:axis]) for axis in range(1, len(grid))) + 3
    # The image's group, the group of all labels, and the store around them if the run makes it.
    return count + 9


def most_records(counts: list[int]) -> int:
    """Number of files and folders of a journal, from the number of records of each part; with notes on its place."""
    return sum(count + -(-count // BUCKET) + 1 for count in counts) + 12 + _NOTES


def most_scratch_files(plan: SlidePlan) -> int:
    """Number of scratch files and folders between the passes over a slide.

    These are the codes, or the stars and those that are objects, and, if objects are measured, probability, moments
    of nuclei and cells, and class codes.
    """
    if not plan.makes_ids:
        return 0
    blocks = len(plan.grid)
    # Neither moments nor the sums for a region have a folder of their own among them.
    moments = plan.objects * (1 + (plan.cells is not None))
    kinds = len(scratch_of(plan).folders) + moments + (plan.region is not None)
    return kinds * (blocks + -(-blocks // BUCKET) + 2) + _FILES_OF_FINAL_IDS + 2 * (plan.region is not None)


def _measure(worker: Worker, plan: SlidePlan) -> tuple[_Rate, str]:
    """Segment a few tiles from the middle of a slide, or of its tissue.

    Returns:
        The rate, and the reason if the tiles could not be segmented; else "".
    """
    lattice = plan.grid.lattice
    height, width = (min(_TILES * core, length) for core, length in zip(lattice.core, lattice.shape, strict=True))
    y, x = (lattice.shape[0] - height) // 2, (lattice.shape[1] - width) // 2
    if plan.tissue is not None:
        shown = np.argwhere(as_map(plan.tissue, lattice))
        core = lattice.tile_at(*shown[len(shown) // 2].tolist()).core
        y, x = min(core.y0, lattice.shape[0] - height), min(core.x0, lattice.shape[1] - width)
    part = plan.slide.first_plane().cropped(plan.level.level, Box(y, x, y + height, x + width))
    part = replace(part, asked=replace(part.asked, mask=None))
    settings = replace(
        worker.settings,
        level=plan.level.level,
        downscale=plan.downscale,
        max_memory=None,
        overwrite=False,
        mask=None,
        mask_class=None,
        tissue=False,
    )
    if plan.tissue is not None:  # tiles as large as those of the slide, and all of them
        settings = replace(settings, skip_background="off", tile=math.isqrt(math.prod(lattice.tile)))
    with tempfile.TemporaryDirectory(prefix="cellseg-plan-") as folder:
        settings = replace(settings, output=Path(folder))
        report = run_images([part], settings, Unheard(), model_pool=worker.model_pool)
    (sample,) = report.slides
    if sample.status == "failed":
        return _Rate(), sample.reason
    objects = None if sample.objects is None else sample.objects / sample.pixels
    return _Rate(sample.pixels, _seconds_per_pixel(report, settings.workers), objects), ""


def _seconds_per_pixel(report: RunReport, workers: int) -> float:
    """Seconds per pixel of a long run.

    The device works all the time, unless reading and writing on the other threads take longer.
    """
    beside = sum(report.stages[stage] for stage in _BESIDE)
    device = sum(report.stages.values()) - beside
    return max(device, (device + beside) / workers) / report.slides[0].pixels


def _weigh(image: _Image, worker: Worker, held_bytes: int, rate: _Rate) -> SlideEstimate:
    """Complete the estimate of an image; it is refused if it fits neither ``max_memory`` nor this machine.

    Args:
        image: the image.
        worker: worker whose model pool has chosen the backend.
        held_bytes: host memory of a worker process without its blocks, if there is no limit.
        rate: what segmenting a sample took.
    """
    if not image.plans:
        return image.entry
    settings, chosen = worker.settings, worker.model_pool.chosen
    try:
        prepared = [
            fit_memory(plan, chosen, settings, worker.warm_up.held_for(plan) if settings.max_memory else held_bytes)
            for plan in image.plans
        ]
    except OutputError as error:
        return replace(image.entry, reason=error.detail)
    entry, memory = _count(prepared[0].plan), psutil.virtual_memory().total
    peak = max(slide.peak_bytes for slide in prepared)
    reason = ""
    if peak > memory:
        reason = (
            f"expected at most the {memory} bytes of memory of this machine, found {peak} for one worker; "
            "use a smaller `block` or `tile`"
        )
    plan = image.plans[0]
    inside = entry.pixels if plan.region is None else plan.region.identity.area * plan.grid.planes
    if plan.tissue is not None:
        inside = min(inside, plan.tissue.area * plan.grid.planes)
    objects = None if rate.objects is None else round(rate.objects * inside)
    return replace(entry, objects=objects, peak_bytes=peak, seconds=rate.seconds * entry.pixels, reason=reason)
