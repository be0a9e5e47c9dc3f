"""Instances in two passes over a slide's blocks; no tile is computed twice.

    pass 1   model -> pixel codes -> numbered seeds, into scratch           (with the mask's own reading and computing)
    merge    seeds that touch across blocks are one; final ids
    pass 2   scratch with a frame -> final ids -> growth -> labels

A label depends on the scratch within the growth's reach and on nothing else, so it does not matter which block it lies
in.  Each task can be done again.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.geometry import Block, BlockGrid, Box
from cellseg_batch.engine.inference.cpu_runner import BlockResult
from cellseg_batch.engine.objects.merge import FinalIds, merge_seeds
from cellseg_batch.engine.objects.scratch import Scratch
from cellseg_batch.engine.objects.seeds import EdgeSeeds, InstanceRule, SeedRecord, SideRuns, number_seeds
from cellseg_batch.engine.run.measure_pass import MeasureRecord, measure_block, measured_channels, write_objects
from cellseg_batch.engine.run.open_slide import BLOCKS, OpenSlide, Record
from cellseg_batch.kernels.instances import grow, reach, renumber
from cellseg_batch.kernels.moments import HALO
from cellseg_batch.kernels.quality import Quality

INSTANCES = "instances"


def keep_seeds(slide: OpenSlide, block: Block, pixel_codes: NDArray[np.uint8]) -> Record:
    """Number the seeds of a block and put its codes into scratch; what the merge has to know of them."""
    with slide.clock.stage("seeds"):
        codes, record = number_seeds(pixel_codes, block, slide.plan.grid, _rule(slide).smallest_seed)
    with slide.clock.stage("write"):
        _scratch(slide).write(block, codes)
    return asdict(record)


def merge_blocks(slide: OpenSlide, _: int) -> Record:
    """Make objects of the seeds of all blocks."""
    grid, journal = slide.plan.grid, slide.journal
    with slide.clock.stage("seeds"):
        records = ((block, _seed_record(journal.get(BLOCKS, block.index) or {})) for block in grid)
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
        return asdict(MeasureRecord(int(np.count_nonzero(labels))))
    with slide.clock.stage("measure"):
        pixels = slide.reader.of_channels(measured_channels(plan.slide))
        return asdict(measure_block(plan, block, around, pixels, slide.certainty))


def tabulate(slide: OpenSlide, _: int) -> Record:
    """Make the table of objects."""
    with slide.clock.stage("measure"):
        records = (_measure_record(record) for _, record in slide.journal.records(INSTANCES))
        return {"objects": write_objects(slide.plan, _scratch(slide).objects, records)}


def _seed_record(record: Record) -> SeedRecord:
    sides = {side: SideRuns(**runs) for side, runs in record["sides"].items()}
    return SeedRecord(record["cells"], EdgeSeeds(**record["edges"]), sides)


def _measure_record(record: Record) -> MeasureRecord:
    return MeasureRecord(record["labelled"], [Quality(**sums) for sums in record["quality"]])


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


def compile_kernels(result: BlockResult, block: Block, grid: BlockGrid, rule: InstanceRule) -> None:
    """Do with one tile what is done with blocks, so that nothing is compiled while they are under way."""
    codes, _ = number_seeds(result.mask, block, grid, rule.smallest_seed)
    frame = reach(rule.steps)
    around = np.pad(codes, frame)
    core = around[frame:-frame, frame:-frame]
    stored = codes.view()
    stored.flags.writeable = False  # as the scratch gives them; of another kind than arrays that can be written
    renumber(stored, np.arange(codes.max() + 1, dtype=np.uint32), core)
    grow(around, rule.steps, codes)


def _rule(slide: OpenSlide) -> InstanceRule:
    assert slide.plan.instances is not None
    return slide.plan.instances


def _scratch(slide: OpenSlide) -> Scratch:
    assert slide.scratch is not None
    return slide.scratch
