"""What a person sees while a run goes on: a line per slide and one progress bar with rate and time left.

Nothing moves on the screen when the output is not a terminal.
"""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from cellseg_batch.engine.cli.console import as_flags
from cellseg_batch.engine.run.results import SlideReport
from cellseg_batch.engine.run.slide_plan import SlidePlan

_FEW_IMAGES = 12


class _Rate(ProgressColumn):
    """Pixels per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed / 1e6:.1f} Mpx/s", style="progress.data.speed")


class Screen:
    """The observer of a run on a terminal; used as a context manager around it.

    Args:
        console: where to write.
        verbosity: -1 is silent, 0 describes the first few slides, 1 each slide.
    """

    def __init__(self, console: Console, verbosity: int) -> None:
        self.console = console
        self._verbosity = verbosity
        self._images = 0
        self._planned = 0
        self._planned_pixels = 0
        self._ended = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            _Rate(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=verbosity < 0 or not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> Screen:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def racing(self) -> None:
        """Say why it takes a while before anything happens."""
        if self._verbosity >= 0:
            self.console.print("racing the backends for this model on this machine, once ...", highlight=False)

    def found(self, images: int) -> None:
        """So many images will be processed."""
        self._images = images

    def planned(self, plan: SlidePlan, peak_bytes: int, number: int, done: float) -> None:
        """A slide is about to start."""
        self._planned += 1
        self._planned_pixels += plan.pixels
        # The images to come are taken to be as large as those so far.
        self._bar.update(self._task, total=self._planned_pixels * self._images / self._planned)
        self._bar.advance(self._task, done)
        if self._verbosity >= 1 or (self._verbosity == 0 and self._planned <= _FEW_IMAGES):
            self.console.print(Text(describe(plan, peak_bytes)), soft_wrap=True)
        elif self._verbosity == 0 and self._planned == _FEW_IMAGES + 1:
            self.console.print("... (-v describes every image)")

    def advanced(self, pixels: float) -> None:
        """So many more pixels are done."""
        self._bar.advance(self._task, pixels)

    def ended(self, report: SlideReport) -> None:
        """A slide is done, failed, skipped or held."""
        self._ended += 1
        self._bar.update(self._task, description=f"{self._ended}/{self._images} images")
        if self._verbosity >= 1:
            reason = f" ({as_flags(report.reason)})" if report.reason else ""
            self.console.print(Text(f"{report.status}: {report.path}{reason}"), soft_wrap=True)


def describe(plan: SlidePlan, peak_bytes: int) -> str:
    """A plan in one line: what was picked, what it costs, what it will need."""
    lattice, level = plan.grid.lattice, plan.level
    size = f"{level.pixel_size_um:.3g} µm/px, " if level.pixel_size_um else ""
    planes = f"{plan.grid.planes} planes, " if plan.grid.planes > 1 else ""
    downscaled = f"downscaled {plan.downscale} times for its large nuclei, " if plan.downscale > 1 else ""
    return (
        f"{plan.slide.name}: {planes}{lattice.shape[0]} x {lattice.shape[1]} px, level {level.level} "
        f"({size}{level.reason}), channel {plan.channels.reason}, values {plan.bounds.low:g}-{plan.bounds.high:g}, "
        f"{downscaled}{plan.tiles} tiles of {lattice.tile[0]} x {lattice.tile[1]} in {len(plan.grid)} blocks, "
        f"{lattice.cost:.2f} px computed per px, peak memory at most {peak_bytes / 1e6:.0f} MB"
    )
