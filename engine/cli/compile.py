"""``cellseg-batch compile``: race the backends and print a table; list or clear the cache of compiled networks."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cellseg_batch.engine.cli.console import check_json, print_shared, write_json
from cellseg_batch.engine.cli.flags import ENGINE, Json, takes_settings
from cellseg_batch.engine.errors import BackendError
from cellseg_batch.engine.settings import Settings

if TYPE_CHECKING:
    from cellseg_batch.engine.inference.backends.gate import Parity
    from cellseg_batch.engine.inference.compiled import CompiledEntry
    from cellseg_batch.engine.inference.race_result import Candidate, RaceResult


@takes_settings(*ENGINE, "batch")
def compile_model(
    settings: Settings,
    tile: Annotated[
        int | None, typer.Option("--tile", min=1, help="Side of the timed tiles in px; runs use the usual race.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Race anew, even if a result is known.")] = False,
    list_entries: Annotated[bool, typer.Option("--list", help="List what is kept, and do nothing else.")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="Remove what is kept, and do nothing else.")] = False,
    json_file: Json = None,
) -> None:
    """Race the backends for a model on this machine, hold each against the fp32 reference, and keep the result."""
    from cellseg_batch.engine.inference.compiled import clear_compiled, list_compiled, race_every_precision

    check_json(json_file)
    console = Console()
    if list_entries:
        print_compiled(*list_compiled(), console)
    elif clear:
        folder, count = clear_compiled()
        console.print(f"{folder}: {count} entries removed", highlight=False)
    else:
        with console.status("racing the backends"):
            race_result = race_every_precision(settings, tile, again)
        print_race(race_result, settings, console)
        race_result.pick(settings.backend, settings.precision, settings.gate)  # raises an error if there is no winner
        write_json(json_file, race_result.to_json())


def print_race(race_result: RaceResult, settings: Settings, console: Console) -> None:
    """Print a row for each candidate that ran, the fastest first, and a line on those that did not, by reason.

    The winner is the candidate that ``settings`` picks.
    """
    count, _, height, width = race_result.shape
    table = Table(
        title=f"{race_result.request.model}: {count} x {height} x {width} px, {race_result.request.threads} threads, "
        f"{race_result.processor}, {race_result.date}",
        title_justify="left",
    )
    for heading in ("backend", "Mpx/s", "max |dp|", "mean |dp|", "flipped", "object F1", "objects", ""):
        table.add_column(heading, overflow="fold")
    winner = None
    with suppress(BackendError):
        winner = race_result.pick(settings.backend, settings.precision, settings.gate)
    objects = 0
    for candidate in race_result.candidates:
        if candidate.parity is not None:
            objects = max(objects, candidate.parity.objects)
            table.add_row(*map(Text, _row(candidate, candidate.parity, candidate == winner)))
    console.print(table, f"compared with the fp32 reference on {objects} objects", highlight=False)
    missing = ((one.name, one.missing) for one in race_result.candidates if one.parity is None)
    print_shared(console, "missing", "", missing)


def _row(candidate: Candidate, parity: Parity, wins: bool) -> tuple[str, ...]:
    from cellseg_batch.engine.backend_table import KNOWN_PRECISIONS

    verdict = "winner" if wins else "on request" if KNOWN_PRECISIONS[candidate.precision].on_request else ""
    return (
        candidate.name,
        f"{candidate.mpx_per_s:.2f}",
        f"{parity.max_dp:.1e}",
        f"{parity.mean_dp:.1e}",
        f"{parity.flipped:.1e}",
        f"{parity.object_f1:.4f}",
        f"{parity.object_change:+.2%}",
        verdict if candidate.passed else "refused by the gate",
    )


def print_compiled(folder: Path, entries: list[CompiledEntry], console: Console) -> None:
    """Print a row for each entry of the cache."""
    table = Table(title=str(folder), title_justify="left")
    for heading in ("what", "model", "MB", "state", "made for"):
        table.add_column(heading, overflow="fold")
    for entry in entries:
        state = "sound" if entry.sound else "damaged"
        table.add_row(entry.what, entry.model, f"{entry.size / 1e6:.1f}", state, Text(entry.made_for))
    console.print(table)
