"""A slide that is ready to be worked on: its plan, its passes, and what its blocks need of the machine."""

from __future__ import annotations

from dataclasses import dataclass

from cellseg_batch.engine.run.pipeline import Pass
from cellseg_batch.engine.run.records import BackendIdentity
from cellseg_batch.engine.run.slide_plan import SlidePlan


@dataclass(frozen=True)
class PreparedSlide:
    """All that any worker process needs to know to work on a slide; small, and no pixels.

    Attributes:
        plan: how the slide is processed.
        backend: the library that computes it.
        passes: over the slide, in order.
        block_bytes: host memory that one block holds at most.
        budget_bytes: host memory that all blocks in flight of one process may hold; None is no limit.
        workers: blocks in flight in one process.
        peak_bytes: host memory that the process will need at most.
        pixels_done: pixels that an earlier run has segmented.
    """

    plan: SlidePlan
    backend: BackendIdentity
    passes: tuple[Pass, ...]
    block_bytes: int
    budget_bytes: int | None
    workers: int
    peak_bytes: int
    pixels_done: int

    def progress_of(self, slide_pass: Pass, tasks: int = 1) -> float:
        """Pixels of the slide that ``tasks`` of a pass stand for, if all passes together are the whole slide."""
        whole = sum(each.weight for each in self.passes)
        return self.plan.pixels * slide_pass.weight / whole * tasks / slide_pass.count
