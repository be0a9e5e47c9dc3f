"""The path of the data: slide -> blocks -> tiles -> batch -> model -> stitch -> writer -> journal.

`segment_block` is the whole story of a block, `passes_of` that of a slide; every other room is called from here or
calls these.  What lies here runs in a worker, which may be a process on another machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from cellseg_batch.engine.background import without_background
from cellseg_batch.engine.journal import Journal
from cellseg_batch.engine.plan import SlidePlan
from cellseg_batch.engine.reader import SlideReader
from cellseg_batch.engine.runner import AnyRunner, no_foreground
from cellseg_batch.engine.stages import StageClock
from cellseg_batch.engine.writer import ImageWriter, lay_out

BLOCKS = "blocks"
Record = dict[str, Any]


@dataclass(frozen=True)
class OpenSlide:
    """The rooms that one slide's pixels pass through, open in this process.

    Attributes:
        plan: how the slide is processed.
        reader: of the image.
        runner: the model for one block at a time, as a context.
        labels, probability: what is written; no probability unless asked for.
        journal: of the output.
        clock: of the process.
    """

    plan: SlidePlan
    reader: SlideReader
    runner: Callable[[], AbstractContextManager[AnyRunner]]
    labels: ImageWriter
    probability: ImageWriter | None
    journal: Journal
    clock: StageClock

    @property
    def images(self) -> Iterator[ImageWriter]:
        """Everything that is written."""
        return (image for image in (self.labels, self.probability) if image is not None)


@dataclass(frozen=True)
class Pass:
    """One round over a slide: tasks that do not depend on each other, but on all of the pass before.

    Attributes:
        part: of the journal, one record per finished task.
        count: number of tasks.
        task: does task ``number`` and returns its record.
    """

    part: str
    count: int
    task: Callable[[OpenSlide, int], Record]


def passes_of(plan: SlidePlan) -> Iterator[Pass]:
    """The passes over a slide, in order."""
    yield Pass(BLOCKS, len(plan.grid), segment_block)
    layout = lay_out(plan.slide, plan.level.level, plan.grid, plan.place.zarr_format)
    for level in range(1, len(layout.shapes)):
        yield Pass(f"levels/{level}", layout.shard_count(level), partial(build_shard, level))


def segment_block(slide: OpenSlide, number: int) -> Record:
    """Read, segment and write one block."""
    block = slide.plan.grid[number]
    with slide.clock.stage("read"):
        pixels = slide.reader.read(block.plane, block.read_box)
    with slide.clock.stage("gather"):
        shown = without_background(block, pixels, slide.plan.grid.lattice.shape, slide.plan.flat)
    if shown.tiles:
        with slide.runner() as runner:
            result = runner.segment(pixels, shown)
    else:
        result = no_foreground(pixels, block, slide.plan.probability)
    with slide.clock.stage("write"):
        slide.labels.write(0, block.plane, block.box, result.mask)
        if slide.probability is not None and result.probability is not None:
            slide.probability.write(0, block.plane, block.box, result.probability)
    skipped = len(block.tiles) - len(shown.tiles)
    return {"foreground": result.foreground, "missing": result.missing, "skipped_tiles": skipped}


def build_shard(level: int, slide: OpenSlide, number: int) -> Record:
    """Shrink one shard of a level of the pyramid from the level above it."""
    with slide.clock.stage("pyramid"):
        for image in slide.images:
            image.shrink(level, *image.layout.shard_box(level, number))
    return {}


def totals(journal: Journal) -> Record:
    """Foreground pixels, NaN in the input and tiles that were not computed, of all finished blocks together."""
    total: Counter[str] = Counter()
    for _, record in journal.records(BLOCKS):
        total.update(record)
    return dict(total)
