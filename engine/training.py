"""The trainer's commands on the screen: progress, tables, files.  The work is the trainer's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from cellseg_batch.engine.errors import UsageError
from cellseg_batch.engine.models import build_torch_network, load_model
from cellseg_batch.trainer.bundle import Normalisation
from cellseg_batch.trainer.data.dataset import Dataset, load_dataset
from cellseg_batch.trainer.data.sample import Sample
from cellseg_batch.trainer.evaluate import Summary, evaluate, summarise
from cellseg_batch.trainer.train import Progress, TrainSettings, train


def train_model(data: Path, out: Path, settings: TrainSettings, fine_tune: str | None, console: Console) -> None:
    """Train and print a line at each score.

    Raises:
        UsageError: the data or the model to start from cannot be used.
    """
    start = load_model(fine_tune) if fine_tune is not None else None

    def report(progress: Progress) -> None:
        kinds = ", ".join(f"{kind or 'all'} {dice:.3f}" for kind, dice in progress.dice_by_kind.items())
        console.print(
            f"step {progress.step}/{settings.steps}: loss {progress.loss:.3f}, val Dice {progress.dice:.4f} ({kinds}), "
            f"{progress.images_per_second:.1f} images/s",
            highlight=False,
            soft_wrap=True,
        )

    try:
        train(data, out, settings, report, start)
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"train {data}",
            expected="annotated images, and a model to start from that fits the recipe",
            found=str(error),
            remedy="see the README for the layouts of data",
        ) from error
    console.print(f"{out}: now cellseg-batch run SLIDES --model {out}", highlight=False)


def evaluate_models(models: list[str], data: Path, split: str, console: Console) -> dict[str, Any]:
    """Score each model on a split and print the table; returns every figure.

    Raises:
        UsageError: there is no such model, or the data cannot be used.
    """
    results: dict[str, Any] = {}
    table = Table(caption="means over images; F1 at IoU 0.5 pooled; Mpx/s of torch fp32")
    for heading in ("model", "kind", "images", "Dice", "IoU", "accuracy", "metric", "F1", "Mpx/s"):
        table.add_column(heading, overflow="fold")
    for model in models:
        bundle = load_model(model)
        dataset = _load(data, split, bundle.card.normalisation)
        for problem in dataset.problems:
            console.print(f"skipped {problem.file}: {problem.reason}", highlight=False, markup=False, soft_wrap=True)
        network = build_torch_network(bundle)
        scores = evaluate(bundle, network, _tracked(dataset.splits[split], console))
        rows = {kind: [one for one in scores if one.kind == kind] for kind in sorted({one.kind for one in scores})}
        summaries = {**{kind: summarise(one) for kind, one in rows.items() if len(rows) > 1}, "all": summarise(scores)}
        for kind, one in summaries.items():
            table.add_row(model, kind, *_cells(one))
        results[model] = {
            "summary": {kind: asdict(one) for kind, one in summaries.items()},
            "images": [asdict(one) for one in scores],
        }
    console.print(table)
    return results


def _load(data: Path, split: str, rule: Normalisation) -> Dataset:
    try:
        return load_dataset(data, rule, only=(split,))
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(
            f"evaluate {data}", expected="annotated images", found=str(error), remedy="check the folder and --split"
        ) from error


def _tracked(samples: list[Sample], console: Console) -> Iterable[Sample]:
    return track(samples, "scoring", console=console, transient=True, disable=not console.is_terminal)


def _cells(one: Summary) -> tuple[str, ...]:
    figures = (one.dice, one.iou, one.accuracy, one.metric, one.f1)
    return str(one.images), *(f"{figure:.3f}" for figure in figures), f"{one.mpx_per_s:.2f}"
