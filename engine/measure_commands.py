"""The commands that measure: profile, and bench with its comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cellseg_batch.engine import options as o
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.shell import check_json, plain_errors, write_json

bench = typer.Typer(invoke_without_command=True, rich_markup_mode=None)


def profile(
    slide: o.Slide,
    chart: Annotated[Path | None, typer.Option("--chart", metavar="FILE", help="Write a bar chart as PNG.")] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="Write a trace that Perfetto or Chrome shows.")
    ] = None,
    output: o.Output = None,
    model: o.Model = Settings.model,
    backend: o.BackendName = Settings.backend,
    precision: o.Precision = Settings.precision,
    device: o.Device = Settings.device,
    gate: o.Gate = Settings.gate,
    threads: o.Threads = None,
    tile: o.TileSide = Settings.tile,
    stitch: o.Stitch = Settings.stitch,
    margin: o.Margin = None,
    batch: o.BatchSize = Settings.batch,
    block: o.BlockSide = Settings.block,
    workers: o.Workers = Settings.workers,
    level: o.LevelIndex = None,
    pixel_size: o.PixelSize = None,
    shrink: o.Shrink = None,
    skip_background: o.SkipBackground = Settings.skip_background,
    channel: o.Channel = None,
    axes: o.Axes = None,
    instances: o.Instances = False,
    json_file: o.Json = None,
    debug: o.Debug = False,
) -> None:
    """Run a sample of SLIDE and say where the time goes: each stage beside its own ceiling, and the bottleneck."""
    with plain_errors(debug):
        from cellseg_batch.engine.profile.findings import draw_profile, print_profile
        from cellseg_batch.engine.profile.profiling import profile_slide
        from cellseg_batch.engine.profile.timeline import chrome_trace
        from cellseg_batch.engine.screen import Screen

        for flag, file in (("--json", json_file), ("--chart", chart), ("--trace", trace)):
            check_json(file, flag)
        settings = Settings(
            output=output,
            model=model,
            backend=backend,
            precision=precision,
            device=device,
            gate=gate,
            threads=threads,
            tile=tile,
            stitch=stitch,
            margin=margin,
            batch=batch,
            block=block,
            workers=workers,
            level=level,
            pixel_size=pixel_size,
            shrink=shrink,
            skip_background=skip_background,
            channel=channel,
            axes=axes,
            instances=instances,
        )
        with Screen(Console(), verbosity=-1) as screen:
            found = profile_slide(slide, settings, screen)
        print_profile(found, Console())
        if chart is not None:
            draw_profile(found, chart)
        if trace is not None:
            trace.write_text(json.dumps(chrome_trace(found.intervals)) + "\n")
        write_json(json_file, found.to_json())


@bench.callback()
def run_bench(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the result goes.")] = Path("bench.json"),
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Of every measurement.")] = 5,
    side: Annotated[int, typer.Option("--side", min=256, help="Of the slide in px.")] = 4096,
    model: o.Model = Settings.model,
    backend: o.BackendName = Settings.backend,
    precision: o.Precision = Settings.precision,
    device: o.Device = Settings.device,
    gate: o.Gate = Settings.gate,
    threads: o.Threads = None,
    tile: o.TileSide = Settings.tile,
    debug: o.Debug = False,
) -> None:
    """Measure this machine on slides that are the same everywhere, and write rates and conditions as JSON."""
    if context.invoked_subcommand is not None:
        return
    with plain_errors(debug):
        import tempfile

        from cellseg_batch.engine.bench.conditions import save
        from cellseg_batch.engine.bench.suite import run_suite
        from cellseg_batch.engine.screen import Screen

        check_json(out, "--out")
        settings = Settings(
            model=model, backend=backend, precision=precision, device=device, gate=gate, threads=threads, tile=tile
        )
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
    from cellseg_batch.engine.bench.compare import compare_results, load_result, print_comparison

    with plain_errors(debug):
        old, new = load_result(first), load_result(second)
        rows = compare_results(old, new)
        print_comparison(rows, old, new, Console())
    raise typer.Exit(any(row.regressed for row in rows))
