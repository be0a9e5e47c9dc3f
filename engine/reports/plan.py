"""Estimate a run before it starts: blocks, bytes, files, memory, and time from a few seconds of measurement.

The measurement segments a few tiles of the largest slide into a temporary folder. Nothing is written beside the inputs.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from cellseg_batch.engine.backend_table import KNOWN_BACKENDS
from cellseg_batch.engine.errors import SlideError
from cellseg_batch.engine.geometry import BlockGrid, Box
from cellseg_batch.engine.inference.normalise import Bounds
from cellseg_batch.engine.models import load_model
from cellseg_batch.engine.objects.merge import FinalIds
from cellseg_batch.engine.run.campaign import run_images
from cellseg_batch.engine.run.lifecycle import block_bytes
from cellseg_batch.engine.run.measure_pass import measured_channels
from cellseg_batch.engine.run.open_slide import image_writers
from cellseg_batch.engine.run.output_paths import output_paths, refuse_output_inside
from cellseg_batch.engine.run.pipeline import passes_of
from cellseg_batch.engine.run.results import RunReport, SlideReport
from cellseg_batch.engine.run.slide_plan import SlidePlan, plan_slide
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.slides.discover import find_all_images
from cellseg_batch.engine.slides.label_layout import Layout
from cellseg_batch.engine.slides.plate import FieldChoice
from cellseg_batch.engine.slides.slide import Slide, UnreadableImage
from cellseg_batch.engine.storage.atomic_files import BUCKET
from cellseg_batch.trainer.bundle import Card

# Tiles along each side of the part that is measured.
_TILES = 2
_COUNTS = ("blocks", "tiles", "bytes_in", "bytes_out", "files")
# The merge writes each field of `FinalIds` as a file, in a folder of their own beside the folder of all scratch.
_FILES_OF_FINAL_IDS = len(FinalIds.__dataclass_fields__) + 2
# The note of a place's owner; below `output` the owner's two notes and their two folders.
_NOTES = 5
# Stages that run on other threads while the device is busy.
_BESIDE = ("read", "seeds", "growth", "measure", "write", "pyramid")


@dataclass(frozen=True)
class SlideEstimate:
    """Estimated cost of one image.

    Attributes:
        path: the image, as a user would type it.
        reason: why the image cannot be segmented; "" if it can.
        pixels: number of pixels to segment, over all planes.
        blocks, tiles: numbers of blocks and tiles.
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
        slides: one entry per image.
    """

    processes: int
    measured_mpx: float
    mpx_per_s: float
    backend: str
    precision: str
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


def estimate(inputs: list[Path], settings: Settings, processes: int, racing: Callable[[], None]) -> Estimate:
    """Estimate a run of ``settings`` over every image below ``inputs``.

    Args:
        inputs: files, zarr stores or folders of them.
        settings: settings of the run.
        processes: number of worker processes that share the work.
        racing: called before backends are raced, which happens once for a model and machine.

    Raises:
        UsageError: nothing can be run as asked.
    """
    refuse_output_inside(settings.output, inputs)
    card = load_model(settings.model).card
    choice = FieldChoice(settings.wells, settings.fields)
    images = find_all_images(inputs, settings.axes, choice)
    entries = [_lay(image, settings, card) for image in images]
    run_estimate = Estimate(processes, 0.0, 0.0, "", "", [entry for entry, _ in entries])
    plans = [plan for _, plan in entries if plan is not None]
    if not plans:
        return run_estimate
    largest = max(plans, key=lambda plan: plan.pixels)
    report, sample = _measure(largest, settings, racing)
    run_estimate = replace(run_estimate, backend=report.backend, precision=report.precision)
    if sample is None or report.status == "failed":
        reason = f"a sample of it could not be segmented: {report.slides[0].reason}"
        slides = [replace(entry, reason=reason) if plan is largest else entry for entry, plan in entries]
        return replace(run_estimate, slides=slides)
    per_pixel = _seconds_per_pixel(report, settings.workers)
    on_gpu = KNOWN_BACKENDS[report.backend].on_gpu
    if on_gpu:  # the blocks above were laid before the backend was known
        entries = [_with_blocks(entry, plan, settings.block_side(on_gpu)) for entry, plan in entries]
    base_bytes = report.planned_peak_bytes - report.workers * block_bytes(sample, on_gpu)
    slides = [
        entry if plan is None else _weigh(entry, plan, settings, per_pixel, base_bytes, report)
        for entry, plan in entries
    ]
    return replace(run_estimate, measured_mpx=sample.pixels / 1e6, mpx_per_s=1e-6 / per_pixel, slides=slides)


def _lay(image: Slide | UnreadableImage, settings: Settings, card: Card) -> tuple[SlideEstimate, SlidePlan | None]:
    """Estimate and plan of an image from its metadata alone; no plan if the image cannot be segmented."""
    if isinstance(image, UnreadableImage):
        return SlideEstimate(image.path, image.reason), None
    try:
        paths = output_paths(image, settings.name, settings.output)
        # The bounds decide no figure here, and sampling them would take long for many slides.
        plan = plan_slide(image, paths, settings, card, Bounds(0.0, 1.0))
    except SlideError as error:
        return SlideEstimate(image.location, error.detail), None
    return _count(plan), plan


def _with_blocks(entry: SlideEstimate, plan: SlidePlan | None, side: int) -> tuple[SlideEstimate, SlidePlan | None]:
    """Estimate and plan of an image with blocks of about ``side`` px; unchanged without a plan."""
    if plan is None:
        return entry, None
    plan = plan.with_blocks(side)
    return _count(plan), plan


def _count(plan: SlidePlan) -> SlideEstimate:
    """Estimate of a slide from its plan alone: pixels, blocks, bytes and files."""
    layouts = [writer.layout for writer in image_writers(plan).values()]
    pixels = sum(math.prod(shape) for shape in layouts[0].shapes)
    return SlideEstimate(
        path=plan.slide.location,
        pixels=plan.pixels,
        blocks=len(plan.grid),
        tiles=plan.tiles,
        bytes_in=values_read(plan) * np.dtype(plan.slide.dtype).itemsize,
        bytes_out=pixels * sum(np.dtype(layout.dtype).itemsize for layout in layouts),
        files=sum(map(most_files, layouts))
        + most_records([slide_pass.count for slide_pass in passes_of(plan)])
        + most_scratch_files(plan),
    )


def values_read(plan: SlidePlan) -> int:
    """Number of values to read, over all channels: to segment, and to measure objects.

    Measuring also reads a few px around each block; these are not counted.
    """
    measured = len(measured_channels(plan.slide)) * plan.pixels if plan.objects else 0
    return pixels_read(plan.grid) * len(plan.channels.indices) + measured


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

    These are the codes and, if objects are measured, probability and moments.
    """
    if plan.instances is None:
        return 0
    blocks = len(plan.grid)
    kinds = 3 if plan.objects else 1  # codes; probability and moments
    return kinds * (blocks + -(-blocks // BUCKET) + 2) + _FILES_OF_FINAL_IDS


def _measure(plan: SlidePlan, settings: Settings, racing: Callable[[], None]) -> tuple[RunReport, SlidePlan | None]:
    """Segment a few tiles from the middle of a slide.

    Returns:
        The report of that run, and its plan; None if the run failed before it had a plan.
    """
    lattice = plan.grid.lattice
    height, width = (min(_TILES * core, length) for core, length in zip(lattice.core, lattice.shape, strict=True))
    y, x = (lattice.shape[0] - height) // 2, (lattice.shape[1] - width) // 2
    part = plan.slide.first_plane().cropped(plan.level.level, Box(y, x, y + height, x + width))
    sample = _Sample(racing)
    with tempfile.TemporaryDirectory(prefix="cellseg-plan-") as folder:
        sample_settings = replace(settings, output=Path(folder), level=plan.level.level, overwrite=False)
        report = run_images([part], sample_settings, sample)
    return report, sample.plan


class _Sample:
    """Observer of the measurement that keeps its plan."""

    def __init__(self, racing: Callable[[], None]) -> None:
        self.racing = racing
        self.plan: SlidePlan | None = None

    def found(self, images: int) -> None:
        """Ignored: the measurement has a single image."""

    def planned(self, plan: SlidePlan, peak_bytes: int, number: int, done: float) -> None:
        """Keep the plan."""
        self.plan = plan

    def advanced(self, pixels: float) -> None:
        """Ignored: the measurement is short."""

    def ended(self, report: SlideReport) -> None:
        """Ignored: the report of the run holds everything."""


def _seconds_per_pixel(report: RunReport, workers: int) -> float:
    """Seconds per pixel of a long run.

    The device works all the time, unless reading and writing on the other threads take longer.
    """
    beside = sum(report.stages[stage] for stage in _BESIDE)
    device = sum(report.stages.values()) - beside
    return max(device, (device + beside) / workers) / report.slides[0].pixels


def _weigh(
    entry: SlideEstimate, plan: SlidePlan, settings: Settings, per_pixel: float, base_bytes: int, measured: RunReport
) -> SlideEstimate:
    """Add memory and time to an estimate; it is refused if it fits neither ``max_memory`` nor this machine.

    Args:
        entry: estimate from the metadata alone.
        plan: plan of the slide.
        settings: settings of the run.
        per_pixel: seconds per pixel.
        base_bytes: host memory of a worker process without its blocks.
        measured: report of the measurement.
    """
    on_gpu = KNOWN_BACKENDS[measured.backend].on_gpu
    peak = base_bytes + settings.workers * block_bytes(plan, on_gpu)
    if settings.max_memory is not None:
        # A run keeps to the limit by taking fewer and smaller blocks, down to one tile at a time.
        least = base_bytes + block_bytes(replace(plan, grid=replace(plan.grid, cores=(1, 1))), on_gpu)
        peak = max(least, min(peak, settings.max_memory))
    limit = settings.max_memory or psutil.virtual_memory().total
    reason = ""
    if peak > limit:
        reason = (
            f"expected at most {limit} bytes of memory, found {peak} for one worker; use a smaller `block` or `tile`"
        )
    objects = measured.slides[0].objects
    if objects is not None:
        objects = round(objects * plan.pixels / measured.slides[0].pixels)
    return replace(entry, objects=objects, peak_bytes=peak, seconds=per_pixel * plan.pixels, reason=reason)
