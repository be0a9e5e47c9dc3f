"""``cellseg-batch export-objects``: write tables of objects for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cellseg_batch.engine.cli.console import counted, plain_errors, print_line, print_text
from cellseg_batch.engine.cli.flags import Axes, Debug, Name, Output, Slides, to_path
from cellseg_batch.engine.settings import Settings


def export_objects(
    slides: Slides,
    kind: Annotated[
        str, typer.Option("--format", help="csv, anndata, geojson (one image, for QuPath), spatialdata or ngio.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            parser=to_path,
            metavar="FILE",
            help="The file to write, compressed if a .geojson.gz; a .zarr for spatialdata; none for ngio.",
        ),
    ] = None,
    name: Name = Settings.name,
    output: Output = None,
    axes: Axes = None,
    debug: Debug = False,
) -> None:
    """Write the table of objects that run --objects made of SLIDES for other programs.

    SpatialData also gets labels and outlines. A table for ngio goes to tables/ of each image, beside its labels.
    """
    from cellseg_batch.engine.reports.export_objects import export_objects

    with plain_errors(debug):
        exported = export_objects(slides, kind, out, name, output, axes)
        print_text(
            f"{out or f'tables/{name}'}: {counted(exported.objects, 'object')} of {counted(exported.images, 'image')}"
        )
        for path in exported.without:
            print_line(Console(stderr=True), "note", "yellow", f"{path}: no table of objects")
