"""``cellseg-batch bench``: measure this machine, and compare two results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cellseg_batch.engine.cli.console import check_json, note_flags, plain_errors
from cellseg_batch.engine.cli.flags import ENGINE, Debug, takes_settings
from cellseg_batch.engine.machine import bound_heaps
from cellseg_batch.engine.settings import Settings

if TYPE_CHECKING:
    from cellseg_batch.engine.profiling.bench_compare import Comparison, Ratio

bench = typer.Typer(invoke_without_command=True, rich_markup_mode=None)


@bench.callback()
@note_flags
@takes_settings(*ENGINE, "tile")
def run_bench(
    settings: Settings,
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the result goes.")] = Path("bench.json"),
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds of every measurement.")] = 5,
    side: Annotated[int, typer.Option("--side", min=256, help="Side of the slide in px.")] = 4096,
) -> None:
    """Measure this machine on slides that are the same everywhere, and write rates and conditions as JSON."""
    if context.invoked_subcommand is not None:
        return
    import tempfile

    from cellseg_batch.engine.cli.progress import RunProgress
    from cellseg_batch.engine.profiling.bench import run_suite
    from cellseg_batch.engine.profiling.bench_conditions import save

    check_json(out, "--out")
    bound_heaps()  # as `run` does, which this measures
    with tempfile.TemporaryDirectory(prefix="cellseg-bench-") as folder:
        result = run_suite(settings, rounds, side, Path(folder), RunProgress(Console(), verbosity=-1))
    save(out, **result)
    for row in result["rows"]:
        Console().print(f"{row['mpx_per_s']:9.2f} Mpx/s  {row['name']}", highlight=False)
    Console().print(str(out), highlight=False)


@bench.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="A result of bench.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="A later one.")],
    debug: Debug = False,
) -> None:
    """Compare two results; exit 1 when B is slower than A beyond noise."""
    from cellseg_batch.engine.profiling.bench_compare import compare_results, load_result

    with plain_errors(debug):
        old, new = load_result(first), load_result(second)
        rows = compare_results(old, new)
        print_comparison(rows, old, new, Console())
    raise typer.Exit(any(row.regressed for row in rows))


def print_comparison(rows: list[Comparison], first: dict[str, Any], second: dict[str, Any], console: Console) -> None:
    """Print a row for each comparison, and the conditions that differ."""
    table = Table()
    for heading in ("", "A Mpx/s", "B Mpx/s", "B / A", "per machine speed", ""):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in rows:
        verdict = "[red]slower[/red]" if row.regressed else ""
        scaled = "" if row.scaled is None else _text(row.scaled)
        table.add_row(row.name, f"{row.first:.2f}", f"{row.second:.2f}", _text(row.plain), scaled, verdict)
    console.print(table)
    conditions = first.get("conditions", {}), second.get("conditions", {})
    for name in ("processor", "cores", "versions"):
        old, new = (by_name.get(name) for by_name in conditions)
        if old != new:
            console.print(f"not the same {name}: {old} and {new}", highlight=False, soft_wrap=True)


def _text(ratio: Ratio) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"
