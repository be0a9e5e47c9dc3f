"""What a run would take, before it starts: blocks, bytes, files, memory, and time from a few seconds of measurement.

Nothing is written beside the inputs: the measurement segments a few tiles of the largest slide into a temporary folder.
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
from cellseg_batch.engine.run.campaign import run_images
from cellseg_batch.engine.run.lifecycle import block_bytes
from cellseg_batch.engine.run.open_slide import output_images
from cellseg_batch.engine.run.output_paths import output_paths, refuse_output_inside
from cellseg_batch.engine.run.pipeline import passes_of
from cellseg_batch.engine.run.results import RunReport, SlideReport
from cellseg_batch.engine.run.slide_plan import SlidePlan, plan_slide
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.slides.discover import find_images
from cellseg_batch.engine.slides.label_layout import Layout
from cellseg_batch.engine.slides.slide import Slide, UnreadableImage
from cellseg_batch.engine.storage.atomic_files import BUCKET
from cellseg_batch.trainer.bundle import Card

# Tiles along a side of what is measured.
_TILES = 2
_COUNTS = ("blocks", "tiles", "bytes_in", "bytes_out", "files")
# Stages that other threads work on while the device is busy.
_BESIDE = ("read", "seeds", "growth", "measure", "write", "pyramid")


@dataclass(frozen=True)
class SlideEstimate:
    """What one image would take.

    Attributes:
        path: the image, as a user would type it.
        reason: why it cannot be segmented, "" if it can.
        pixels: of all planes that are segmented.
        blocks, tiles: how many.
        bytes_in: decoded pixels that are read, halos included.
        bytes_out: of the outputs before compression, pyramid included.
        files: at most so many files and folders come into being.
        peak_bytes: host memory of a worker process; 0 when nothing could be measured.
        seconds: by the measured rate, on one worker process.
    """

    path: str
    reason: str = ""
    pixels: int = 0
    blocks: int = 0
    tiles: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    files: int = 0
    peak_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """What a run would take.

    Attributes:
        processes: worker processes, each like this one.
        measured_mpx: Mpx that the measurement segmented.
        mpx_per_s: rate of one process.
        backend, precision: that would be used.
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
        """Of the whole run; a process that waits for the last block of another is not counted."""
        return sum(slide.seconds for slide in self.slides) / self.processes

    @property
    def peak_bytes(self) -> int:
        """Host memory of a worker process at most."""
        return max((slide.peak_bytes for slide in self.slides), default=0)

    def total(self, name: str) -> int:
        """Sum of a count over all images."""
        return sum(getattr(slide, name) for slide in self.slides)

    def to_json(self) -> dict[str, Any]:
        """The estimate as plain JSON values."""
        content = asdict(self)
        slides = content.pop("slides")
        totals = {name: self.total(name) for name in ("pixels", *_COUNTS)}
        whole = {"images": len(self.slides), "refused": len(self.refused), "seconds": self.seconds}
        return {**whole, **totals, "peak_bytes": self.peak_bytes, **content, "slides": slides}


def estimate(inputs: list[Path], settings: Settings, processes: int, racing: Callable[[], None]) -> Estimate:
    """Estimate a run of ``settings`` over every image below ``inputs``.

    Args:
        inputs: files, zarr stores or folders of them.
        settings: of the run.
        processes: worker processes that share the work.
        racing: told when backends are raced, which happens once for a model and machine.

    Raises:
        UsageError: nothing can be run as asked.
    """
    refuse_output_inside(settings.output, inputs)
    card = load_model(settings.model).card
    entries = [_lay(image, settings, card) for path in inputs for image in find_images(path, settings.axes)]
    whole = Estimate(processes, 0.0, 0.0, "", "", [one for one, _ in entries])
    plans = [plan for _, plan in entries if plan is not None]
    if not plans:
        return whole
    largest = max(plans, key=lambda plan: plan.pixels)
    report, sample = _measure(largest, settings, racing)
    whole = replace(whole, backend=report.backend, precision=report.precision)
    if sample is None or report.status == "failed":
        reason = f"a sample of it could not be segmented: {report.slides[0].reason}"
        return replace(whole, slides=[replace(one, reason=reason) if plan is largest else one for one, plan in entries])
    per_pixel = _seconds_per_pixel(report, settings.workers)
    on_gpu = KNOWN_BACKENDS[report.backend].on_gpu
    held = report.planned_peak_bytes - report.workers * block_bytes(sample, on_gpu)
    slides = [one if plan is None else _weigh(one, plan, settings, per_pixel, held, report) for one, plan in entries]
    return replace(whole, measured_mpx=sample.pixels / 1e6, mpx_per_s=1e-6 / per_pixel, slides=slides)


