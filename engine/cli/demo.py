"""``cellseg-batch demo``: write a small store of images to try things on."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from cellseg_batch.engine.cli.console import plain_errors, print_text
from cellseg_batch.engine.cli.flags import Debug


def demo(
    out: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("slides.zarr"), debug: Debug = False
) -> None:
    """Write a small OME-Zarr store of real microscopy images to try things on."""
    from cellseg_batch.engine.slides.demo import write_demo

    with plain_errors(debug):
        names = write_demo(out)
        print_text(f"{out}: {', '.join(names)}\nnow:")
        store = shlex.quote(str(out))
        for command in (
            f"run {store} --objects --name cells",
            f"preview {store} --name cells --out picture.png",
            f"report {store} --name cells",
        ):
            print_text(f"  cellseg-batch {command}")
