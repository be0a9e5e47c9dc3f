"""``cellseg-batch run``: segment images, showing progress during the run and figures at the end."""

from __future__ import annotations

import math
import shlex
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cellseg_batch.engine import IMPORTED_AT
from cellseg_batch.engine.cli.config_file import Config, WriteConfig, write_flags
from cellseg_batch.engine.cli.console import (
    as_flags,
    as_text,
    check_json,
    counted,
    print_shared,
    say_draining,
    write_json,
)
from cellseg_batch.engine.cli.flags import EVERY, Json, Log, Quiet, SlidesOrManifest, Verbose, takes_settings
from cellseg_batch.engine.machine import bound_heaps
from cellseg_batch.engine.settings import Settings

if TYPE_CHECKING:
    from cellseg_batch.engine.run.results import PlateReport, RunReport, SlideReport

_MEGA = 1e6
_STATES = ("done", "skipped", "held", "failed")
_COLOURS = {"held": "yellow", "failed": "red"}


@takes_settings(*EVERY)
def run(
    context: typer.Context,
    settings: Settings,
    slides: SlidesOrManifest = None,
    config_file: Config = None,
    write_config: WriteConfig = None,
    json_file: Json = None,
    log_file: Log = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Segment every image that SLIDES hold; an unfinished run goes on where it stopped."""
    from cellseg_batch.engine.cli.progress import RunProgress
    from cellseg_batch.engine.cli.run_log import logged
    from cellseg_batch.engine.run.campaign import run as run_campaign
    from cellseg_batch.engine.scheduling.signals import Stop

    check_json(json_file)
    write_flags(write_config, context, settings)
    bound_heaps()
    stop = Stop(draining=say_draining)
    progress = RunProgress(Console(), verbosity=verbose - quiet)
    with logged(log_file, progress) as observer:
        with stop.on_signals(), progress:
            report = run_campaign(slides or [], settings, observer, IMPORTED_AT, stop)
            if settings.objects:
                from cellseg_batch.engine.reports.plates import summarise_plates  # slow, as it imports pyarrow

                report = summarise_plates(report, settings)
        print_failures(report, Console(stderr=True))
        if not quiet:
            print_report(report, Console(), settings)
        write_json(json_file, report.to_json())
    raise typer.Exit(report.status == "failed")


def print_failures(report: RunReport, console: Console) -> None:
    """Print what to know, then what is held, then what failed: what needs the reader comes last, nearest to the end.

    What many images share is printed once.
    """
    notes = [(slide.path, note) for slide in report.slides for note in slide.notes]
    print_shared(console, "note", "yellow", notes, named=1)
    for state, colour in _COLOURS.items():
        reasons = [(slide.path, slide.reason) for slide in report.slides if slide.status == state]
        print_shared(console, state, colour, reasons)


def print_report(report: RunReport, console: Console, settings: Settings) -> None:
    """Print the figures of the run that are known, and as the last line how many images are in each state."""
    if not report.slides:
        console.print(f"nothing to do: {'no image has failed' if settings.retry_failed else 'this shard has no image'}")
        return
    table = Table(title="cellseg-batch run", show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in report.stages.items() if seconds)
    for name, value in (
        ("blocks, tiles", _tiles(report.slides)),
        ("tissue", _tissue(report.slides)),
        ("model", _model(report)),
        ("time", _time(report)),
        ("rate", _rate(report)),
        ("busy seconds", stages),
        ("objects", _objects(report.slides)),
        ("foreground", _foreground(report.slides)),
        ("classes", _classes(report.slides)),
        ("peak memory", _memory(report, settings)),
        ("labels", _paths("labels", report.slides)),
        ("cells", _paths("cells", report.slides)),
        *(("plate", _plate(plate)) for plate in report.plates),
        ("picture", _picture(report.slides, settings)),
    ):
        if value:
            table.add_row(name, as_text(as_flags(value)))
    console.print(table)
    counts = {state: sum(slide.status == state for slide in report.slides) for state in _STATES}
    states = [Text(f"{count} {state}", _COLOURS.get(state, "")) for state, count in counts.items() if count]
    console.print(Text(", ").join(states), soft_wrap=True)


def _tiles(slides: list[SlideReport]) -> str:
    slides = [slide for slide in slides if slide.status == "done"]
    blocks, tiles = sum(slide.blocks for slide in slides), sum(slide.tiles for slide in slides)
    skipped = sum(slide.skipped_tiles for slide in slides)
    outside = sum(slide.outside_tiles for slide in slides)
    left_out = [f"{count} {what}" for count, what in ((skipped, "empty"), (outside, "outside the region")) if count]
    note = f" ({' and '.join(left_out)} ones were left out)" if left_out else ""
    return f"{blocks}, {tiles}{note}" if blocks else ""


def _tissue(slides: list[SlideReport]) -> str:
    shares = [
        slide.tissue_area / math.prod(slide.shape[-2:])
        for slide in slides
        if slide.tissue_area is not None and slide.shape is not None
    ]
    if not shares:
        return ""
    where = f" (mean over {len(shares)} images on glass)" if len(shares) > 1 else " of the one image on glass"
    return f"{100 * sum(shares) / len(shares):.1f} %{where if len(slides) > 1 else ' of the slide'}"


def _model(report: RunReport) -> str:
    if not report.backend:
        return ""
    tile = f"tile {report.tile[0]} x {report.tile[1]}, " if report.tile else ""
    race = " (likely the fastest; cellseg-batch compile races all)" if report.short_race else ""
    return f"{report.backend} {report.precision}{race}, {tile}margin {report.margin} px"


def _time(report: RunReport) -> str:
    compiling = f", and {report.compile_seconds:.1f} s to compile" if report.compile_seconds else ""
    return f"{report.seconds:.1f} s{compiling}"


def _rate(report: RunReport) -> str:
    if not report.mpx_per_s:
        return ""
    return f"{report.mpx_per_s:.2f} Mpx/s end to end, {report.engine_mpx_per_s:.2f} Mpx/s in the model"


def _foreground(slides: list[SlideReport]) -> str:
    shares = [slide.foreground_fraction for slide in slides if slide.foreground_fraction is not None]
    return f"{100 * sum(shares) / len(shares):.1f} % (mean over images)" if shares else ""


def _classes(slides: list[SlideReport]) -> str:
    shares = [slide.classes for slide in slides if slide.classes]
    names = shares[0] if shares else {}
    means = (f"{name} {100 * sum(share[name] for share in shares) / len(shares):.1f} %" for name in names)
    return ", ".join(means) + (" (mean over images)" if shares else "")


def _memory(report: RunReport, settings: Settings) -> str:
    planned = f" (announced: at most {report.planned_peak_bytes / _MEGA:.0f} MB)" if report.planned_peak_bytes else ""
    process = "" if settings.scheduler == "threads" else ", of the process that takes most"
    refused = any("`max_memory`" in slide.reason for slide in report.slides)
    tried = "; one tile of what is refused was tried, to see what it takes" if refused else ""
    return f"{report.peak_rss_bytes / _MEGA:.0f} MB{planned}{process}{tried}"


def _objects(slides: list[SlideReport]) -> str:
    counts = [slide.objects for slide in slides if slide.objects is not None]
    if not counts:
        return "not counted; --instances does" if any(slide.labels for slide in slides) else ""
    unreached = sum(slide.unreached_pixels for slide in slides)
    note = f", and {unreached} px of foreground that belong to none" if unreached else ""
    return f"{sum(counts)}{note}"


def _paths(output: str, slides: list[SlideReport]) -> str:
    written = [slide.outputs[output] for slide in slides if output in slide.outputs and slide.status != "failed"]
    if not written:
        return ""
    return written[0] if len(written) == 1 else f"{written[0]} and {len(written) - 1} more"


def _picture(slides: list[SlideReport], settings: Settings) -> str:
    """The command that shows the labels of the first image that has some."""
    first = next((slide.path for slide in slides if slide.labels and slide.status != "failed"), None)
    if first is None:
        return ""
    words = ["cellseg-batch", "preview", first, "--out", "picture.png"]
    words += ["--name", settings.name] if settings.name != Settings.name else []
    words += ["--output", str(settings.output)] if settings.output is not None else []
    return shlex.join(words)


def _plate(plate: PlateReport) -> str:
    counts = f"{counted(plate.wells, 'well')}, {counted(plate.fields, 'field')}, {plate.failed} of them failed"
    return f"{plate.folder}: {counts}" if plate.folder else f"{plate.plate}: {counts}; no summary: {plate.reason}"
