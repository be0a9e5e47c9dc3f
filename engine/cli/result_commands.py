"""The commands that look at what a run has written: each turns its flags into one call."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cellseg_batch.engine.cli import options as o
from cellseg_batch.engine.cli.console import plain_errors
from cellseg_batch.engine.settings import Settings


def preview(
    slide: o.Slide,
    out: Annotated[Path, typer.Option("--out", help="The PNG to write.")],
    box: o.BoxSides = None,
    name: o.Name = Settings.name,
    output: o.Output = None,
    channel: o.Channel = None,
    axes: o.Axes = None,
    debug: o.Debug = False,
) -> None:
    """Write a picture of SLIDE with the outlines of its labels."""
    from cellseg_batch.engine.reports.preview import write_preview

    with plain_errors(debug):
        seen = write_preview(slide, out, o.sides(box), name, output, channel, axes)
        Console().print(
            f"{out}: {seen.shape[1]} x {seen.shape[0]} px, {seen.zoom:.3g} px for each px of the labels",
            highlight=False,
        )


def export_objects(
    slides: o.Slides,
    kind: Annotated[str, typer.Option("--format", help="csv, anndata or geojson (one image, for QuPath).")],
    out: Annotated[Path, typer.Option("--out", parser=o.place, metavar="FILE", help="The file to write.")],
    name: o.Name = Settings.name,
    output: o.Output = None,
    axes: o.Axes = None,
    debug: o.Debug = False,
) -> None:
    """Write the table of objects that run --objects made of SLIDES as a file for other programs."""
    from cellseg_batch.engine.reports.export_objects import export_objects

    with plain_errors(debug):
        done = export_objects(slides, kind, out, name, output, axes)
        Console().print(f"{out}: {done.objects} objects of {done.images} images", highlight=False)
        for path in done.without:
            Console(stderr=True).print(f"note  {path}: no table of objects", highlight=False, soft_wrap=True)
