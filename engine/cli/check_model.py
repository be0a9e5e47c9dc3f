"""``cellseg-batch check-model``: say how a model fares on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from cellseg_batch.engine.cli.compile import print_race
from cellseg_batch.engine.cli.console import check_json, plain_errors, print_text, write_json
from cellseg_batch.engine.cli.flags import Debug, Json, Threads
from cellseg_batch.engine.settings import Settings

if TYPE_CHECKING:
    from cellseg_batch.engine.reports.check_model import ModelCheck


def check_model(
    model: Annotated[str, typer.Argument(metavar="BUNDLE", help="A shipped model's name, or a bundle's folder.")],
    threads: Threads = None,
    json_file: Json = None,
    debug: Debug = False,
) -> None:
    """Say what a model's pixels see, whether the backends agree on it, and how fast each is."""
    from cellseg_batch.engine.reports.check_model import check_model

    with plain_errors(debug):
        check_json(json_file)
        check = check_model(model, threads)
        print_check(check)
        write_json(json_file, check.to_json())


def print_check(check: ModelCheck) -> None:
    """Print what a model takes and gives, what to know of it, and a row for each backend."""
    card, size = check.card, check.card.input.size
    sides = f"of {size.fixed} px" if size.fixed else f"from {size.min} px in steps of {size.step}"
    exact = "none" if card.exact_margin is None else f"{card.exact_margin} px"
    print_text(
        f"{card.name}: {', '.join(card.input.channels)} in tiles {sides}, {', '.join(card.output.channels)} out, "
        f"decoder {card.decoder}; margin {card.margin} px, exact margin {exact}, stride {card.total_stride} px"
    )
    for note in check.notes:
        print_text(f"note: {note}")
    for agreement in check.agreements:
        print_text(str(agreement))
    print_race(check.race_result, Settings(), Console())
