"""``cellseg-batch verify-seams``: compare the tiled result with the untiled one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from cellseg_batch.engine.cli.console import check_json, counted, write_json
from cellseg_batch.engine.cli.flags import ENGINE, Json, Slide, takes_settings
from cellseg_batch.engine.settings import Settings

if TYPE_CHECKING:
    from cellseg_batch.engine.reports.verify_seams import SeamReport


@takes_settings(*ENGINE, "threshold", "tile", "margin", "block", "level", "pixel_size", "downscale", "channel", "axes")
def verify_seams(
    slide: Slide,
    settings: Settings,
    full: Annotated[bool, typer.Option("--full", help="Compare the whole slide, not windows.")] = False,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Largest number of windows of 2048 px.")] = 9,
    bound: Annotated[float, typer.Option("--bound", min=0, help="Largest share of pixels that may flip.")] = 1e-4,
    json_file: Json = None,
) -> None:
    """Compare the tiled result of SLIDE with the untiled one; exit 1 when too many pixels flip."""
    from cellseg_batch.engine.reports.verify_seams import prove_seams

    check_json(json_file)
    console = Console()
    with console.status("segmenting tiled and untiled"):
        report = prove_seams(slide, settings, full, windows)
    print_seams(report, bound, console)
    write_json(json_file, report.to_json())
    raise typer.Exit(not report.holds(bound))


def print_seams(report: SeamReport, bound: float, console: Console) -> None:
    """Print the figures and the verdict."""
    verdict = "holds" if report.holds(bound) else "does NOT hold"
    console.print(
        f"seams of {report.backend} {report.precision}, tile {report.tile[0]} x {report.tile[1]}, margin "
        f"{report.margin} px ({report.cost:.2f} px computed per px), in {counted(report.windows, 'window')}:\n"
        f"max |dp| {report.max_dp:.2e}, {report.flipped} of {report.pixels} pixels flip "
        f"({report.flipped_fraction:.1e}), objects {report.objects_tiled} tiled, {report.objects_untiled} untiled\n"
        f"the bound of {bound:g} flipped pixels {verdict}",
        highlight=False,
        soft_wrap=True,
    )
