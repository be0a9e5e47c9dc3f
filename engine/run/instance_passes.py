"""Make instances in two passes over a slide's blocks, without computing a tile twice.

    pass 1   model -> pixel codes -> numbered seeds, into scratch           (with the mask's own reading and computing)
    merge    seeds that touch across blocks become one; final ids
    pass 2   scratch with a frame -> final ids -> growth -> labels, and the cells that they expand into

A label depends only on the scratch within the growth's reach, and a cell on the labels within its own, so neither
depends on the blocks.  Each task can be repeated.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.geometry import Block, Box
from cellseg_batch.engine.objects.kept import KeptIds
from cellseg_batch.engine.objects.merge import FinalIds, merge_seeds
from cellseg_batch.engine.objects.scratch import Scratch
from cellseg_batch.engine.objects.seeds import InstanceRule, SeedRecord, number_seeds
from cellseg_batch.engine.run.measure_pass import measure_block, measured_channels, write_objects
from cellseg_batch.engine.run.open_slide import OpenSlide
from cellseg_batch.engine.run.output_images import CELLS, LABELS
from cellseg_batch.engine.run.records import (
    BLOCKS,
    INSTANCES,
    BlockRecord,
    GrowthRecord,
    MergeRecord,
    TableRecord,
    TaskRecord,
)
from cellseg_batch.engine.run.star_passes import drawn_labels
from cellseg_batch.engine.storage.journal import Journal
from cellseg_batch.kernels.expand import expand
from cellseg_batch.kernels.instances import grow, reach, renumber
from cellseg_batch.kernels.moments import HALO


def keep_seeds(slide: OpenSlide, block: Block, pixel_codes: NDArray[np.uint8]) -> SeedRecord:
    """Number the seeds of a block, put its codes into the scratch, and return the seeds' record for the merge.

    Args:
        slide: the open slide.
        block: block of the slide.
        pixel_codes: (h, w) uint8, as the kernels classify the block's pixels.
    """
    with slide.clock.stage("seeds"):
        codes, record = number_seeds(pixel_codes, block, slide.plan.grid, _rule(slide).smallest_seed)
    with slide.clock.stage("write"):
        _scratch(slide).write(block, codes)
    return record


def merge_blocks(slide: OpenSlide, _: int) -> MergeRecord:
    """Merge the seeds of all blocks into objects with final ids."""
    grid, journal = slide.plan.grid, slide.journal
    with slide.clock.stage("seeds"):
        records = ((block, _seeds_of(journal, block)) for block in grid)
        merged = merge_seeds(records, grid, _rule(slide).smallest_seed)
        merged.save(_scratch(slide).ids)
        slide.retype_ids(merged.dtype)
    return MergeRecord(merged.objects)


def grow_block(slide: OpenSlide, number: int) -> GrowthRecord:
    """Write the final labels and cells of one block, and measure its objects if the plan says so."""
    plan, block = slide.plan, slide.plan.grid[number]
    reached = plan.inside(block)  # by a cell, also on glass
    if plan.stars is None:  # a star may reach into a tile that is not computed
        block = plan.computed(block)
    halo = HALO if plan.objects else 0
    labels = _labels_and_cells(slide, block if plan.cells is None else reached, halo)
    with slide.clock.stage("write"):
        for name, with_halo in labels.items():
            slide.images[name].write(0, block.plane, block.box, _without(halo, with_halo))
    if slide.scratch.probability is None:
        counts = {name: int(np.count_nonzero(image)) for name, image in labels.items()}
        return GrowthRecord(counts[LABELS], in_cells=counts.get(CELLS, 0))
    with slide.clock.stage("measure"):
        pixels = slide.reader.of_channels(measured_channels(plan.slide))
        around = labels[LABELS], labels.get(CELLS)
        return measure_block(plan, block, reached, *around, pixels, slide.scratch.probability, slide.scratch.classes)


def _labels_and_cells(slide: OpenSlide, block: Block, halo: int) -> dict[str, NDArray[Any]]:
    """The labels, and the cells if there are some, (h + 2 * halo, w + 2 * halo) of a block; 0 outside the slide.

    Objects that are left out because of the region have cells too until these are complete, so that those that are kept
    are the same as without a region.

    Args:
        slide: the open slide.
        block: block of the slide, with the tiles that nuclei or cells may reach.
        halo: px around the block.
    """
    plan, target, whole = slide.plan, block.box.grown(halo), Box(0, 0, *slide.plan.grid.lattice.shape)
    names = [name for name in (LABELS, CELLS) if name in slide.images]
    kept = None if plan.region is None else KeptIds.load(_scratch(slide).ids)
    if not block.tiles:
        return {name: np.zeros(target.shape, np.uint32) for name in names}
    window = target.grown(0 if plan.cells is None else plan.cells.reach).within(whole)
    if plan.stars is None:
        images = [final_labels(slide, block.plane, window, kept)]
    else:
        images = [drawn_labels(slide, block.plane, window)]
    if plan.cells is not None:
        with slide.clock.stage("expand"):
            images.append(expand(images[0], plan.cells.distance, plan.cells.aspect))
    images = [_cut(image, window, target) for image in images]
    if kept is not None:
        outside = [
            tile.core.seen_from(target).slices() for tile in plan.grid[block.index].tiles if tile not in block.tiles
        ]
        for image in images:
            image[image > kept.count] = 0
            for part in outside:  # only the cell of an object too large to be whole reaches there
                image[part] = 0
    return dict(zip(names, images, strict=True))


def _cut(image: NDArray[Any], window: Box, target: Box) -> NDArray[Any]:
    """The pixels of a box from those of a window of the slide; 0 outside the window."""
    inside = target.within(window)
    pixels = np.zeros(target.shape, image.dtype)
    pixels[inside.seen_from(target).slices()] = image[inside.seen_from(window).slices()]
    return pixels


def _without(halo: int, pixels: NDArray[Any]) -> NDArray[Any]:
    """The pixels of a block, from those with a halo."""
    return pixels[halo : pixels.shape[0] - halo, halo : pixels.shape[1] - halo]


def tabulate(slide: OpenSlide, _: int) -> TableRecord:
    """Write the table of objects."""
    with slide.clock.stage("measure"):
        records = (task.result for _, task in slide.journal.records(INSTANCES, TaskRecord[GrowthRecord]))
        return write_objects(slide.plan, slide.scratch.folders[0], records)


def _seeds_of(journal: Journal, block: Block) -> SeedRecord:
    """The seeds' record of a block."""
    task = journal.get(BLOCKS, block.index, TaskRecord[BlockRecord])
    assert task is not None  # the merge comes after all blocks
    assert task.result.seeds is not None
    return task.result.seeds


