"""The command line: each command turns its flags into one call of a room and prints what comes back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cellseg_batch.engine import IMPORTED_AT
from cellseg_batch.engine.cli import options as o
from cellseg_batch.engine.cli import profiling_commands as measure_commands
from cellseg_batch.engine.cli import report_commands as campaign_commands
from cellseg_batch.engine.cli import result_commands, trainer_commands
from cellseg_batch.engine.cli.console import check_json, plain_errors, write_json
from cellseg_batch.engine.cli.flags import ENGINE, EVERY, takes_settings
from cellseg_batch.engine.machine import bound_heaps
from cellseg_batch.engine.settings import Settings

app = typer.Typer(
    help="Segment cells and nuclei in huge microscopy slides.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
@takes_settings(*EVERY)
def run(
    slides: o.Slides,
    settings: Settings,
    json_file: o.Json = None,
    verbose: o.Verbose = False,
    quiet: o.Quiet = False,
) -> None:
    """Segment every image that SLIDES hold; an unfinished run goes on where it stopped."""
    from cellseg_batch.engine.cli.progress import Screen
    from cellseg_batch.engine.run.campaign import run as run_campaign
    from cellseg_batch.engine.run.results import print_failures, print_report
    from cellseg_batch.engine.scheduling.signals import Stop

    check_json(json_file)
    bound_heaps()
    stop = Stop()
    with stop.on_signals(), Screen(Console(), verbosity=verbose - quiet) as screen:
        report = run_campaign(slides, settings, screen, IMPORTED_AT, stop)
        if settings.objects:
            from cellseg_batch.engine.reports.plates import summarise_plates  # and with it pyarrow

            report = summarise_plates(report, settings)
    print_failures(report, Console(stderr=True))
    if not quiet:
        print_report(report, Console())
    write_json(json_file, report.to_json())
    raise typer.Exit(report.status == "failed")


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("slides.zarr"), debug: o.Debug = False
) -> None:
    """Write a small OME-Zarr store of real microscopy images to try things on."""
    from cellseg_batch.engine.slides.demo import write_demo

    with plain_errors(debug):
        names = write_demo(out)
        Console().print(f"{out}: {', '.join(names)}\nnow: cellseg-batch run {out}", highlight=False)


@app.command()
@takes_settings("model", "tile", "margin", "block", "level", "pixel_size", "channel", "axes")
def info(
    slides: o.Slides,
    settings: Settings,
) -> None:
    """List the images that SLIDES hold, and how each would be cut into blocks and tiles."""
    from cellseg_batch.engine.reports.info import print_images

    broken = print_images(slides, settings, Console())
    raise typer.Exit(broken > 0)


@app.command("verify-seams")
@takes_settings(*ENGINE, "threshold", "tile", "margin", "block", "level", "pixel_size", "downscale", "channel", "axes")
def verify_seams(
    slide: o.Slide,
    settings: Settings,
    full: Annotated[bool, typer.Option("--full", help="Compare the whole slide, not windows.")] = False,
    windows: Annotated[int, typer.Option("--windows", min=1, help="At most so many windows of 2048 px.")] = 9,
    bound: Annotated[float, typer.Option("--bound", min=0, help="Largest share of pixels that may flip.")] = 1e-4,
    json_file: o.Json = None,
) -> None:
    """Compare the tiled result of SLIDE with the untiled one; exit 1 when too many pixels flip."""
    from cellseg_batch.engine.reports.verify_seams import print_seams, prove_seams

    check_json(json_file)
    report = prove_seams(slide, settings, full, windows)
    print_seams(report, bound, Console())
    write_json(json_file, report.to_json())
    raise typer.Exit(not report.holds(bound))


@app.command("compile")
@takes_settings(*ENGINE, "batch")
def compile_model(
    settings: Settings,
    tile: Annotated[
        int | None, typer.Option("--tile", min=1, help="Side of the timed tiles in px; runs use the usual race.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Race anew, even if a result is known.")] = False,
    list_entries: Annotated[bool, typer.Option("--list", help="List what is kept, and do nothing else.")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="Remove what is kept, and do nothing else.")] = False,
    json_file: o.Json = None,
) -> None:
    """Race the backends for a model on this machine, hold each against torch fp32, and keep the result."""
    from cellseg_batch.engine.cli.compile import clear_artefacts, print_artefacts, run_race

    check_json(json_file)
    if list_entries:
        print_artefacts(Console())
    elif clear:
        clear_artefacts(Console())
    else:
        write_json(json_file, run_race(settings, tile, again, Console()))


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            parser=o.place, metavar="SOURCE", help="A TIFF, OME-TIFF, SVS, PNG or plain zarr, or a folder of them."
        ),
    ],
    target: Annotated[Path, typer.Argument(parser=o.place, metavar="DST.zarr", help="The store to write.")],
    axes: o.Axes = None,
    workers: o.Workers = Settings.workers,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the way.")] = False,
    debug: o.Debug = False,
) -> None:
    """Write SOURCE as OME-Zarr 0.5, sharded and with a pyramid; an unfinished conversion goes on where it stopped."""
    from cellseg_batch.engine.scheduling.signals import Stop
    from cellseg_batch.engine.slides.convert import print_conversions

    stop = Stop()
    with plain_errors(debug), stop.on_signals():
        failed = print_conversions(source, target, axes, workers, overwrite, stop, Console())
    raise typer.Exit(failed > 0)


@app.command()
def doctor(debug: o.Debug = False) -> None:
    """Show this machine's devices and backends, what is missing and how to get it."""
    from cellseg_batch.engine.reports.doctor import print_diagnosis

    with plain_errors(debug):
        print_diagnosis(Console())


for command in (
    campaign_commands.plan,
    campaign_commands.status,
    campaign_commands.verify,
    campaign_commands.report,
    measure_commands.profile,
    result_commands.preview,
    trainer_commands.train,
    trainer_commands.evaluate,
    trainer_commands.export,
):
    app.command()(command)
app.command("export-objects")(result_commands.export_objects)

app.add_typer(measure_commands.bench, name="bench")


def main() -> None:
    """Entry point of ``cellseg-batch``."""
    app(args=sys.argv[1:], prog_name="cellseg-batch")


if __name__ == "__main__":
    main()
