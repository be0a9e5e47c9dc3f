"""Measure the objects of a slide block by block once labels are final, and write the table of objects.

A block is measured in rows of tile cores, so that little of it is in memory at a time; the sums do not depend on these
rows.  This module must not know how labels are made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from cellseg_batch.engine.geometry import Block, Box, Tile
from cellseg_batch.engine.objects.cells import with_cells
from cellseg_batch.engine.objects.moment_files import Objects, merge_parts, write_part
from cellseg_batch.engine.objects.scratch import Scratch, ScratchFolder
from cellseg_batch.engine.run.records import GrowthRecord, TableRecord
from cellseg_batch.engine.run.slide_plan import SlidePlan
from cellseg_batch.engine.slides.ome_zarr import OUTPUT_MARK
from cellseg_batch.engine.slides.reader import SlideReader
from cellseg_batch.engine.slides.slide import Slide
from cellseg_batch.engine.storage.paths import zarr_store
from cellseg_batch.kernels.moments import HALO, Ids, Rows, measure, merge
from cellseg_batch.kernels.moments_columns import AREA, CHANNELS, PER_CHANNEL, SUM
from cellseg_batch.kernels.quality import Quality, survey

_RGB = ("red", "green", "blue")


def measure_block(
    plan: SlidePlan,
    block: Block,
    reached: Block,
    labels: NDArray[Any],
    cells: NDArray[Any] | None,
    pixels: SlideReader,
    probability: Scratch,
    classes: Scratch | None,
) -> GrowthRecord:
    """Measure the objects in a block and write their moments into the scratch.

    Args:
        plan: plan of the slide.
        block: block of the slide, with the tiles that are computed.
        reached: the block with the tiles that cells may reach, of which those without any are not read.
        labels: (h + 2 * HALO, w + 2 * HALO) final labels of the block and HALO px around it; 0 outside the slide.
        cells: the cells there, in the same way; None if there are none.
        pixels: reads every channel that is measured.
        probability: scratch with the probability of every pixel, uint8; 255 is a probability of 1.
        classes: scratch with the class code of every pixel, uint8; None if objects get no classes.

    Raises:
        SlideError: pixels cannot be read, or the moments cannot be written.
    """
    quality = [Quality()] * len(pixels.channels)
    strips = list(_strips(block.tiles))
    computed = len(strips)
    if cells is not None:
        in_block = cells[HALO : cells.shape[0] - HALO, HALO : cells.shape[1] - HALO]
        others = (tile for tile in reached.tiles if tile not in block.tiles)
        strips += _strips(tile for tile in others if in_block[tile.core.seen_from(block.box).slices()].any())
    if not strips:
        return GrowthRecord(0, tuple(quality), () if plan.classes is None else (0,) * len(plan.classes.names))
    parts, parts_of_cells = [], []
    slide = Box(0, 0, *plan.grid.lattice.shape)
    probabilities = probability.read_block(block)
    class_codes = None if classes is None else classes.read_block(block)
    for number, strip in enumerate(strips):
        window = strip.grown(HALO).within(slide)
        channels = np.ascontiguousarray(pixels.read(block.plane, window))
        core = strip.seen_from(window).slices()
        with_halo = strip.grown(HALO).seen_from(block.box.grown(HALO)).slices()
        inside = strip.seen_from(block.box).slices()
        light = channels[:, *core]
        if cells is not None:
            parts_of_cells.append(measure(cells[with_halo], light, None, (strip.y0, strip.x0)))
        if class_codes is not None:
            light = np.concatenate([light, _channels_of_classes(plan, class_codes[inside]).astype(light.dtype)])
        parts.append(measure(labels[with_halo], light, probabilities[inside], (strip.y0, strip.x0)))
        if number < computed:
            quality = [sums + survey(channel, core) for sums, channel in zip(quality, channels, strict=True)]
    ids, rows = _joined(parts)
    write_part(probability.objects, block.index, block.plane, ids, rows)
    in_cells = 0
    if cells is not None:
        cell_ids, cell_rows = _joined(parts_of_cells)
        write_part(probability.cells, block.index, block.plane, cell_ids, cell_rows)
        in_cells = int(cell_rows[:, AREA].sum())
    first = CHANNELS + PER_CHANNEL * len(pixels.channels) + SUM
    of_classes = rows[:, first::PER_CHANNEL].sum(axis=0) if class_codes is not None else ()
    return GrowthRecord(int(rows[:, AREA].sum()), tuple(quality), tuple(map(int, of_classes)), in_cells)


def _joined(parts: list[tuple[Ids, Rows]]) -> tuple[Ids, Rows]:
    """The moments of strips as those of their block."""
    ids, rows = zip(*parts, strict=True)
    return merge(np.concatenate(ids), np.concatenate(rows))


def _channels_of_classes(plan: SlidePlan, class_codes: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """A channel (h, w) of each class that is 1 in its pixels, so that its sum over an object counts them."""
    assert plan.classes is not None
    codes = np.arange(1, 1 + len(plan.classes.names))
    is_class: NDArray[np.bool_] = class_codes == codes[:, None, None]
    return is_class


def write_objects(plan: SlidePlan, scratch: ScratchFolder, records: Iterable[GrowthRecord]) -> TableRecord:
    """Merge the blocks' objects into the table of the slide.

    Args:
        plan: plan of the slide.
        scratch: leads to the moments that `measure_block` wrote.
        records: records of all its blocks, in any order.

    Raises:
        OutputError: the table cannot be written.
    """
    # pyarrow takes 30 MB, which a run of masks does not need.
    from cellseg_batch.engine.objects.columns import Origin
    from cellseg_batch.engine.objects.table import ChannelQuality, Provenance, write_table

    paths, slide = plan.paths, plan.slide
    labelled, in_cells, quality = 0, 0, [Quality()] * len(measured_channels(slide))
    classes, colours = (plan.classes.names, plan.classes.colours) if plan.classes else ((), ())
    of_classes = np.zeros(len(classes), np.int64)
    for record in records:
        labelled += record.labelled
        in_cells += record.in_cells
        of_classes += np.array(record.classes, np.int64)
        quality = [sums + block_sums for sums, block_sums in zip(quality, record.quality, strict=True)]
    names = channel_names(slide)
    full, shape = slide.plane_shape(0), plan.grid.lattice.shape
    manifest: Any = zarr.open_group(zarr_store(paths.store), path=paths.labels, mode="r").attrs[OUTPUT_MARK]
    provenance = Provenance(
        image=slide.location,
        labels=str(paths.labels_folder),
        shape=(*slide.plane_grid(plan.level.level), *shape),
        pixel_size_um=plan.level.pixel_size_um,
        level0_scale=(full[0] / shape[0], full[1] / shape[1]),
        labelled_fraction=labelled / plan.pixels,
        segmented_channels=tuple(names[index] for index in plan.channels.indices),
        quality={name: ChannelQuality(sums.focus, sums.saturation) for name, sums in zip(names, quality, strict=True)},
        provenance=manifest,
        classes=dict(zip(classes, colours, strict=True)),
        class_fractions=dict(zip(classes, (of_classes / plan.pixels).tolist(), strict=True)),
        cells=plan.cells,
        cell_fraction=in_cells / plan.pixels,
    )
    origin = Origin(
        slide=slide.name,
        well=slide.plate_position.well if slide.plate_position else "",
        field=slide.plate_position.field if slide.plate_position else "",
        shape=provenance.shape,
        plane_axes=slide.plane_axes,
        pixel_size_um=plan.level.pixel_size_um,
        channels=names,
        classes=tuple(provenance.classes),
        cells=plan.cells is not None,
    )
    objects: Iterable[Objects] = merge_parts(scratch.objects)
    if plan.cells is not None:
        objects = with_cells(objects, merge_parts(scratch.cells))
    return TableRecord(write_table(paths.table, origin, objects, provenance))


def measured_channels(slide: Slide) -> tuple[int, ...]:
    """Indices of the channels whose intensities are measured: all but alpha."""
    return tuple(range(min(slide.extent("c", 0), len(_RGB)) if slide.rgb else slide.extent("c", 0)))


def channel_names(slide: Slide) -> tuple[str, ...]:
    """Names of the measured channels; their indices as text unless each has a name of its own."""
    indices = measured_channels(slide)
    names = _RGB if slide.rgb and not slide.channels else slide.channels
    if len(set(names[: len(indices)])) == len(indices) and all(names[: len(indices)]):
        return tuple(names[: len(indices)])
    return tuple(map(str, indices))


def _strips(tiles: Iterable[Tile]) -> Iterator[Box]:
    """The cores of tiles in raster order, those side by side as one box."""
    strip: Box | None = None
    for tile in tiles:
        core = tile.core
        if strip is not None and (core.y0, core.x0) == (strip.y0, strip.x1):
            strip = replace(strip, x1=core.x1)
            continue
        if strip is not None:
            yield strip
        strip = core
    if strip is not None:
        yield strip
