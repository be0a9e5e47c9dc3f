"""``cellseg-batch info``: list images and how a run would cut them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from cellseg_batch.engine.cli.console import as_flags, as_text, check_json, counted, print_line, write_json
from cellseg_batch.engine.cli.flags import Json, Slides, takes_settings
from cellseg_batch.engine.settings import Settings

if TYPE_CHECKING:
    from cellseg_batch.engine.reports.info import Cut, Info


@takes_settings("model", "tile", "margin", "block", "level", "pixel_size", "channel", "axes", "mask", "mask_class")
def info(slides: Slides, settings: Settings, json_file: Json = None) -> None:
    """List the images that SLIDES hold, and how each would be cut into blocks and tiles.

    Read are OME-Zarr, zarr array, zarr.zip, TIFF, SVS, NDPI, SCN, BIF, QPTIFF, PNG, JPEG, BMP; with pip's extra
    openslide also MRXS, DICOM, svslide, with czi CZI, with nd2 ND2, with lif LIF.

    Never tried on a real file: zarr.zip, SCN, BIF, QPTIFF, MRXS, svslide, the pyramid of a CZI, an ND2 that is
    compressed or of several positions, a LIF in colour.
    """
    from cellseg_batch.engine.reports.info import list_images

    check_json(json_file)
    listed = list_images(slides, settings)
    print_info(listed, Console())
    write_json(json_file, listed.to_json())
    raise typer.Exit(bool(listed.refused))


def print_info(info: Info, console: Console) -> None:
    """Print the metadata and the cut of each image, and the reason of each image that cannot be used."""
    for image in info.images:
        if image.cut is not None:
            console.print(as_text(image.cut.slide.name, "bold"), soft_wrap=True)
            rows = Table.grid(padding=(0, 2))
            for heading, text in _rows(image.cut):
                rows.add_row(heading, as_text(text))
            console.print(Padding(rows, (0, 0, 0, 2)))
    for image in info.refused:
        label = "broken" if image.shape is None else "refused"  # whose metadata could be read, but not as asked
        print_line(console, label, "red", f"{image.path}: {image.reason}")


def _rows(cut: Cut) -> Iterator[tuple[str, str]]:
    from cellseg_batch.engine.slides.formats import format_of

    slide, level, channels = cut.slide, cut.level, cut.channels
    size = slide.pixel_size_um(0)
    shapes = (slide.plane_shape(number) for number in range(len(slide.levels)))
    chunks = " x ".join(map(str, slide.levels[0].chunks))
    yield "format", f"{format_of(slide).describe(slide)}, {slide.dtype}, chunks of {chunks}"
    yield "axes", f"{slide.axes}, {' x '.join(map(str, slide.levels[0].shape))}"
    yield "levels", ", ".join(f"{height} x {width}" for height, width in shapes)
    yield "pixel size", f"{size:.3g} µm/px" if size else as_flags("unknown; `pixel_size` gives it")
    yield "channels", ", ".join(slide.channels) or f"{slide.extent('c', 0)} without names"
    yield "would run", f"level {level.level} ({level.reason}), channel {_numbers(channels.indices)} ({channels.reason})"
    yield "", f"{counted(cut.blocks, 'block')}, {counted(cut.tiles, 'tile')} of {cut.tile[0]} x {cut.tile[1]}"
    if cut.region is not None:
        area, (rows, columns) = cut.region.identity.area, cut.region.grid
        tiles = f"{counted(int(cut.region.computed.sum()), 'tile')} of {rows * columns}"
        yield "region", f"{area:,} px, for a mask {tiles} in a plane"
    if cut.glass_level is not None:
        yield "glass", f"looked for by a run, in level {cut.glass_level}; tiles of it are left out"
    yield from (("note", as_flags(note)) for note in slide.notes)


def _numbers(indices: tuple[int, ...]) -> str:
    return ",".join(map(str, indices))
