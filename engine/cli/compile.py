"""``cellseg-batch compile``: the race as a table, and what is kept on disk."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cellseg_batch.engine.backend_table import KNOWN_PRECISIONS
from cellseg_batch.engine.errors import BackendError
from cellseg_batch.engine.inference.race import load_or_race, request_of
from cellseg_batch.engine.inference.race_result import Candidate, RaceResult
from cellseg_batch.engine.models import load_model
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.storage.cache import Artefacts


def run_race(settings: Settings, tile: int | None, again: bool, console: Console) -> dict[str, Any]:
    """Race what was asked for, with tiles of ``tile`` px if it says so, and print the table; returns every figure.

    Raises:
        BackendError: nothing that was asked for by name can be used.
    """
    bundle = load_model(settings.model)
    request = replace(request_of(settings, bundle.card), batch=settings.batch, complete=True)
    if tile is not None:
        request = replace(request, tile=(tile, tile))
    with console.status("racing the backends"):
        race_result = load_or_race(request, bundle, Artefacts(), lambda: None, again)
    try:
        winner = race_result.pick(settings.backend, settings.precision, settings.gate)
    except BackendError:
        _print_race(race_result, None, console)
        raise
    _print_race(race_result, winner, console)
    return race_result.to_json()


def _print_race(race_result: RaceResult, winner: Candidate | None, console: Console) -> None:
    count, _, height, width = race_result.shape
    table = Table(
        title=f"{race_result.request.model}: {count} x {height} x {width} px, {race_result.request.threads} threads, "
        f"{race_result.processor}, {race_result.date}",
        title_justify="left",
    )
    for heading in ("backend", "Mpx/s", "max |dp|", "mean |dp|", "flipped", "object F1", "objects", ""):
        table.add_column(heading, overflow="fold")
    for one in race_result.candidates:
        if one.parity is None:
            table.add_row(one.name, "", "", "", "", "", "", escape(one.missing))
            continue
        verdict = "winner" if one == winner else "on request" if KNOWN_PRECISIONS[one.precision].on_request else ""
        table.add_row(
            one.name,
            f"{one.mpx_per_s:.2f}",
            f"{one.parity.max_dp:.1e}",
            f"{one.parity.mean_dp:.1e}",
            f"{one.parity.flipped:.1e}",
            f"{one.parity.object_f1:.4f}",
            f"{one.parity.object_change:+.2%}",
            verdict if one.passed else "refused by the gate",
        )
    objects = max((one.parity.objects for one in race_result.candidates if one.parity is not None), default=0)
    console.print(table, f"compared with torch fp32 on {objects} objects", highlight=False)


def print_artefacts(console: Console) -> None:
    """Print a row for each entry of the cache."""
    artefacts = Artefacts()
    table = Table("what", "model", "MB", "state", "made for", title=str(artefacts.folder), title_justify="left")
    for entry in artefacts.entries():
        rest = {name: value for name, value in entry.key.items() if name not in ("what", "model", "versions", "sha256")}
        about = ", ".join(f"{name} {value}" for name, value in rest.items())
        what, model = str(entry.key.get("what", "?")), str(entry.key.get("model", "?"))
        table.add_row(what, model, f"{entry.size / 1e6:.1f}", "sound" if entry.sound else "damaged", about)
    console.print(table)


def clear_artefacts(console: Console) -> None:
    """Remove every entry of the cache."""
    artefacts = Artefacts()
    console.print(f"{artefacts.folder}: {artefacts.clear()} entries removed", highlight=False)
