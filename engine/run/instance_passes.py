"""Make instances in two passes over a slide's blocks, without computing a tile twice.

    pass 1   model -> pixel codes -> numbered seeds, into scratch           (with the mask's own reading and computing)
    merge    seeds that touch across blocks become one; final ids
    pass 2   scratch with a frame -> final ids -> growth -> labels

A label depends only on the scratch within the growth's reach, so it does not depend on the blocks.  Each task can be
repeated.
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
        slide.labels.retype(merged.dtype)
    return MergeRecord(merged.objects)


def grow_block(slide: OpenSlide, number: int) -> GrowthRecord:
    """Write the final labels of one block, and measure its objects if the plan says so."""
    plan, block = slide.plan, slide.plan.grid[number]
    if plan.stars is None:  # a star may reach into a tile that is not computed
        block = plan.computed(block)
    halo = HALO if plan.objects else 0
    kept = None if plan.region is None else KeptIds.load(_scratch(slide).ids)
    if not block.tiles:
        with_halo: NDArray[Any] = np.zeros(block.box.grown(halo).shape, np.uint32)
    elif plan.stars is None:
        with_halo = final_labels(slide, block, halo, kept)
    else:
        with_halo = drawn_labels(slide, block, halo)
    height, width = block.box.shape
    labels = with_halo[halo : halo + height, halo : halo + width]
    with slide.clock.stage("write"):
        slide.labels.write(0, block.plane, block.box, labels)
    if slide.scratch.probability is None:
        return GrowthRecord(int(np.count_nonzero(labels)))
    with slide.clock.stage("measure"):
        pixels = slide.reader.of_channels(measured_channels(plan.slide))
        return measure_block(plan, block, with_halo, pixels, slide.scratch.probability, slide.scratch.classes)


def tabulate(slide: OpenSlide, _: int) -> TableRecord:
    """Write the table of objects."""
    with slide.clock.stage("measure"):
        records = (task.result for _, task in slide.journal.records(INSTANCES, TaskRecord[GrowthRecord]))
        return write_objects(slide.plan, slide.scratch.folders[0].objects, records)


def _seeds_of(journal: Journal, block: Block) -> SeedRecord:
    """The seeds' record of a block."""
    task = journal.get(BLOCKS, block.index, TaskRecord[BlockRecord])
    assert task is not None  # the merge comes after all blocks
    assert task.result.seeds is not None
    return task.result.seeds


def final_labels(slide: OpenSlide, block: Block, halo: int = 0, kept: KeptIds | None = None) -> NDArray[Any]:
    """The labels (h + 2 * halo, w + 2 * halo) of a block and ``halo`` px around it, 0 outside the slide.

    Args:
        slide: the open slide.
        block: block of the slide.
        halo: px around the block.
        kept: the ids if only some objects are kept; None keeps all.
    """
    target, steps = block.box.grown(halo), _rule(slide).steps
    with slide.clock.stage("read"):
        codes = _final_codes(slide, block, target.grown(reach(steps)), kept)
    with slide.clock.stage("growth"):
        labels = np.empty(target.shape, codes.dtype)
        grow(codes, steps, labels)
        if kept is not None:
            labels[labels > kept.count] = 0
    return labels


def _final_codes(slide: OpenSlide, block: Block, window: Box, kept: KeptIds | None) -> NDArray[Any]:
    """The codes (height, width) of a window around a block with final ids, 0 outside the slide."""
    grid, merged = slide.plan.grid, FinalIds.load(_scratch(slide).ids)
    codes = np.zeros(window.shape, merged.dtype)
    for touching in grid.touching(block.plane, window):
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
