"""The command line: each command turns its flags into one call of a room and prints what comes back."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from cellseg_batch.engine import IMPORTED_AT
from cellseg_batch.engine import options as o
from cellseg_batch.engine.errors import CellsegError, UsageError
from cellseg_batch.engine.settings import Settings

app = typer.Typer(
    help="Segment cells and nuclei in huge microscopy slides.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_INTERRUPTED = 130


@app.command()
def run(
    slides: o.Slides,
    output: o.Output = None,
    name: o.Name = Settings.name,
    model: o.Model = Settings.model,
    backend: o.BackendName = Settings.backend,
    precision: o.Precision = Settings.precision,
    threshold: o.Threshold = None,
    threads: o.Threads = None,
    tile: o.TileSide = Settings.tile,
    margin: o.Margin = None,
    batch: o.BatchSize = Settings.batch,
    block: o.BlockSide = Settings.block,
    workers: o.Workers = Settings.workers,
    max_memory: o.MaxMemory = None,
    level: o.LevelIndex = None,
    pixel_size: o.PixelSize = None,
    channel: o.Channel = None,
    axes: o.Axes = None,
    probability: o.Probability = False,
    overwrite: o.Overwrite = False,
    json_file: o.Json = None,
    debug: o.Debug = False,
    verbose: o.Verbose = False,
    quiet: o.Quiet = False,
) -> None:
    """Segment every image that SLIDES hold; an unfinished run goes on where it stopped."""
    from cellseg_batch.engine.campaign import run as run_campaign
    from cellseg_batch.engine.report import print_failures, print_report
    from cellseg_batch.engine.screen import Screen

    with _plain_errors(debug):
        settings = Settings(
            output=output,
            name=name,
            model=model,
            backend=backend,
            precision=precision,
            threshold=threshold,
            tile=tile,
            margin=margin,
            batch=batch,
            block=block,
            workers=workers,
            threads=threads,
            max_memory=max_memory,
            level=level,
            pixel_size=pixel_size,
            channel=channel,
            axes=axes,
            probability=probability,
            overwrite=overwrite,
        )
        _check_json(json_file)
        with Screen(Console(), verbosity=verbose - quiet) as screen:
            report = run_campaign(slides, settings, screen, started=IMPORTED_AT)
        print_failures(report, Console(stderr=True))
        if not quiet:
            print_report(report, Console())
        _write_json(json_file, report.to_json())
    raise typer.Exit(report.status == "failed")


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("slides.zarr"), debug: o.Debug = False
) -> None:
    """Write a small OME-Zarr store of real microscopy images to try things on."""
    from cellseg_batch.engine.demo import write_demo

    with _plain_errors(debug):
        names = write_demo(out)
        Console().print(f"{out}: {', '.join(names)}\nnow: cellseg-batch run {out}", highlight=False)


@app.command()
def info(
    slides: o.Slides,
    tile: o.TileSide = Settings.tile,
    margin: o.Margin = None,
    block: o.BlockSide = Settings.block,
    model: o.Model = Settings.model,
    level: o.LevelIndex = None,
    pixel_size: o.PixelSize = None,
    channel: o.Channel = None,
    axes: o.Axes = None,
    debug: o.Debug = False,
) -> None:
    """List the images that SLIDES hold, and how each would be cut into blocks and tiles."""
    from cellseg_batch.engine.info import print_images

    with _plain_errors(debug):
        settings = Settings(
            model=model,
            tile=tile,
            margin=margin,
            block=block,
            level=level,
            pixel_size=pixel_size,
            channel=channel,
            axes=axes,
        )
        broken = print_images(slides, settings, Console())
    raise typer.Exit(broken > 0)


@app.command("verify-seams")
def verify_seams(
    slide: o.Slide,
    full: Annotated[bool, typer.Option("--full", help="Compare the whole slide, not windows.")] = False,
    windows: Annotated[int, typer.Option("--windows", min=1, help="At most so many windows of 2048 px.")] = 9,
    bound: Annotated[float, typer.Option("--bound", min=0, help="Largest share of pixels that may flip.")] = 1e-4,
    model: o.Model = Settings.model,
    backend: o.BackendName = Settings.backend,
    precision: o.Precision = Settings.precision,
    threshold: o.Threshold = None,
    threads: o.Threads = None,
    tile: o.TileSide = Settings.tile,
    margin: o.Margin = None,
    block: o.BlockSide = Settings.block,
    level: o.LevelIndex = None,
    pixel_size: o.PixelSize = None,
    channel: o.Channel = None,
    axes: o.Axes = None,
    json_file: o.Json = None,
    debug: o.Debug = False,
) -> None:
    """Compare the tiled result of SLIDE with the untiled one; exit 1 when too many pixels flip."""
    from cellseg_batch.engine.seams import print_seams, prove_seams

    with _plain_errors(debug):
        settings = Settings(
            model=model,
            backend=backend,
            precision=precision,
            threshold=threshold,
            tile=tile,
            margin=margin,
            block=block,
            threads=threads,
            level=level,
            pixel_size=pixel_size,
            channel=channel,
            axes=axes,
        )
        _check_json(json_file)
        report = prove_seams(slide, settings, full, windows)
        print_seams(report, bound, Console())
        _write_json(json_file, report.to_json())
    raise typer.Exit(not report.holds(bound))


@app.command()
def train(
    data: Annotated[
        Path, typer.Argument(help="Annotated images: images/ with labels/, masks/ or COCO, or DSB folders.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the bundle.")],
    name: Annotated[str, typer.Option("--name", help="Of the model.")] = "nuclei",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimiser steps.")] = 16_000,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Crops per step.")] = 8,
    crop: Annotated[int, typer.Option("--crop", min=64, help="Side of a crop in px, a multiple of 16.")] = 256,
    width: Annotated[int, typer.Option("--width", min=1, help="Channels of the first layers.")] = 32,
    learning_rate: Annotated[float, typer.Option("--learning-rate", min=0, help="Peak of AdamW's.")] = 2e-3,
    seed: Annotated[int, typer.Option("--seed", help="Of every random draw.")] = 0,
    score_every: Annotated[int, typer.Option("--score-every", min=1, help="Steps between scores.")] = 1_000,
    fine_tune: Annotated[str | None, typer.Option("--fine-tune", help="Start from this model.")] = None,
    debug: o.Debug = False,
) -> None:
    """Train the stem U-Net on DATA and write a bundle at each score on the val split."""
    with _plain_errors(debug):
        from cellseg_batch.engine.training import train_model
        from cellseg_batch.trainer.train import TrainSettings

        recipe = TrainSettings(
            name=name,
            width=width,
            steps=steps,
            batch=batch,
            crop=crop,
            learning_rate=learning_rate,
            seed=seed,
            score_every=score_every,
        )
        train_model(data, out, recipe, fine_tune, Console())


@app.command()
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Shipped models or bundle folders, then the folder of data.")],
    split: Annotated[str, typer.Option("--split", help="train, val or test.")] = "val",
    json_file: o.Json = None,
    debug: o.Debug = False,
) -> None:
    """Score MODELS on the annotated images of the last argument: Dice, IoU, the competition metric, F1, Mpx/s."""
    with _plain_errors(debug):
        from cellseg_batch.engine.training import evaluate_models

        _check_json(json_file)
        *bundles, data = models
        if not bundles:
            raise UsageError(
                "evaluate", expected="a model and a folder of data", found=data, remedy=f"try: evaluate nuclei {data}"
            )
        _write_json(json_file, evaluate_models(bundles, Path(data), split, Console()))


@app.command()
def doctor(debug: o.Debug = False) -> None:
    """Show this machine's devices and backends, what is missing and how to get it."""
    from cellseg_batch.engine.doctor import print_diagnosis

    with _plain_errors(debug):
        print_diagnosis(Console())


def _check_json(file: Path | None) -> None:
    """Refuse a report that could not be written, before the work rather than after it."""
    if file is not None and not file.resolve().parent.is_dir():
        raise UsageError(
            f"--json {file}",
            expected="a file in a folder that exists",
            found="no such folder",
            remedy="make the folder first",
        )


def _write_json(file: Path | None, content: dict[str, Any]) -> None:
    if file is not None:
        file.write_text(json.dumps(content, indent=2) + "\n")


@contextmanager
def _plain_errors(debug: bool) -> Iterator[None]:
    """Print an error of ours on one line and exit with its code; everything else is a bug and keeps its traceback."""
    if debug:
        logging.basicConfig()
        logging.getLogger("cellseg_batch").setLevel(logging.DEBUG)
    try:
        yield
    except CellsegError as error:
        if debug:
            raise
        Console(stderr=True).print(Text.assemble(("error", "red"), f"  {error}"), soft_wrap=True)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; the same command goes on where this one stopped")
        raise typer.Exit(_INTERRUPTED) from None


def main() -> None:
    """Entry point of ``cellseg-batch``."""
    app(args=sys.argv[1:], prog_name="cellseg-batch")


if __name__ == "__main__":
    main()
