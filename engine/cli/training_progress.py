"""Show the progress of a training: one progress bar, and a line for each epoch."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from cellseg_batch.engine.cli.console import as_text
from cellseg_batch.engine.cli.progress_bar import ProgressBar
from cellseg_batch.trainer.data.dataset import Dataset
from cellseg_batch.trainer.data.sample import Problem
from cellseg_batch.trainer.train import Epoch


class TrainingProgress(ProgressBar):
    """Observer of a training that shows it on a terminal; a context manager around the training."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            console,
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._loss = 0.0
        self._dice = ""
        self._images = 0

    def planned(self, dataset: Dataset, steps: int, done: int, batch: int) -> None:
        """Print the numbers of images and steps, and the images that cannot be used."""
        print_problems(dataset.problems, self.console)
        counts = ", ".join(f"{len(samples)} {split}" for split, samples in dataset.splits.items())
        self.console.print(f"images: {counts}; {steps} steps" + (f", {done} done" if done else ""), highlight=False)
        self._images = batch
        self._bar.update(self._task, total=steps, completed=done)

    def stepped(self, step: int, loss: float) -> None:
        """Move the bar to ``step``, and show the loss and the rate."""
        self._loss = 0.98 * self._loss + 0.02 * loss if self._loss else loss
        speed = self._bar.tasks[0].speed
        rate = f", {speed * self._images:.1f} images/s" if speed else ""
        self._bar.update(self._task, completed=step, description=f"loss {self._loss:.3f}{self._dice}{rate}")

    def scored(self, epoch: Epoch) -> None:
        """Print a line about an epoch."""
        scores = epoch.validation
        self._dice = f", val Dice {scores.dice:.3f}"
        metric = "" if scores.competition != scores.competition else f", metric {scores.competition:.4f}"
        self.console.print(
            f"epoch {epoch.number}, step {epoch.step}: loss {epoch.loss:.3f}, val loss {scores.loss:.3f}, "
            f"val Dice {scores.dice:.4f}, IoU {scores.iou:.4f}{metric}, {epoch.images_per_second:.1f} images/s"
            + (" (best)" if epoch.best else ""),
            highlight=False,
            soft_wrap=True,
        )


def print_problems(problems: Iterable[Problem], console: Console) -> None:
    """Print a line for each annotated image that cannot be used."""
    for problem in problems:
        console.print(as_text(f"skipped {problem.file}: {problem.reason}"), soft_wrap=True)
