"""Show the progress of a run: a line per slide and one progress bar with rate and time left."""

from __future__ import annotations

import math
from collections.abc import Mapping

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
        self._compiling = False
        self._images = 0
        self._planned = 0
        self._ended = 0
        self._total = 0
        self._left: dict[str, float] = {}  # location of each image to come -> its pixels that are not done

    def racing(self) -> None:
        """Print why the run takes a while to start."""
        if self._verbosity >= 0:
            self._say(
                "choosing a backend for this model on this machine, once: half a minute or more, and minutes before a "
                "large run ..."
            )

    def compiling(self) -> None:
        """Print, once, that the network and the kernels of the run are not in the cache yet."""
        if self._verbosity >= 0 and not self._compiling:
            self._compiling = True
            self._say("compiling what this run needs on this machine, once: ten seconds or more ...")

    def found(self, images: int, pixels: Mapping[str, int]) -> None:
        """Note the number of images that will be processed, and make the bar as long as all of them."""
        self._images, self._left = images, dict(pixels)
        self._total = sum(pixels.values())
        self._bar.update(self._task, total=self._total)

    def planned(self, plan: SlidePlan, peak_bytes: int, number: int, done: float) -> None:
        """Describe a slide that is about to start, and move the bar by what an earlier run did of it."""
        self._planned += 1
        self._advance(plan.slide.location, done)
        if self._verbosity >= 1 or (self._verbosity == 0 and self._planned <= _FEW_IMAGES):
            self.console.print(as_text(describe(plan, peak_bytes)), soft_wrap=True)
        elif self._verbosity == 0 and self._planned == _FEW_IMAGES + 1:
            self.console.print("... (-v describes every image)")

    def advanced(self, task: EndedTask) -> None:
        """Move the bar by the pixels that are done."""
        self._advance(task.slide, task.pixels)

    def ended(self, report: SlideReport) -> None:
        """Count a slide that is done, failed, skipped or held; the bar loses what this run does not do of it."""
        self._ended += 1
        left = round(self._left.pop(report.path, 0))
        if left:  # another total makes the bar forget its rate
            self._total -= left
            self._bar.update(self._task, total=self._total)
        self._bar.update(self._task, description=f"{self._ended}/{self._images} images")
        if self._verbosity >= 1:
            reason = f" ({as_flags(report.reason)})" if report.reason else ""
            self.console.print(as_text(f"{report.status}: {report.path}{reason}"), soft_wrap=True)

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False)

    def _advance(self, slide: str, pixels: float) -> None:
        self._left[slide] -= pixels
        self._bar.advance(self._task, pixels)


def describe(plan: SlidePlan, peak_bytes: int) -> str:
    """Describe a plan in one line: size, level, channels, tiles and blocks, cost and peak memory."""
    lattice, level = plan.grid.lattice, plan.level
    size = f"{level.pixel_size_um:.3g} µm/px, " if level.pixel_size_um else ""
    channels = ",".join(map(str, plan.channels.indices))
    planes = f"{plan.grid.planes} planes, each for itself, " if plan.grid.planes > 1 else ""
    downscaled = f"downscaled {plan.downscale} times for its large nuclei, " if plan.downscale > 1 else ""
    computed, reasons = plan.computed_tiles, ["the region"] * bool(plan.region) + ["tissue"] * bool(plan.tissue)
    tiles = 0 if computed is None else int(computed.sum()) * plan.grid.planes
    chosen = f"{counted(tiles, 'tile')} for {' and '.join(reasons)} out of " if reasons else ""
    cost = lattice.cost if computed is None else tiles * math.prod(lattice.tile) / plan.pixels
    return (
        f"{plan.slide.name}: {planes}{lattice.shape[0]} x {lattice.shape[1]} px, level {level.level} "
        f"({size}{level.reason}), channel {channels} ({plan.channels.reason}), values {plan.bounds}, "
        f"{downscaled}{chosen}{counted(plan.tiles, 'tile')} of {lattice.tile[0]} x {lattice.tile[1]} in "
        f"{counted(len(plan.grid), 'block')}, "
        f"{cost:.2f} px computed per px, peak memory at most {peak_bytes / 1e6:.0f} MB"
    )
