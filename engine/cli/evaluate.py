"""``cellseg-batch evaluate``: score models on annotated images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from cellseg_batch.engine.cli.console import check_json, plain_errors, print_text, write_json
from cellseg_batch.engine.cli.flags import Debug, Json, Threads
from cellseg_batch.engine.errors import UsageError

if TYPE_CHECKING:
    from cellseg_batch.engine.reports.evaluate import Evaluation
    from cellseg_batch.engine.reports.scores import Summary
    from cellseg_batch.trainer.data.sample import Sample


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Shipped models or bundle folders, then the folder of data.")],
    split: Annotated[str, typer.Option("--split", help="train, val or test.")] = "val",
    rescale: Annotated[float, typer.Option("--rescale", min=0.1, help="Magnify images and truth by this.")] = 1.0,
    pictures: Annotated[
        Path | None, typer.Option("--pictures", metavar="DIR", help="Write a page of pictures for each model.")
    ] = None,
    threads: Threads = None,
    json_file: Json = None,
    debug: Debug = False,
) -> None:
    """Score MODELS on the annotated images of the last argument: pixels, instances, classes, speed, by kind."""
    from rich.progress import track

    from cellseg_batch.engine.cli.training_progress import print_problems
    from cellseg_batch.engine.reports.evaluate import evaluate_model

    console = Console()

    def tracked(samples: Sequence[Sample]) -> Iterable[Sample]:
        return track(samples, "scoring", console=console, transient=True, disable=not console.is_terminal)

    with plain_errors(debug):
        check_json(json_file)
        *bundles, data = models
        if not bundles:
            raise UsageError(
                "evaluate", expected="a model and a folder of data", found=data, remedy=f"try: evaluate nuclei {data}"
            )
        results = {}
        for model in bundles:
            evaluation = evaluate_model(model, Path(data), split, rescale, pictures, threads, tracked)
            print_problems(evaluation.problems, console)
            for note in evaluation.notes:
                print_text(f"note: {model}: {note}")
            print_evaluation(evaluation, console)
            results[model] = evaluation.to_json()
        write_json(json_file, results)


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Print a column for each kind of image, a row for each figure."""
    table = Table(
        title=evaluation.model,
        title_justify="left",
        caption="masks, AP, AJI and PQ: mean over images; F1 and classes: all images together; metric: mean AP at IoU "
        "0.5 ... 0.95",
        caption_justify="left",
    )
    table.add_column("")
    for kind in evaluation.summaries:
        table.add_column(kind.replace("_", " "), overflow="fold")
    summaries = list(evaluation.summaries.values())
    table.add_row("images", *(str(summary.images) for summary in summaries))
    figures = {name: [summary.mean[name] for summary in summaries] for name in summaries[0].mean} | {
        "AP at IoU 0.5": [summary.ap[0] for summary in summaries],
        "metric": [summary.competition for summary in summaries],
        "F1 at IoU 0.5": [summary.f1 for summary in summaries],
        "AJI": [summary.aji for summary in summaries],
        "PQ": [summary.pq for summary in summaries],
    }
    for name, values in figures.items():
        table.add_row(name, *(f"{value:.3f}" for value in values))
    for name, of_kinds in _class_figures(summaries).items():
        table.add_row(name, *("" if value is None else f"{value:.3f}" for value in of_kinds))
    table.add_row(f"Mpx/s, {evaluation.backend}", *(f"{summary.mpx_per_s:.2f}" for summary in summaries))
    console.print(table)


def _class_figures(summaries: list[Summary]) -> dict[str, list[float | None]]:
    """Dice, IoU and F1 of each class -> the figures of each kind of image; without those that no kind has."""
    names = dict.fromkeys(name for summary in summaries for name in summary.classes)
    rows = {
        f"{title}, {name}": [
            getattr(summary.classes[name], figure) if name in summary.classes else None for summary in summaries
        ]
        for name in names
        for title, figure in (("dice", "dice"), ("iou", "iou"), ("F1 at IoU 0.5", "f1"))
    }
    return {name: values for name, values in rows.items() if any(value is not None for value in values)}
