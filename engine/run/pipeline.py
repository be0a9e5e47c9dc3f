"""Lead the data along their path: slide -> blocks -> tiles -> batch -> model -> stitch -> writer -> journal.

`segment_block` is the whole path of a block, `passes_of` that of a slide.  These functions run in a worker, which
may be a process on another machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.geometry import Block
from cellseg_batch.engine.inference.background import without_background
from cellseg_batch.engine.inference.prediction import BlockResult, core_of, count_infinite, no_foreground
from cellseg_batch.engine.run.input_state import pixels_state
from cellseg_batch.engine.run.instance_passes import grow_block, keep_seeds, merge_blocks, tabulate
from cellseg_batch.engine.run.open_slide import OpenSlide
from cellseg_batch.engine.run.records import (
    BLOCKS,
    CENTROIDS,
    INSTANCES,
    KEPT,
    LEVELS,
    MERGE,
    TABLE,
    BlockRecord,
    ClassRecord,
    FinishedRecord,
    GrowthRecord,
    KeptRecord,
    LevelRecord,
    MergeRecord,
    TaskRecord,
)
from cellseg_batch.engine.run.region_passes import add_up_block, keep_objects
from cellseg_batch.engine.run.slide_plan import SlidePlan
from cellseg_batch.engine.run.slide_region import cut, of_slide
from cellseg_batch.engine.run.star_passes import keep_stars, merge_block_stars
from cellseg_batch.engine.slides.pixel_meaning import CLASSES, MASK, PROBABILITY
from cellseg_batch.engine.storage.journal import Journal


@dataclass(frozen=True)
class Pass:
    """One pass over a slide: tasks that do not depend on each other, but on all tasks of the pass before.

    Attributes:
        name: part of the journal with the records of its finished tasks.
        count: number of tasks.
        task: does the task of a number and returns its result, a dataclass of `cellseg_batch.engine.run.records`.
        scratch: whether its tasks need the scratch, if the slide has one.
    """

    name: str
    count: int
    task: Callable[[OpenSlide, int], Any]
    scratch: bool = True


def passes_of(plan: SlidePlan) -> Iterator[Pass]:
    """The passes over a slide, in order."""
    yield Pass(BLOCKS, len(plan.grid), segment_block)
    if plan.makes_ids:
        yield Pass(MERGE, 1, merge_blocks if plan.stars is None else merge_block_stars)
        if plan.region is not None:
            yield Pass(CENTROIDS, len(plan.grid), add_up_block)
            yield Pass(KEPT, 1, keep_objects)
        yield Pass(INSTANCES, len(plan.grid), grow_block)
    if plan.objects:
        yield Pass(TABLE, 1, tabulate)
    layout = plan.layout
    for level in range(1, len(layout.shapes)):
        task = partial(build_shard, level)
        yield Pass(f"{LEVELS}/{level}", layout.shard_count(level), task, scratch=False)


def segment_block(slide: OpenSlide, number: int) -> BlockRecord:
    """Read, segment and write one block; one wholly on glass or outside the region is written without being read."""
    plan, block = slide.plan, slide.plan.grid[number]
    inside_block, computed_block = plan.inside(block), plan.computed(block)
    outside_tiles = len(block.tiles) - len(inside_block.tiles)
    if not computed_block.tiles:
        return replace(
            _keep(slide, block, no_foreground(block, plan.prediction)),
            skipped_tiles=len(inside_block.tiles),
            outside_tiles=outside_tiles,
        )
    with slide.clock.stage("read"):
        pixels = slide.reader.read(block.plane, block.read_box)
    with slide.clock.stage("gather"):
        foreground_block = without_background(computed_block, pixels, plan.grid.lattice, plan.flat)
    result = slide.predictor.predict(pixels, foreground_block)
    return replace(
        _keep(slide, block, result),
        skipped_tiles=len(inside_block.tiles) - len(foreground_block.tiles),
        infinite=count_infinite(pixels, block),
        input_pixels=pixels_state(core_of(pixels, block)),
        outside_tiles=outside_tiles,
    )


def _keep(slide: OpenSlide, block: Block, result: BlockResult) -> BlockRecord:
    """Write what was predicted for a block; returns the record of that, as of a block that was not read."""
    if slide.region is not None and not slide.plan.makes_ids:
        with slide.clock.stage("stitch"), of_slide(slide.plan.slide):
            result = cut(result, slide.region.inside(block.box))
    seeds = None if slide.plan.instances is None else keep_seeds(slide, block, result.mask)
    if result.stars is not None:
        keep_stars(slide, block, result.stars)
    with slide.clock.stage("write"):
        _write_outputs(slide, block, result)
        if slide.scratch.probability is not None and result.probability is not None:
            slide.scratch.probability.write(block, result.probability)
        if slide.scratch.classes is not None and result.classes is not None:
            slide.scratch.classes.write(block, result.classes)
    return BlockRecord(
        seeds=seeds,
        foreground=result.foreground,
        missing=result.missing,
        classes=_count_classes(slide.plan, result),
        input_pixels=None,
    )


def _count_classes(plan: SlidePlan, result: BlockResult) -> tuple[int, ...]:
    """Pixels of each class; () for labels that are none."""
    count = len(plan.outputs[0].meaning.names)
    return tuple(np.bincount(result.mask.ravel(), minlength=count + 1)[1:].tolist()) if count else ()


def _write_outputs(slide: OpenSlide, block: Block, result: BlockResult) -> None:
    """Write the output images that come from a block's prediction alone; instances come from a later pass."""
    made = {MASK.name: result.mask, CLASSES: result.mask, PROBABILITY.name: result.probability}
    for output in slide.plan.outputs:
        pixels = made.get(output.meaning.name)
        if pixels is not None:
            slide.images[output.name].write(0, block.plane, block.box, pixels)


