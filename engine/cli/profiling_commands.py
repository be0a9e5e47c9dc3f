"""The commands that measure: profile, and bench with its comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cellseg_batch.engine.cli import options as o
from cellseg_batch.engine.cli.console import check_json, plain_errors, write_json
from cellseg_batch.engine.cli.flags import ENGINE, SLIDE, TILES, takes_settings
from cellseg_batch.engine.machine import bound_heaps
from cellseg_batch.engine.settings import Settings

bench = typer.Typer(invoke_without_command=True, rich_markup_mode=None)


@takes_settings(*ENGINE, *TILES, *SLIDE, "output", "instances")
def profile(
    slide: o.Slide,
    settings: Settings,
    chart: Annotated[Path | None, typer.Option("--chart", metavar="FILE", help="Write a bar chart as PNG.")] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="Write a trace that Perfetto or Chrome shows.")
    ] = None,
    json_file: o.Json = None,
) -> None:
    """Run a sample of SLIDE and say where the time goes: each stage beside its own ceiling, and the bottleneck."""
    from cellseg_batch.engine.cli.progress import Screen
    from cellseg_batch.engine.profiling.profile import profile_slide
    from cellseg_batch.engine.profiling.profile_report import draw_profile, print_profile
    from cellseg_batch.engine.profiling.timeline import chrome_trace

    for flag, file in (("--json", json_file), ("--chart", chart), ("--trace", trace)):
        check_json(file, flag)
    bound_heaps()  # as a run does, which this measures
    with Screen(Console(), verbosity=-1) as screen:
        found = profile_slide(slide, settings, screen)
    print_profile(found, Console())
    if chart is not None:
        draw_profile(found, chart)
    if trace is not None:
        trace.write_text(json.dumps(chrome_trace(found.intervals)) + "\n")
    write_json(json_file, found.to_json())


@bench.callback()
@takes_settings(*ENGINE, "tile")
def run_bench(
    settings: Settings,
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the result goes.")] = Path("bench.json"),
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Of every measurement.")] = 5,
    side: Annotated[int, typer.Option("--side", min=256, help="Of the slide in px.")] = 4096,
) -> None:
    """Measure this machine on slides that are the same everywhere, and write rates and conditions as JSON."""
    if context.invoked_subcommand is not None:
        return
    import tempfile

    from cellseg_batch.engine.cli.progress import Screen
    from cellseg_batch.engine.profiling.bench import run_suite
    from cellseg_batch.engine.profiling.bench_conditions import save

    check_json(out, "--out")
    bound_heaps()  # as the runs do that this measures
    with tempfile.TemporaryDirectory(prefix="cellseg-bench-") as folder:
        result = run_suite(settings, rounds, side, Path(folder), Screen(Console(), verbosity=-1))
    save(out, **result)
    for row in result["rows"]:
        Console().print(f"{row['mpx_per_s']:9.2f} Mpx/s  {row['name']}", highlight=False)
    Console().print(str(out), highlight=False)


@bench.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="A result of bench.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="A later one.")],
    debug: o.Debug = False,
) -> None:
    """Compare two results; exit 1 when B is slower than A beyond noise."""
    from cellseg_batch.engine.profiling.bench_compare import compare_results, load_result, print_comparison

    with plain_errors(debug):
        old, new = load_result(first), load_result(second)
        rows = compare_results(old, new)
        print_comparison(rows, old, new, Console())
    raise typer.Exit(any(row.regressed for row in rows))
