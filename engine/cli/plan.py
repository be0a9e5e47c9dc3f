"""``cellseg-batch plan``: estimate the cost of a run."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from cellseg_batch.engine.cli.console import as_text, check_json, counted, print_shared, write_json
from cellseg_batch.engine.cli.flags import ENGINE, SLIDE, TILES, Json, SlidesOrManifest, takes_settings
from cellseg_batch.engine.machine import bound_heaps
from cellseg_batch.engine.settings import Settings

if TYPE_CHECKING:
    from cellseg_batch.engine.reports.plan import Estimate

_MOST_ROWS = 20
_COUNTS = ("blocks", "tiles", "bytes_in", "bytes_out", "files")


@takes_settings(
    *ENGINE,
    *TILES,
    "max_memory",
    *SLIDE,
    "wells",
    "fields",
    "mask",
    "mask_class",
    "manifest",
    "shard",
    "output",
    "name",
    "instances",
    "objects",
    "expand",
    "probability",
    "tissue",
)
def plan(
    settings: Settings,
    slides: SlidesOrManifest = None,
    processes: Annotated[int, typer.Option("--processes", min=1, help="Worker processes that share the work.")] = 1,
    json_file: Json = None,
) -> None:
    """Say what segmenting SLIDES would take: blocks, bytes, files, memory and time; exit 1 if an image is refused."""
    from cellseg_batch.engine.reports.plan import estimate

    check_json(json_file)
    bound_heaps()  # as `run` does, whose memory this predicts
    console = Console()
    with console.status("") as status:
        estimated = estimate(slides or [], settings, processes, status.update)
    print_estimate(estimated, console)
    write_json(json_file, estimated.to_json())
    raise typer.Exit(bool(estimated.refused))


def print_estimate(estimate: Estimate, console: Console) -> None:
    """Print the largest images, the totals, and the images that are refused."""
    table = Table(title="cellseg-batch plan", title_justify="left")
    for heading in ("image", "blocks", "tiles", "in", "out", "files", "time"):
        table.add_column(heading, overflow="fold", justify="left" if heading == "image" else "right")
    shown = sorted((slide for slide in estimate.slides if not slide.reason), key=lambda slide: -slide.pixels)
    for slide in shown[:_MOST_ROWS]:
        table.add_row(as_text(slide.path), *_figures([getattr(slide, name) for name in _COUNTS], slide.seconds))
    table.add_section()
    totals = [estimate.total(name) for name in _COUNTS]
    above = f", the largest {_MOST_ROWS} above" if len(shown) > _MOST_ROWS else ""
    table.add_row(counted(len(shown), "image") + above, *_figures(totals, estimate.seconds))
    console.print(table)
    for slide in shown[:_MOST_ROWS]:
        if slide.tissue is not None:
            text = f"{slide.path}: {100 * slide.tissue:.1f} % of it is tissue, the rest is taken for glass"
            console.print(as_text(text), soft_wrap=True)
    print_shared(console, "refused", "red", ((slide.path, slide.reason) for slide in estimate.refused))
    if estimate.mpx_per_s:
        console.print(
            f"{estimate.processes} worker process{'es' * (estimate.processes > 1)}, each at most "
            f"{estimate.peak_bytes / 1e6:.0f} MB and {estimate.mpx_per_s:.2f} Mpx/s{_objects(estimate)} (measured on "
            f"{estimate.measured_mpx:.1f} Mpx with {estimate.backend} {estimate.precision}); bytes are before "
            "compression, files at most",
            highlight=False,
            soft_wrap=True,
        )
    if estimate.unseen:
        console.print(
            f"{counted(estimate.unseen, 'image')} not looked at: memory is for the downscale that needs most",
            highlight=False,
            soft_wrap=True,
        )


def _objects(estimate: Estimate) -> str:
    counts = [slide.objects for slide in estimate.slides if slide.objects is not None]
    return f", about {sum(counts):,} objects" if counts else ""


def _figures(counts: list[int], seconds: float) -> tuple[str, ...]:
    from dask.utils import format_bytes

    blocks, tiles, bytes_in, bytes_out, files = counts
    duration = str(timedelta(seconds=math.ceil(seconds))) if seconds else "?"
    return f"{blocks:,}", f"{tiles:,}", format_bytes(bytes_in), format_bytes(bytes_out), f"{files:,}", duration