def build_shard(level: int, slide: OpenSlide, number: int) -> LevelRecord:
    """Make one shard of a level of the pyramid from the next finer level."""
    with slide.clock.stage("pyramid"):
        for image in slide.images.values():
            if level < len(image.layout.shapes):  # the mask of tissue has one
                image.build_level(level, *image.layout.shard_box(level, number))
    return LevelRecord()


def totals(plan: SlidePlan, journal: Journal) -> FinishedRecord:
    """Add up the figures of all records of a finished slide."""
    foreground = missing = skipped_tiles = infinite = outside_tiles = 0
    named = plan.outputs[0].meaning.classes
    of_labels = np.zeros(len(named), np.int64)
    for _, block in journal.records(BLOCKS, TaskRecord[BlockRecord]):
        foreground += block.result.foreground
        missing += block.result.missing
        skipped_tiles += block.result.skipped_tiles
        infinite += block.result.infinite
        outside_tiles += block.result.outside_tiles
        of_labels += np.array(block.result.classes, np.int64)
    figures = FinishedRecord(
        foreground,
        missing,
        skipped_tiles,
        infinite=infinite,
        classes=_classes(named, of_labels),
        outside_tiles=outside_tiles,
    )
    if not plan.makes_ids:
        return figures
    ((_, merge),) = journal.records(MERGE, TaskRecord[MergeRecord])
    grown = [growth.result for _, growth in journal.records(INSTANCES, TaskRecord[GrowthRecord])]
    labelled = sum(block.labelled for block in grown)
    figures = replace(figures, objects=merge.result.objects, cut_rays=merge.result.cut_rays)
    if plan.classes is not None:
        named = tuple(zip(plan.classes.names, plan.classes.colours, strict=True))
        figures = replace(figures, classes=_classes(named, np.sum([block.classes for block in grown], axis=0)))
    if plan.region is not None:
        ((_, kept),) = journal.records(KEPT, TaskRecord[KeptRecord])
        return replace(figures, objects=kept.result.objects, cut_objects=kept.result.cut, foreground=labelled)
    if plan.stars is not None:
        return replace(figures, foreground=labelled)
    return replace(figures, unreached=foreground - labelled)


def _classes(named: Iterable[tuple[str, str]], pixels: NDArray[np.int64]) -> tuple[ClassRecord, ...]:
    """The classes, each with its name, its colour and its number of pixels."""
    return tuple(ClassRecord(*one, int(count)) for one, count in zip(named, pixels, strict=True))
