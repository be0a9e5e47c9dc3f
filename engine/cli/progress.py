"""Show the progress of a run: a line per slide and one progress bar with rate and time left."""

from __future__ import annotations

import math

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from cellseg_batch.engine.cli.console import as_flags, as_text, counted
from cellseg_batch.engine.cli.progress_bar import ProgressBar
from cellseg_batch.engine.run.results import EndedTask, SlideReport
from cellseg_batch.engine.run.slide_plan import SlidePlan

_FEW_IMAGES = 12


class _Rate(ProgressColumn):
    """Column of the progress bar with the rate in Mpx/s."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed / 1e6:.1f} Mpx/s", style="progress.data.speed")


class RunProgress(ProgressBar):
    """Observer of a run that shows it on a terminal; a context manager around the run.

    Args:
        console: console to print to.
        verbosity: -1 is silent, 0 describes the first few slides, 1 describes each slide.
    """

    def __init__(self, console: Console, verbosity: int) -> None:
        super().__init__(
            console,
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            _Rate(),
            TextColumn("left"),
            TimeRemainingColumn(),
            hidden=verbosity < 0,
        )
        self._verbosity = verbosity
        self._images = 0
        self._planned = 0
        self._planned_pixels = 0
        self._ended = 0

    def racing(self) -> None:
        """Print why the run takes a while to start."""
        if self._verbosity >= 0:
            self.console.print(
                "choosing a backend for this model on this machine, once: seconds, or minutes before a large run ...",
                highlight=False,
            )

    def found(self, images: int) -> None:
        """Note the number of images that will be processed."""
        self._images = images

    def planned(self, plan: SlidePlan, peak_bytes: int, number: int, done: float) -> None:
        """Describe a slide that is about to start, and extend the bar by it."""
        self._planned += 1
        self._planned_pixels += plan.pixels
        # Each image to come is taken to be as large as the mean of those so far.
        self._bar.update(self._task, total=self._planned_pixels * self._images / self._planned)
        self._bar.advance(self._task, done)
        if self._verbosity >= 1 or (self._verbosity == 0 and self._planned <= _FEW_IMAGES):
            self.console.print(as_text(describe(plan, peak_bytes)), soft_wrap=True)
        elif self._verbosity == 0 and self._planned == _FEW_IMAGES + 1:
            self.console.print("... (-v describes every image)")

    def advanced(self, task: EndedTask) -> None:
        """Move the bar by the pixels that are done."""
        self._bar.advance(self._task, task.pixels)

    def ended(self, report: SlideReport) -> None:
        """Count a slide that is done, failed, skipped or held."""
        self._ended += 1
        self._bar.update(self._task, description=f"{self._ended}/{self._images} images")
        if self._verbosity >= 1:
            reason = f" ({as_flags(report.reason)})" if report.reason else ""
            self.console.print(as_text(f"{report.status}: {report.path}{reason}"), soft_wrap=True)


def describe(plan: SlidePlan, peak_bytes: int) -> str:
    """Describe a plan in one line: size, level, channels, tiles and blocks, cost and peak memory."""
    lattice, level = plan.grid.lattice, plan.level
    size = f"{level.pixel_size_um:.3g} µm/px, " if level.pixel_size_um else ""
    planes = f"{plan.grid.planes} planes, each for itself, " if plan.grid.planes > 1 else ""
    downscaled = f"downscaled {plan.downscale} times for its large nuclei, " if plan.downscale > 1 else ""
    computed, reasons = plan.computed_tiles, ["the region"] * bool(plan.region) + ["tissue"] * bool(plan.tissue)
    tiles = 0 if computed is None else int(computed.sum()) * plan.grid.planes
    chosen = f"{counted(tiles, 'tile')} for {' and '.join(reasons)} out of " if reasons else ""
    cost = lattice.cost if computed is None else tiles * math.prod(lattice.tile) / plan.pixels
    return (
        f"{plan.slide.name}: {planes}{lattice.shape[0]} x {lattice.shape[1]} px, level {level.level} "
        f"({size}{level.reason}), channel {plan.channels.reason}, values {plan.bounds}, "
        f"{downscaled}{chosen}{counted(plan.tiles, 'tile')} of {lattice.tile[0]} x {lattice.tile[1]} in "
        f"{counted(len(plan.grid), 'block')}, "
        f"{cost:.2f} px computed per px, peak memory at most {peak_bytes / 1e6:.0f} MB"
    )
