"""The command line: each command turns its flags into one call of a room and prints what comes back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cellseg_batch.engine import IMPORTED_AT, campaign_commands, measure_commands, result_commands, trainer_commands
from cellseg_batch.engine import options as o
from cellseg_batch.engine.settings import RACE_TILE, ClusterSettings, Settings
from cellseg_batch.engine.shell import check_json, plain_errors, write_json

app = typer.Typer(
    help="Segment cells and nuclei in huge microscopy slides.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def run(
    slides: o.Slides,
    output: o.Output = None,
    name: o.Name = Settings.name,
    model: o.Model = Settings.model,
    backend: o.BackendName = Settings.backend,
    precision: o.Precision = Settings.precision,
    device: o.Device = Settings.device,
    gate: o.Gate = Settings.gate,
    threshold: o.Threshold = None,
    threads: o.Threads = None,
    tile: o.TileSide = Settings.tile,
    stitch: o.Stitch = Settings.stitch,
    margin: o.Margin = None,
    batch: o.BatchSize = Settings.batch,
    block: o.BlockSide = Settings.block,
    workers: o.Workers = Settings.workers,
    scheduler: o.Scheduler = Settings.scheduler,
    queue: o.Queue = None,
    account: o.Account = None,
    walltime: o.Walltime = None,
    gres: o.Gres = None,
    cores: o.Cores = None,
    memory: o.JobMemory = None,
    cluster_config: o.ClusterConfig = None,
    max_memory: o.MaxMemory = None,
    level: o.LevelIndex = None,
    pixel_size: o.PixelSize = None,
    shrink: o.Shrink = None,
    skip_background: o.SkipBackground = Settings.skip_background,
    channel: o.Channel = None,
    axes: o.Axes = None,
    wells: o.Wells = None,
    fields: o.Fields = None,
    instances: o.Instances = False,
    objects: o.Objects = False,
    probability: o.Probability = False,
    overwrite: o.Overwrite = False,
    retry_failed: o.RetryFailed = False,
    json_file: o.Json = None,
    debug: o.Debug = False,
    verbose: o.Verbose = False,
    quiet: o.Quiet = False,
) -> None:
    """Segment every image that SLIDES hold; an unfinished run goes on where it stopped."""
    from cellseg_batch.engine.campaign import run as run_campaign
    from cellseg_batch.engine.report import print_failures, print_report
    from cellseg_batch.engine.screen import Screen
    from cellseg_batch.engine.stopping import Stop

    with plain_errors(debug):
        settings = Settings(
            output=output,
            name=name,
            model=model,
            backend=backend,
            precision=precision,
            device=device,
            gate=gate,
            threshold=threshold,
            tile=tile,
            stitch=stitch,
            margin=margin,
            batch=batch,
            block=block,
            workers=workers,
            scheduler=scheduler,
            cluster=ClusterSettings(queue, account, walltime, gres, cores, memory, cluster_config),
            threads=threads,
            max_memory=max_memory,
            level=level,
            pixel_size=pixel_size,
            shrink=shrink,
            skip_background=skip_background,
            channel=channel,
            axes=axes,
            wells=o.names(wells),
            fields=o.names(fields),
            instances=instances,
            objects=objects,
            probability=probability,
            overwrite=overwrite,
            retry_failed=retry_failed,
        )
        check_json(json_file)
        stop = Stop()
        with stop.on_signals(), Screen(Console(), verbosity=verbose - quiet) as screen:
            report = run_campaign(slides, settings, screen, IMPORTED_AT, stop)
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
    from cellseg_batch.engine.demo import write_demo

    with plain_errors(debug):
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

    with plain_errors(debug):
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
    device: o.Device = Settings.device,
    gate: o.Gate = Settings.gate,
    threshold: o.Threshold = None,
    threads: o.Threads = None,
    tile: o.TileSide = Settings.tile,
    margin: o.Margin = None,
    block: o.BlockSide = Settings.block,
    level: o.LevelIndex = None,
    pixel_size: o.PixelSize = None,
    shrink: o.Shrink = None,
    channel: o.Channel = None,
    axes: o.Axes = None,
    json_file: o.Json = None,
    debug: o.Debug = False,
) -> None:
    """Compare the tiled result of SLIDE with the untiled one; exit 1 when too many pixels flip."""
    from cellseg_batch.engine.seams import print_seams, prove_seams

    with plain_errors(debug):
        settings = Settings(
            model=model,
            backend=backend,
            precision=precision,
            device=device,
            gate=gate,
            threshold=threshold,
            tile=tile,
            margin=margin,
            block=block,
            threads=threads,
            level=level,
            pixel_size=pixel_size,
            shrink=shrink,
            channel=channel,
            axes=axes,
        )
        check_json(json_file)
        report = prove_seams(slide, settings, full, windows)
        print_seams(report, bound, Console())
        write_json(json_file, report.to_json())
    raise typer.Exit(not report.holds(bound))


@app.command("compile")
def compile_model(
    model: o.Model = Settings.model,
    backend: o.BackendName = Settings.backend,
    precision: o.Precision = Settings.precision,
    device: o.Device = Settings.device,
    tile: Annotated[int, typer.Option("--tile", min=1, help="Side of the timed tiles in px.")] = RACE_TILE,
    batch: o.BatchSize = Settings.batch,
    threads: o.Threads = None,
    again: Annotated[bool, typer.Option("--again", help="Race anew, even if a result is known.")] = False,
    list_entries: Annotated[bool, typer.Option("--list", help="List what is kept, and do nothing else.")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="Remove what is kept, and do nothing else.")] = False,
    json_file: o.Json = None,
    debug: o.Debug = False,
) -> None:
    """Race the backends for a model on this machine, hold each against torch fp32, and keep the result."""
    from cellseg_batch.engine.compiling import clear_artefacts, print_artefacts, run_race

    with plain_errors(debug):
        check_json(json_file)
        if list_entries:
            print_artefacts(Console())
        elif clear:
            clear_artefacts(Console())
        else:
            settings = Settings(
                model=model, backend=backend, precision=precision, device=device, batch=batch, threads=threads
            )
            write_json(json_file, run_race(settings, tile, again, Console()))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A TIFF, OME-TIFF, SVS, PNG or plain zarr, or a folder of them.")],
    target: Annotated[Path, typer.Argument(metavar="DST.zarr", help="The store to write.")],
    axes: o.Axes = None,
    workers: o.Workers = Settings.workers,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the way.")] = False,
    debug: o.Debug = False,
) -> None:
    """Write SOURCE as OME-Zarr 0.5, sharded and with a pyramid; an unfinished conversion goes on where it stopped."""
    from cellseg_batch.engine.convert import print_conversions

    with plain_errors(debug):
        failed = print_conversions(source, target, axes, workers, overwrite, Console())
    raise typer.Exit(failed > 0)


@app.command()
def doctor(debug: o.Debug = False) -> None:
    """Show this machine's devices and backends, what is missing and how to get it."""
    from cellseg_batch.engine.doctor import print_diagnosis

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
