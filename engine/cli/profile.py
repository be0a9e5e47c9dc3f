"""``cellseg-batch profile``: measure where the time of a run goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from cellseg_batch.engine.cli.console import as_flags, as_text, check_json, write_json
from cellseg_batch.engine.cli.flags import ENGINE, SLIDE, TILES, Json, Slide, takes_settings
from cellseg_batch.engine.machine import bound_heaps
from cellseg_batch.engine.settings import Settings

if TYPE_CHECKING:
    from cellseg_batch.engine.profiling.profile_report import Profile


@takes_settings(*ENGINE, *TILES, *SLIDE, "output", "instances")
def profile(
    slide: Slide,
    settings: Settings,
    chart: Annotated[Path | None, typer.Option("--chart", metavar="FILE", help="Write a bar chart as PNG.")] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="Write a trace that Perfetto or Chrome shows.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Run a sample of SLIDE and say where the time goes: each stage beside its own ceiling, and the bottleneck."""
    from cellseg_batch.engine.cli.progress import RunProgress
    from cellseg_batch.engine.profiling.profile import profile_slide
    from cellseg_batch.engine.profiling.profile_report import draw_profile
    from cellseg_batch.engine.profiling.timeline import chrome_trace

    for flag, file in (("--json", json_file), ("--chart", chart), ("--trace", trace)):
        check_json(file, flag)
    bound_heaps()  # as `run` does, which this measures
    with RunProgress(Console(), verbosity=-1) as progress:
        measured = profile_slide(slide, settings, progress)
    print_profile(measured, Console())
    if chart is not None:
        draw_profile(measured, chart)
    if trace is not None:
        trace.write_text(json.dumps(chrome_trace(measured.intervals)) + "\n")
    write_json(json_file, measured.to_json())


def print_profile(profile: Profile, console: Console) -> None:
    """Print a row for each stage, and the verdict."""
    from cellseg_batch.engine.profiling.timeline import IDLE

    table = Table(
        title=f"{profile.megapixels:.1f} Mpx of {profile.slides} image{'s' * (profile.slides > 1)}, "
        f"{profile.backend} {profile.precision}, {profile.workers} blocks in flight",
        title_justify="left",
    )
    for heading in ("stage", "busy s", "busy", "of a long run", "Mpx/s", "alone", "of that", "GB/s"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for use in profile.stages:
        table.add_row(
            use.stage,
            f"{use.busy:.2f}",
            f"{use.occupancy:.0%}",
            f"{use.share:.0%}",
            f"{use.mpx_per_s:.1f}",
            "" if use.alone_mpx_per_s is None else f"{use.alone_mpx_per_s:.1f}",
            "" if use.share_of_alone is None else f"{use.share_of_alone:.0%}",
            "" if use.gb_per_s is None else f"{use.gb_per_s:.2f}",
        )
    table.add_row(IDLE, "", "", f"{profile.shares.get(IDLE, 0):.0%}", "", "", "", "")
    console.print(table)
    lines = [
        f"{profile.mpx_per_s:.2f} Mpx/s end to end, {profile.engine_mpx_per_s:.2f} Mpx/s in the model; first read "
        f"{profile.first_read_mpx_per_s:.0f} Mpx/s; memory copies at {profile.memory_gb_per_s:.1f} GB/s",
        profile.verdict,
    ]
    if profile.gpu:
        lines.insert(1, ", ".join(f"{name.replace('_', ' ')} {value:.0f}" for name, value in profile.gpu.items()))
    console.print(as_text(as_flags("\n".join(lines))), soft_wrap=True)