def final_labels(slide: OpenSlide, plane: int, target: Box, kept: KeptIds | None = None) -> NDArray[Any]:
    """The labels (h, w) of a box of a plane, 0 outside the slide.

    Args:
        slide: the open slide.
        plane: index of the plane.
        target: the box.
        kept: the ids of the objects that are kept and, above these, of the others; None for those of the merge.
    """
    steps = _rule(slide).steps
    with slide.clock.stage("read"):
        codes = _final_codes(slide, plane, target.grown(reach(steps)), kept)
    with slide.clock.stage("growth"):
        labels = np.empty(target.shape, codes.dtype)
        grow(codes, steps, labels)
    return labels


def _final_codes(slide: OpenSlide, plane: int, window: Box, kept: KeptIds | None) -> NDArray[Any]:
    """The codes (height, width) of a window of a plane with final ids, 0 outside the slide."""
    grid, merged = slide.plan.grid, FinalIds.load(_scratch(slide).ids)
    codes = np.zeros(window.shape, merged.dtype)
    for touching in grid.touching(plane, window):
        final_codes = merged.codes_of(touching, grid)
        if kept is not None:
            final_codes = kept.codes_of(final_codes)
        for part, block_codes in _scratch(slide).read(touching, window):
            renumber(block_codes, final_codes, codes[part.seen_from(window).slices()])
    return codes


def _rule(slide: OpenSlide) -> InstanceRule:
    assert slide.plan.instances is not None
    return slide.plan.instances


def _scratch(slide: OpenSlide) -> Scratch:
    assert slide.scratch.codes is not None
    return slide.scratch.codes
