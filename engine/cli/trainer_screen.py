"""The trainer's commands on the screen: progress, tables, files.  The work is the trainer's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track
from rich.table import Table

from cellseg_batch.engine.errors import ComputeError, UsageError
from cellseg_batch.engine.models import build_torch_network, load_model
from cellseg_batch.trainer.data.dataset import Dataset, load_dataset
from cellseg_batch.trainer.data.sample import Problem, Sample
from cellseg_batch.trainer.evaluate import Summary, evaluate, rescale, summarise
from cellseg_batch.trainer.export import export_network
from cellseg_batch.trainer.plots import plot_predictions
from cellseg_batch.trainer.recipe import Recipe, load_preset
from cellseg_batch.trainer.train import Epoch, train


def read_recipe(preset: str, changes: dict[str, Any]) -> Recipe:
    """The recipe of a preset with some fields changed.

    Raises:
        UsageError: there is no such preset, or a field has an impossible value.
    """
    try:
        return load_preset(preset, **changes)
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"--preset {preset}",
            expected="a recipe whose fields all have possible values",
            found=str(error),
            remedy="see cellseg-batch train --help",
        ) from error


def train_model(
    data: Path,
    out: Path,
    recipe: Recipe,
    console: Console,
    *,
    fine_tune: str | None,
    resume: bool,
    max_steps: int | None,
    device: str,
    threads: int | None,
) -> None:
    """Train, with a progress bar on a terminal and a line for each epoch.

    Raises:
        UsageError: data, recipe, weights or ``out`` cannot be used.
        ComputeError: the loss is not finite any more.
    """
    start = load_model(fine_tune) if fine_tune is not None else None
    if threads is not None:
        torch.set_num_threads(threads)
    with _usable(f"train {data}"), TrainingScreen(console) as screen:
        try:
            train(data, out, recipe, screen, fine_tune=start, resume=resume, max_steps=max_steps, device=device)
        except FloatingPointError as error:
            raise ComputeError(
                f"train {data}",
                expected="a finite loss",
                found=str(error),
                cause="too high a learning rate, or damaged images",
                remedy=f"lower --learning-rate; the best weights so far are in {out}",
            ) from error
    console.print(f"{out}: now cellseg-batch run SLIDES --model {out}", highlight=False, soft_wrap=True)


class TrainingScreen:
    """The observer of a training run on a terminal; used as a context manager around it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._loss = 0.0
        self._dice = ""
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None)
        self._images = 0

    def __enter__(self) -> TrainingScreen:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def planned(self, dataset: Dataset, steps: int, done: int, batch: int) -> None:
        """Say what will be trained on, and what was left out."""
        print_problems(dataset.problems, self.console)
        counts = ", ".join(f"{len(samples)} {split}" for split, samples in dataset.splits.items())
        self.console.print(f"images: {counts}; {steps} steps" + (f", {done} done" if done else ""), highlight=False)
        self._images = batch
        self._bar.update(self._task, total=steps, completed=done)

    def stepped(self, step: int, loss: float) -> None:
        """Move the bar."""
        self._loss = 0.98 * self._loss + 0.02 * loss if self._loss else loss
        speed = self._bar.tasks[0].speed
        rate = f", {speed * self._images:.1f} images/s" if speed else ""
        self._bar.update(self._task, completed=step, description=f"loss {self._loss:.3f}{self._dice}{rate}")

    def scored(self, epoch: Epoch) -> None:
        """One line."""
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


def evaluate_models(
    models: list[str],
    data: Path,
    split: str,
    console: Console,
    factor: float,
    pictures: Path | None,
    threads: int | None,
) -> dict[str, Any]:
    """Score each model on a split and print the table; returns every figure.

    Raises:
        UsageError: there is no such model, or the data cannot be used.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    results: dict[str, Any] = {}
    for model in models:
        bundle = load_model(model)
        with _usable(f"evaluate {data}"):
            dataset = load_dataset(data, bundle.card.normalisation, only=(split,))
        print_problems(dataset.problems, console)
        samples = dataset.splits[split]
        if factor != 1:
            samples = [rescale(sample, factor) for sample in samples]
        scores = evaluate(bundle, build_torch_network(bundle), _tracked(samples, console))
        rows = {kind: [one for one in scores if one.kind == kind] for kind in sorted({one.kind for one in scores})}
        summaries = {**{kind: summarise(one) for kind, one in rows.items() if len(rows) > 1}, "all": summarise(scores)}
        console.print(_table(model, summaries))
        results[model] = {
            "split": split,
            "rescale": factor,
            "summary": {kind: asdict(one) for kind, one in summaries.items()},
            "images": [asdict(one) for one in scores],
        }
        if pictures is not None:
            with _usable(f"--pictures {pictures}"):
                pictures.mkdir(parents=True, exist_ok=True)
                plot_predictions(bundle, samples, pictures / f"{Path(model).name}.png")
    return results


def _table(model: str, summaries: dict[str, Summary]) -> Table:
    """A column for each kind of image, a row for each figure."""
    table = Table(
        title=model,
        title_justify="left",
        caption="masks and AP: mean over images; F1: all instances together; metric: mean AP at IoU 0.5 ... 0.95",
        caption_justify="left",
    )
    table.add_column("")
    for kind in summaries:
        table.add_column(kind.replace("_", " "), overflow="fold")
    every = list(summaries.values())
    table.add_row("images", *(str(one.images) for one in every))
    figures = {name: [one.mean[name] for one in every] for name in every[0].mean} | {
        "AP at IoU 0.5": [one.ap[0] for one in every],
        "metric": [one.competition for one in every],
        "F1 at IoU 0.5": [one.f1 for one in every],
        "AJI": [one.aji for one in every],
    }
    for name, values in figures.items():
        table.add_row(name, *(f"{value:.3f}" for value in values))
    table.add_row("Mpx/s, torch fp32", *(f"{one.mpx_per_s:.2f}" for one in every))
    return table


def export_model(model: str, kind: str, tile: int, out: Path, console: Console) -> None:
    """Write a model's network to a file.

    Raises:
        UsageError: the tile or the format does not fit, ``out`` cannot be written, or ONNX's packages are missing.
    """
    bundle = load_model(model)
    with _usable(f"export {model}"):
        try:
            export_network(bundle, kind, tile, out)
        except ModuleNotFoundError as error:
            raise UsageError(
                "export --format onnx",
                expected="the packages onnx and onnxscript",
                found=str(error),
                remedy="pip install 'cellseg-batch[onnx]'",
            ) from error
    console.print(f"{out}: input (1 to 64, {bundle.card.channels}, {tile}, {tile}) float32 in [0, 1]", highlight=False)


def print_problems(problems: Iterable[Problem], console: Console) -> None:
    """A line for each image that cannot be used."""
    for problem in problems:
        console.print(f"skipped {problem.file}: {problem.reason}", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _usable(subject: str) -> Iterator[None]:
    """Turn what the trainer refuses into an error of ours."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UsageError(
            subject,
            expected="data, recipe, weights and folders that can be used together",
            found=str(error),
            remedy="see the README for the layouts of data and cellseg-batch train --help for recipes",
        ) from error


def _tracked(samples: list[Sample], console: Console) -> Iterable[Sample]:
    return track(samples, "scoring", console=console, transient=True, disable=not console.is_terminal)
