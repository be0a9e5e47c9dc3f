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
    gate: o.Gate = Settings.gate,
    threads: o.Threads = None,
    tile: o.TileSide = Settings.tile,
    margin: o.Margin = None,
    batch: o.BatchSize = Settings.batch,
    block: o.BlockSide = Settings.block,
    workers: o.Workers = Settings.workers,
    level: o.LevelIndex = None,
    pixel_size: o.PixelSize = None,
    shrink: o.Shrink = None,
    channel: o.Channel = None,
    axes: o.Axes = None,
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
            gate=gate,
            threads=threads,
            tile=tile,
            margin=margin,
            batch=batch,
            block=block,
            workers=workers,
            level=level,
            pixel_size=pixel_size,
            shrink=shrink,
            channel=channel,
            axes=axes,
        )
        with Screen(Console(), verbosity=-1) as screen:
            found = profile_slide(slide, settings, screen)
        print_profile(found, Console())
        if chart is not None:
            draw_profile(found, chart)
        if trace is not None:
            trace.write_text(json.dumps(chrome_trace(found.intervals)) + "\n")
        write_json(json_file, found.to_json())
