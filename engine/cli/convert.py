"""``cellseg-batch convert``: write any readable image as OME-Zarr."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from cellseg_batch.engine.cli.console import plain_errors, print_line, say_draining
from cellseg_batch.engine.cli.flags import Axes, Debug, Workers, to_path
from cellseg_batch.engine.settings import Settings

if TYPE_CHECKING:
    from cellseg_batch.engine.slides.convert import Conversion

_COLOURS = {"failed": "red", "held": "yellow"}


def convert(
    source: Annotated[
        Path,
        typer.Argument(parser=to_path, metavar="SOURCE", help="An image that `run` reads, or a folder of them."),
    ],
    target: Annotated[Path, typer.Argument(parser=to_path, metavar="DST.zarr", help="The store to write.")],
    axes: Axes = None,
    workers: Workers = Settings.workers,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the way.")] = False,
    debug: Debug = False,
) -> None:
    """Write SOURCE as OME-Zarr 0.5, sharded and with a pyramid; an unfinished conversion goes on where it stopped."""
    from rich.progress import Progress

    from cellseg_batch.engine.scheduling.signals import Stop
    from cellseg_batch.engine.slides.convert import convert as convert_images

    console, stop, failed = Console(), Stop(draining=say_draining), False
    with (
        plain_errors(debug),
        stop.on_signals(),
        Progress(console=console, disable=not console.is_terminal, transient=True) as bar,
    ):
        task = bar.add_task("", total=None)
        for conversion in convert_images(
            source,
            target,
            axes=axes,
            workers=workers,
            overwrite=overwrite,
            found=lambda pixels: bar.update(task, total=pixels),
            advanced=lambda pixels: bar.advance(task, pixels),
            stop=stop,
        ):
            print_conversion(conversion, console)
            failed = failed or conversion.status == "failed"
    raise typer.Exit(failed)


def print_conversion(conversion: Conversion, console: Console) -> None:
    """Print a line about an image: its source, its target, and the shapes of its levels or why it was not written."""
    sizes = ", ".join(" x ".join(map(str, shape)) for shape in conversion.shapes)
    line = f"{conversion.source} -> {conversion.target}: {conversion.reason or sizes}"
    print_line(console, conversion.status, _COLOURS.get(conversion.status, "green"), line)
