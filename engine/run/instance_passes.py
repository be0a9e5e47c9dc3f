"""Instances in two passes over a slide's blocks; no tile is computed twice.

    pass 1   model -> classes -> numbered seeds, into scratch           (with the mask's own reading and computing)
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
from cellseg_batch.engine.objects.merge import Merged, merge_seeds
from cellseg_batch.engine.objects.scratch import Scratch
from cellseg_batch.engine.objects.seeds import InstanceRule, number_seeds
from cellseg_batch.engine.run.measure_pass import measure_block, measured_channels, write_objects
from cellseg_batch.engine.run.open_slide import BLOCKS, OpenSlide, Record
from cellseg_batch.kernels.instances import grow, reach, renumber
from cellseg_batch.kernels.moments import HALO

INSTANCES = "instances"


def keep_seeds(slide: OpenSlide, block: Block, classes: NDArray[np.uint8]) -> Record:
    """Number the seeds of a block and put its codes into scratch; what the merge has to know of them."""
    with slide.clock.stage("seeds"):
        codes, record = number_seeds(classes, block, slide.plan.grid, _rule(slide).smallest_seed)
    with slide.clock.stage("write"):
        _scratch(slide).write(block, codes)
    return record


def merge_blocks(slide: OpenSlide, _: int) -> Record:
    """Make objects of the seeds of all blocks."""
    grid, journal = slide.plan.grid, slide.journal
    with slide.clock.stage("seeds"):
        records = ((block, journal.get(BLOCKS, block.index) or {}) for block in grid)
        merged = merge_seeds(records, grid, _rule(slide).smallest_seed)
        merged.save(_scratch(slide).ids)
        slide.labels.retype(merged.dtype)
    return {"objects": merged.objects}


def grow_block(slide: OpenSlide, number: int) -> Record:
    """Write the final labels of one block, and measure what lies in it if that was asked for."""
    plan, block = slide.plan, slide.plan.grid[number]
    halo = HALO if plan.objects else 0
    around = final_labels(slide, block, halo)
    height, width = block.box.shape
    labels = around[halo : halo + height, halo : halo + width]
    with slide.clock.stage("write"):
        slide.labels.write(0, block.plane, block.box, labels)
    if slide.certainty is None:
        return {"labelled": int(np.count_nonzero(labels))}
    with slide.clock.stage("measure"):
        pixels = slide.reader.of_channels(measured_channels(plan.slide))
        return measure_block(plan, block, around, pixels, slide.certainty)


def tabulate(slide: OpenSlide, _: int) -> Record:
    """Make the table of objects."""
    with slide.clock.stage("measure"):
        records = (record for _, record in slide.journal.records(INSTANCES))
        return write_objects(slide.plan, _scratch(slide).objects, records)


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
    grid, merged = slide.plan.grid, Merged.load(_scratch(slide).ids)
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
