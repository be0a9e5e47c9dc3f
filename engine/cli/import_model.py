"""``cellseg-batch import-model``: make a bundle of a model that was trained elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cellseg_batch.engine.cli.check_model import print_check
from cellseg_batch.engine.cli.console import check_json, plain_errors, print_text, write_json
from cellseg_batch.engine.cli.flags import Debug, Json, Threads


def import_model(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC", help="An .onnx file, or a bioimage.io package (folder or zip) with ONNX weights."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="BUNDLE", help="The bundle's folder to write.")],
    card: Annotated[
        Path | None, typer.Option("--card", metavar="TOML", help="What the file or package does not say of the model.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="Name of the model; default: the card's, the package's, or the folder's."),
    ] = None,
    threads: Threads = None,
    json_file: Json = None,
    debug: Debug = False,
) -> None:
    """Make a bundle of a model that was trained elsewhere, and check it; nothing of it is ever unpickled."""
    from cellseg_batch.engine.reports.check_model import check_model
    from cellseg_batch.engine.reports.import_model import import_model

    with plain_errors(debug):
        check_json(json_file)
        imported = import_model(source, out, card, name)
        for note in imported.notes:
            print_text(f"note: {note}")
        check = check_model(str(out), threads)
        print_check(check)
        write_json(json_file, check.to_json())
        print_text(f"now: cellseg-batch run SLIDES --model {out}")
