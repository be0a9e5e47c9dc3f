"""What images a path holds and how each would be processed, as a table; no pixel is read."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cellseg_batch.engine.errors import SlideError
from cellseg_batch.engine.geometry import fit_lattice, lay_blocks
from cellseg_batch.engine.models import load_model
from cellseg_batch.engine.run.slide_plan import pick_margin
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.slides.discover import find_images
from cellseg_batch.engine.slides.formats import format_of
from cellseg_batch.engine.slides.level_and_channels import choose_channels, choose_level
from cellseg_batch.engine.slides.slide import Slide, UnreadableImage
from cellseg_batch.trainer.bundle import Card


def print_images(inputs: list[Path], settings: Settings, console: Console) -> int:
    """Print a row for each image below ``inputs``; returns how many of them are broken.

    Raises:
        UsageError: there is no image, or no model of that name.
    """
    card = load_model(settings.model).card
    images = [image for path in inputs for image in find_images(path, settings.axes)]
    table = Table()
    for heading in ("image", "format", "axes", "levels (y x)", "µm/px", "chunks", "channels", "would process"):
        table.add_column(heading, overflow="fold")
    broken: list[tuple[str, str]] = []
    for image in images:
        if isinstance(image, UnreadableImage):
            broken.append((image.path, image.reason))
            continue
        try:
            table.add_row(*map(Text, _row(image, settings, card)))
        except SlideError as error:
            broken.append((image.location, error.detail))
    if table.row_count:
        console.print(table)
    for path, reason in broken:
        console.print(Text.assemble(("broken", "red"), f"  {path}: {reason}"), soft_wrap=True)
    return len(broken)


def _row(slide: Slide, settings: Settings, card: Card) -> tuple[str, ...]:
    level = choose_level(slide, settings.level, settings.pixel_size, card.pixel_size_um)
    channels = choose_channels(slide, settings.channel)
    margin = pick_margin(settings, card)
    lattice = fit_lattice(slide.plane_shape(level.level), settings.tile, margin, card.total_stride)
    grid = lay_blocks(lattice, settings.block, slide.planes(level.level))
    rows, columns = lattice.grid
    size = slide.pixel_size_um(0)
    return (
        slide.name,
        f"{format_of(slide).describe(slide)}\n{slide.dtype}",
        slide.axes,
        "\n".join("{} {}".format(*slide.plane_shape(i)) for i in range(len(slide.levels))),
        f"{size:.3g}" if size else "?",
        " ".join(map(str, slide.levels[0].chunks)),
        "\n".join(slide.channels) or str(slide.extent("c", 0)),
        f"level {level.level} ({level.reason})\nchannel {','.join(map(str, channels.indices))} ({channels.reason})\n"
        f"{len(grid)} blocks, {rows * columns * grid.planes} tiles of {lattice.tile[0]} x {lattice.tile[1]}",
    )
