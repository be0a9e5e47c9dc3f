"""Instances in two passes over a slide's blocks; no tile is computed twice.

    pass 1   model -> pixel codes -> numbered seeds, into scratch           (with the mask's own reading and computing)
    merge    seeds that touch across blocks are one; final ids
    pass 2   scratch with a frame -> final ids -> growth -> labels

A label depends on the scratch within the growth's reach and on nothing else, so it does not matter which block it lies
in.  Each task can be done again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.geometry import Block, Box
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
from cellseg_batch.engine.storage.journal import Journal
from cellseg_batch.kernels.instances import grow, reach, renumber
from cellseg_batch.kernels.moments import HALO


def keep_seeds(slide: OpenSlide, block: Block, pixel_codes: NDArray[np.uint8]) -> SeedRecord:
    """Number the seeds of a block and put its codes into scratch; what the merge has to know of them."""
    with slide.clock.stage("seeds"):
        codes, record = number_seeds(pixel_codes, block, slide.plan.grid, _rule(slide).smallest_seed)
    with slide.clock.stage("write"):
        _scratch(slide).write(block, codes)
    return record


def merge_blocks(slide: OpenSlide, _: int) -> MergeRecord:
    """Make objects of the seeds of all blocks."""
    grid, journal = slide.plan.grid, slide.journal
    with slide.clock.stage("seeds"):
        records = ((block, _seeds_of(journal, block)) for block in grid)
        merged = merge_seeds(records, grid, _rule(slide).smallest_seed)
        merged.save(_scratch(slide).ids)
        slide.labels.retype(merged.dtype)
    return MergeRecord(merged.objects)


def grow_block(slide: OpenSlide, number: int) -> GrowthRecord:
    """Write the final labels of one block, and measure what lies in it if that was asked for."""
    plan, block = slide.plan, slide.plan.grid[number]
    halo = HALO if plan.objects else 0
    around = final_labels(slide, block, halo)
    height, width = block.box.shape
    labels = around[halo : halo + height, halo : halo + width]
    with slide.clock.stage("write"):
        slide.labels.write(0, block.plane, block.box, labels)
    if slide.scratch_probability is None:
        return GrowthRecord(int(np.count_nonzero(labels)))
    with slide.clock.stage("measure"):
        pixels = slide.reader.of_channels(measured_channels(plan.slide))
        return measure_block(plan, block, around, pixels, slide.scratch_probability)


def tabulate(slide: OpenSlide, _: int) -> TableRecord:
    """Make the table of objects."""
    with slide.clock.stage("measure"):
        records = (task.result for _, task in slide.journal.records(INSTANCES, TaskRecord[GrowthRecord]))
        return write_objects(slide.plan, _scratch(slide).objects, records)


def _seeds_of(journal: Journal, block: Block) -> SeedRecord:
    """What the merge has to know of a block."""
    task = journal.get(BLOCKS, block.index, TaskRecord[BlockRecord])
    assert task is not None  # the merge comes after all blocks
    assert task.result.seeds is not None
    return task.result.seeds


def final_labels(slide: OpenSlide, block: Block, halo: int = 0) -> NDArray[Any]:
    """The labels of a block and ``halo`` px around it, 0 outside the slide."""
    target, steps = block.box.grown(halo), _rule(slide).steps
    with slide.clock.stage("read"):
        codes = _final_codes(slide, block, target.grown(reach(steps)))
    with slide.clock.stage("growth"):
        labels = np.empty(target.shape, codes.dtype)
        grow(codes, steps, labels)
    return labels


def _final_codes(slide: OpenSlide, block: Block, window: Box) -> NDArray[Any]:
    """The codes of a window around a block with final ids, 0 outside the slide."""
    grid, merged = slide.plan.grid, FinalIds.load(_scratch(slide).ids)
    codes = np.zeros(window.shape, merged.dtype)
    for other in grid.touching(block.plane, window):
        final = merged.codes_of(other, grid)
        for part, own in _scratch(slide).read(other, window):
            renumber(own, final, codes[part.seen_from(window).slices()])
    return codes


def _rule(slide: OpenSlide) -> InstanceRule:
    assert slide.plan.instances is not None
    return slide.plan.instances


def _scratch(slide: OpenSlide) -> Scratch:
    assert slide.scratch is not None
    return slide.scratch
