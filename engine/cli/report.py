"""``cellseg-batch report``: write an HTML page about a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cellseg_batch.engine.cli.console import as_flags, check_json, counted, plain_errors, print_text
from cellseg_batch.engine.cli.flags import Debug, Name, Output, RunInputs
from cellseg_batch.engine.settings import Settings


def report(
    slides: RunInputs,
    out: Annotated[Path, typer.Option("--out", metavar="FILE.html", help="The page to write.")] = Path("report.html"),
    output: Output = None,
    name: Name = Settings.name,
    debug: Debug = False,
) -> None:
    """Write one HTML page about the run over SLIDES, which may still go on: figures, charts, failures, pictures."""
    from cellseg_batch.engine.reports.report import write_page

    with plain_errors(debug):
        check_json(out, "--out")
        status = write_page(slides, out, name, output, as_flags)
        print_text(f"{out}: {counted(len(status.slides), 'image')}")
