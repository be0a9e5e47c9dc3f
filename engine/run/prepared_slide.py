"""Describe a slide that is ready for its passes: its plan, its passes, and the memory that its blocks need."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from cellseg_batch.engine.run.pipeline import Pass
from cellseg_batch.engine.run.records import BackendIdentity, shares_of
from cellseg_batch.engine.run.slide_plan import SlidePlan


@dataclass(frozen=True)
class PreparedSlide:
    """All that a worker process needs to know to work on a slide; it is small and holds no pixels.

    Attributes:
        plan: plan of the slide.
        backend: the library that computes it.
        passes: passes over the slide, in order.
        block_bytes: host memory in bytes that one block holds at most.
        budget_bytes: host memory in bytes that all blocks in flight of one process may hold; None sets no limit.
        workers: number of blocks in flight in one process.
        peak_bytes: host memory in bytes that the process will need at most.
        takes_turns: whether the blocks wait until those of slides with other networks are done, as the limit of memory
            leaves no room for two networks.
        pixels_done: number of pixels that an earlier run has segmented.
        progress_done: progress that the tasks of an earlier run are worth, in pixels.
    """

    plan: SlidePlan
    backend: BackendIdentity
    passes: tuple[Pass, ...]
    block_bytes: int
    budget_bytes: int | None
    workers: int
    peak_bytes: int
    takes_turns: bool = False
    pixels_done: int = 0
    progress_done: float = 0.0

    @property
    def turn(self) -> Hashable:
        """What the blocks share with those that may be in flight beside them, if they take turns; else None."""
        plan = self.plan
        return (self.backend, plan.downscale, plan.shape, plan.slide.dtype) if self.takes_turns else None

    def progress_of(self, slide_pass: Pass, tasks: int = 1) -> float:
        """Progress that ``tasks`` tasks of a pass are worth, in pixels; all passes together are worth the slide's."""
        share = shares_of(each_pass.name for each_pass in self.passes)[slide_pass.name]
        return self.plan.pixels * share * tasks / slide_pass.count
