"""The rounds over a slide, and what their tasks work with: all of it runs in a worker, perhaps on another machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cellseg_batch.engine.geometry import Block, BlockGrid
from cellseg_batch.engine.inference.cpu_runner import AnyRunner, BlockResult
from cellseg_batch.engine.objects.scratch import Scratch
from cellseg_batch.engine.run.slide_plan import SlidePlan
from cellseg_batch.engine.slides.label_layout import lay_out
from cellseg_batch.engine.slides.reader import SlideReader
from cellseg_batch.engine.slides.writer import ImageWriter
from cellseg_batch.engine.stage_clock import StageClock
from cellseg_batch.engine.storage.journal import Journal

BLOCKS = "blocks"
Record = dict[str, Any]


@dataclass(frozen=True)
class OpenSlide:
    """The rooms that one slide's pixels pass through, open in this process.

    Attributes:
        plan: how the slide is processed.
        reader: of the image.
        runner: the model for one block at a time, as a context.
        ready: blocks that were segmented when the model was warmed up.
        labels, probability: what is written; no probability unless asked for.
        scratch: codes between the two passes that instances take; None for a mask.
        certainty: the probability between these passes; None if objects are not measured.
        journal: of the output.
        clock: of the process.
    """

    plan: SlidePlan
    reader: SlideReader
    runner: Callable[[], AbstractContextManager[AnyRunner]]
    ready: dict[Block, BlockResult]
    labels: ImageWriter
    probability: ImageWriter | None
    scratch: Scratch | None
    certainty: Scratch | None
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
        first: task to begin with.
        scratch: whether its tasks need the scratch, if the slide has one.
    """

    part: str
    count: int
    task: Callable[[OpenSlide, int], Record]
    first: int = 0
    scratch: bool = True


def output_images(plan: SlidePlan) -> tuple[ImageWriter, ImageWriter | None]:
    """The labels and, if it is wanted, the probability of a slide."""
    place = plan.place
    layout = lay_out(plan.slide, plan.level.level, plan.grid, place.zarr_format)
    ids = layout if plan.instances is None else replace(layout, dtype="uint32")
    probability = ImageWriter(place.companion, place.probability, layout) if plan.probability else None
    return ImageWriter(place.store, place.labels, ids), probability


def scratch_of(plan: SlidePlan) -> tuple[Scratch | None, Scratch | None]:
    """The codes and the certainty of a slide between its passes, as far as they are needed."""
    journal = plan.place.journal
    codes = Scratch(journal, "codes", np.uint32, plan.frame) if plan.frame is not None else None
    return codes, Scratch(journal, "probability", np.uint8, frame=0) if plan.objects else None


def middle_of(grid: BlockGrid) -> int:
    """Number of the block in the middle, where a slide seldom shows nothing."""
    rows, columns = grid.grid
    return (grid.planes // 2 * rows + rows // 2) * columns + columns // 2
