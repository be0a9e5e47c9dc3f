"""The commands around a run: what it would take, how far it is, whether its output is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cellseg_batch.engine.cli import options as o
from cellseg_batch.engine.cli.console import check_json, plain_errors, write_json
from cellseg_batch.engine.cli.flags import ENGINE, SLIDE, TILES, takes_settings
from cellseg_batch.engine.machine import bound_heaps
from cellseg_batch.engine.settings import Settings


@takes_settings(*ENGINE, *TILES, "max_memory", *SLIDE, "output", "name", "instances", "probability")
def plan(
    slides: o.Slides,
    settings: Settings,
    processes: Annotated[int, typer.Option("--processes", min=1, help="Worker processes that share the work.")] = 1,
    json_file: o.Json = None,
) -> None:
    """Say what segmenting SLIDES would take: blocks, bytes, files, memory and time; exit 1 if an image is refused."""
    from cellseg_batch.engine.reports.plan import estimate, print_estimate

    check_json(json_file)
    bound_heaps()  # as a run does, whose memory it foretells
    console = Console()
    found = estimate(slides, settings, processes, lambda: console.print("racing the backends, once ..."))
    print_estimate(found, console)
    write_json(json_file, found.to_json())
    raise typer.Exit(bool(found.refused))


def status(
    slides: o.RunOf,
    output: o.Output = None,
    name: o.Name = Settings.name,
    json_file: o.Json = None,
    debug: o.Debug = False,
) -> None:
    """Say how far the run over SLIDES is, on whatever machine it runs; exit 1 if an image failed."""
    from cellseg_batch.engine.reports.status import print_status, read_status

    with plain_errors(debug):
        check_json(json_file)
        found = read_status(slides, name, output)
        print_status(found, Console())
        write_json(json_file, found.to_json())
    raise typer.Exit(bool(found.counts["failed"]))


def verify(
    slides: o.RunOf,
    output: o.Output = None,
    name: o.Name = Settings.name,
    workers: Annotated[
        int, typer.Option("--workers", min=1, help="Blocks that are read at a time.")
    ] = Settings.workers,
    forget: Annotated[
        bool, typer.Option("--forget", help="Let the next run make damaged blocks again; of finished instances, all.")
    ] = False,
    json_file: o.Json = None,
    debug: o.Debug = False,
) -> None:
    """Read back every block of a run and compare it with its checksum; exit 1 if one is damaged."""
    from cellseg_batch.engine.reports.verify import print_verdict
    from cellseg_batch.engine.reports.verify import verify as verify_output

    with plain_errors(debug):
        check_json(json_file)
        found = verify_output(slides, name, output, workers, forget)
        print_verdict(found, Console())
        write_json(json_file, found.to_json())
    raise typer.Exit(bool(found.damages))


def report(
    slides: o.RunOf,
    out: Annotated[Path, typer.Option("--out", metavar="FILE.html", help="The page to write.")] = Path("report.html"),
    output: o.Output = None,
    name: o.Name = Settings.name,
    debug: o.Debug = False,
) -> None:
    """Write one HTML page about the run over SLIDES, which may still go on: figures, charts, failures, pictures."""
    from cellseg_batch.engine.reports.report import write_page

    with plain_errors(debug):
        found = write_page(slides, out, name, output)
        Console().print(f"{out}: {len(found.slides)} images", highlight=False, soft_wrap=True)