def _lay(image: Slide | UnreadableImage, settings: Settings, card: Card) -> tuple[SlideEstimate, SlidePlan | None]:
    """What can be said of an image without its pixels."""
    if isinstance(image, UnreadableImage):
        return SlideEstimate(image.path, image.reason), None
    try:
        paths = output_paths(image, settings.name, settings.output)
        # The bounds decide no figure here, and to sample them would take long for many slides.
        plan = plan_slide(image, paths, settings, card, Bounds(0.0, 1.0))
    except SlideError as error:
        return SlideEstimate(image.location, error.detail), None
    layouts = [one.layout for one in output_images(plan) if one is not None]
    pixels = sum(math.prod(shape) for shape in layouts[0].shapes)
    entry = SlideEstimate(
        path=image.location,
        pixels=plan.pixels,
        blocks=len(plan.grid),
        tiles=plan.tiles,
        bytes_in=pixels_read(plan.grid) * len(plan.channels.indices) * np.dtype(image.dtype).itemsize,
        bytes_out=pixels * sum(np.dtype(layout.dtype).itemsize for layout in layouts),
        files=sum(map(most_files, layouts)) + most_records([one.count for one in passes_of(plan)]),
    )
    return entry, plan


def pixels_read(grid: BlockGrid) -> int:
    """Pixels of the read boxes of all blocks."""
    rows, columns = grid.grid
    heights = sum(grid[row * columns].read_box.shape[0] for row in range(rows))
    widths = sum(grid[column].read_box.shape[1] for column in range(columns))
    return heights * widths * grid.planes


def most_files(layout: Layout) -> int:
    """Files and folders of an output image, if there is foreground in each of its shards or chunks."""
    count = 0
    for level, shape in enumerate(layout.shapes):
        chunks, shards = layout.storage(level)
        sides = shards if layout.zarr_format == 3 else chunks
        grid = [-(-length // side) for length, side in zip(shape, sides, strict=True)]
        # A folder for each index but the last; the array's own, its metadata, and the folder of its chunks.
        count += math.prod(grid) + sum(math.prod(grid[:axis]) for axis in range(1, len(grid))) + 3
    # The group, the group of all labels, and the store around them where there is none yet.
    return count + 9


def most_records(counts: list[int]) -> int:
    """Files and folders of a journal whose parts have so many records."""
    return sum(count + -(-count // BUCKET) + 1 for count in counts) + 12


def _measure(plan: SlidePlan, settings: Settings, racing: Callable[[], None]) -> tuple[RunReport, SlidePlan | None]:
    """Segment a few tiles from the middle of a slide; the report and the plan of that run, if it came to one."""
    lattice = plan.grid.lattice
    height, width = (min(_TILES * core, length) for core, length in zip(lattice.core, lattice.shape, strict=True))
    y, x = (lattice.shape[0] - height) // 2, (lattice.shape[1] - width) // 2
    part = plan.slide.first_plane().cropped(plan.level.level, Box(y, x, y + height, x + width))
    sample = _Sample(racing)
    with tempfile.TemporaryDirectory(prefix="cellseg-plan-") as folder:
        asked = replace(settings, output=Path(folder), level=plan.level.level, overwrite=False)
        report = run_images([part], asked, sample)
    return report, sample.plan


class _Sample:
    """The observer of the measurement; it keeps its plan."""

    def __init__(self, racing: Callable[[], None]) -> None:
        self.racing = racing
        self.plan: SlidePlan | None = None

    def found(self, images: int) -> None:
        """It is one."""

    def planned(self, plan: SlidePlan, peak_bytes: int, number: int, done: float) -> None:
        """Keep the plan."""
        self.plan = plan

    def advanced(self, pixels: float) -> None:
        """It is over soon."""

    def ended(self, report: SlideReport) -> None:
        """The run's report says it all."""


def _seconds_per_pixel(report: RunReport, workers: int) -> float:
    """Of a long run: the device works all the time, unless reading and writing on the other threads take longer."""
    beside = sum(report.stages[stage] for stage in _BESIDE)
    device = sum(report.stages.values()) - beside
    return max(device, (device + beside) / workers) / report.slides[0].pixels


def _weigh(
    one: SlideEstimate, plan: SlidePlan, settings: Settings, per_pixel: float, held: int, measured: RunReport
) -> SlideEstimate:
    """The estimate with memory and time; refused if it fits neither ``max_memory`` nor this machine."""
    on_gpu = KNOWN_BACKENDS[measured.backend].on_gpu
    peak = held + settings.workers * block_bytes(plan, on_gpu)
    if settings.max_memory is not None:
        # A run keeps to it with fewer and smaller blocks, down to one tile at a time.
        least = held + block_bytes(replace(plan, grid=replace(plan.grid, cores=(1, 1))), on_gpu)
        peak = max(least, min(peak, settings.max_memory))
    limit = settings.max_memory or psutil.virtual_memory().total
    reason = ""
    if peak > limit:
        reason = (
            f"expected at most {limit} bytes of memory, found {peak} for one worker; use a smaller `block` or `tile`"
        )
    return replace(one, peak_bytes=peak, seconds=per_pixel * plan.pixels, reason=reason)
