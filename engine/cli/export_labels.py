"""``cellseg-batch export-labels``: write labels as OME-TIFF for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cellseg_batch.engine.cli.console import plain_errors, print_text
from cellseg_batch.engine.cli.flags import Axes, Debug, Name, Output, Slides, to_path
from cellseg_batch.engine.settings import Settings


def export_labels(
    slides: Slides,
    out: Annotated[Path, typer.Option("--out", parser=to_path, metavar="FILE", help="The OME-TIFF to write.")],
    name: Name = Settings.name,
    output: Output = None,
    axes: Axes = None,
    debug: Debug = False,
) -> None:
    """Write the labels of the one image in SLIDES as OME-TIFF: tiled, with a pyramid, compressed by zstd."""
    from cellseg_batch.engine.reports.export_labels import export_labels

    with plain_errors(debug):
        exported = export_labels(slides, out, name, output, axes)
        sizes = ", ".join(" x ".join(map(str, shape)) for shape in exported.shapes)
        size = "unknown" if exported.pixel_size_um is None else f"{exported.pixel_size_um:.4g} µm"
        print_text(f"{out}: labels of {exported.path}, {sizes} px; pixel size {size}")
