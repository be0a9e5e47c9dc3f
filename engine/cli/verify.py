"""``cellseg-batch verify``: check the output of a run against its checksums."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from cellseg_batch.engine.cli.console import check_json, plain_errors, print_line, write_json
from cellseg_batch.engine.cli.flags import Debug, Json, Name, Output, RunInputs
from cellseg_batch.engine.settings import Settings

if TYPE_CHECKING:
    from cellseg_batch.engine.reports.verify import Verdict


_MOST_LINES = 10


def verify(
    slides: RunInputs,
    output: Output = None,
    name: Name = Settings.name,
    workers: Annotated[
        int, typer.Option("--workers", min=1, help="Blocks that are read at a time.")
    ] = Settings.workers,
    forget: Annotated[
        bool, typer.Option("--forget", help="Let the next run make damaged blocks again; of finished instances, all.")
    ] = False,
    json_file: Json = None,
    debug: Debug = False,
) -> None:
    """Read back every block of a run and compare it with its checksum; exit 1 if a block or an image has changed."""
    from cellseg_batch.engine.reports.verify import verify as verify_output

    with plain_errors(debug):
        check_json(json_file)
        verdict = verify_output(slides, name, output, workers, forget)
        print_verdict(verdict, Console())
        write_json(json_file, verdict.to_json())
    raise typer.Exit(not verdict.is_whole)


def print_verdict(verdict: Verdict, console: Console) -> None:
    """Print the first damaged blocks of each journal, the unreadable and unfinished journals, and the counts."""
    for journal, number in Counter(damage.journal for damage in verdict.damages).items():
        damages = (damage for damage in verdict.damages if damage.journal == journal)
        for damage in islice(damages, _MOST_LINES):
            print_line(console, "damaged", "red", f"{journal}: {damage.part} {damage.number}: {damage.reason}")
        if number > _MOST_LINES:
            print_line(console, "damaged", "red", f"{journal}: {number - _MOST_LINES:,} more; --json lists them all")
    for reason in verdict.unreadable:
        print_line(console, "unreadable", "red", reason)
    for image in verdict.changed:
        reason = "it has changed since it was segmented; run with `overwrite` to segment it as it is now"
        print_line(console, "changed", "red", f"{image}: {reason}")
    for journal in verdict.unfinished:
        print_line(console, "unfinished", "yellow", journal)
    console.print(
        f"{verdict.checked} blocks and shards of pyramids read back, {len(verdict.damages)} damaged", highlight=False
    )
