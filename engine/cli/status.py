"""``cellseg-batch status``: print the progress of a run."""

from __future__ import annotations

import math
from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cellseg_batch.engine.cli.console import as_text, check_json, counted, plain_errors, print_shared, write_json
from cellseg_batch.engine.cli.flags import Debug, Json, Name, Output, RunInputs
from cellseg_batch.engine.settings import Settings

if TYPE_CHECKING:
    from cellseg_batch.engine.reports.status import Status

_MOST_ROWS = 30
_COLOURS = {"done": "green", "running": "cyan", "failed": "red", "stopped": "yellow"}


def status(
    slides: RunInputs,
    output: Output = None,
    name: Name = Settings.name,
    json_file: Json = None,
    debug: Debug = False,
) -> None:
    """Say how far the run over SLIDES is, on whatever machine it runs; exit 1 if an image failed."""
    from cellseg_batch.engine.reports.status import read_status

    with plain_errors(debug):
        check_json(json_file)
        status = read_status(slides, name, output)
        print_status(status, Console())
        write_json(json_file, status.to_json())
    raise typer.Exit(bool(status.counts["failed"]))


def print_status(status: Status, console: Console) -> None:
    """Print a row for each image, the counts, the rate and the time left.

    If there are many images, those that are neither done nor waiting come first, and the rest are counted.
    """
    table = Table(title="cellseg-batch status", title_justify="left")
    for heading in ("image", "state", "blocks", "done"):
        table.add_column(heading, overflow="fold")
    slides = status.slides
    if len(slides) > _MOST_ROWS:
        slides = sorted(slides, key=lambda slide: slide.state in ("done", "waiting"))
    for slide in slides[:_MOST_ROWS]:
        share = f"{_percent(slide.pixels_done, slide.pixels)} %" if slide.pixels else ""
        blocks = f"{slide.blocks_done:,} of {slide.blocks:,}" if slide.blocks else ""
        table.add_row(as_text(slide.path), Text(slide.state, _COLOURS.get(slide.state, "")), blocks, share)
    console.print(table)
    rest = Counter(slide.state for slide in slides[_MOST_ROWS:])
    if rest:
        console.print(f"and {_counts(rest)}", highlight=False)
    failed = ((slide.path, slide.reason) for slide in status.slides if slide.state == "failed")
    print_shared(console, "failed", "red", failed)
    left = status.seconds_left
    rate = f"; {status.mpx_per_s:.2f} Mpx/s" if status.mpx_per_s else ""
    eta = f", about {timedelta(seconds=math.ceil(left))} left" if left is not None else ""
    images = f"{counted(len(status.slides), 'image')}: {_counts(status.counts)}"
    console.print(f"{images}{rate}{eta}", highlight=False, soft_wrap=True)


def _percent(done: float, pixels: int) -> int:
    """Whole percent, rounded down, so that 100 is the end."""
    return math.floor(100 * done / pixels + 1e-6)


def _counts(states: Counter[str]) -> str:
    return ", ".join(f"{count} {state}" for state, count in states.most_common())
