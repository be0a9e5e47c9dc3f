"""The path of the data: slide -> blocks -> tiles -> batch -> model -> stitch -> writer -> journal.

`segment_block` is the whole story; every other room is called from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cellseg_batch.engine.errors import SlideError
from cellseg_batch.engine.geometry import Block, Box
from cellseg_batch.engine.journal import Journal
from cellseg_batch.engine.plan import SlidePlan
from cellseg_batch.engine.reader import SlideReader
from cellseg_batch.engine.runner import Runner
from cellseg_batch.engine.scheduler import run_tasks
from cellseg_batch.engine.stages import StageClock
from cellseg_batch.engine.writer import ImageWriter

_BLOCKS, _LEVELS = "blocks", "levels"


@dataclass(frozen=True)
class Pipeline:
    """The rooms that one slide's blocks pass through."""

    plan: SlidePlan
    reader: SlideReader
    runner: Runner
    labels: ImageWriter
    probability: ImageWriter | None
    journal: Journal
    clock: StageClock
    on_pixels: Callable[[int], None]

    def segment_block(self, block: Block) -> SlideError | None:
        """Read, segment and write one block, then say so in the journal; the error if that failed."""
        try:
            with self.clock.stage("read"):
                pixels = self.reader.read(block.plane, block.read_box)
            result = self.runner.segment(pixels, block)
            with self.clock.stage("write"):
                self.labels.write(0, block.plane, block.box, result.mask)
                if self.probability is not None and result.probability is not None:
                    self.probability.write(0, block.plane, block.box, result.probability)
                record = {"foreground": result.foreground, "missing": result.missing}
                self.journal.record(_BLOCKS, block.index, record)
        except SlideError as error:
            return error
        self.on_pixels(block.box.area)
        return None

    def run(self, workers: int) -> list[SlideError]:
        """Segment every block that is not on disk yet, then build the pyramid; what failed comes back."""
        done = self.journal.numbers(_BLOCKS)
        waiting = (self.plan.grid[index] for index in range(len(self.plan.grid)) if index not in done)
        failures = [error for error in run_tasks(self.segment_block, waiting, workers) if error is not None]
        if not failures:
            self._build_pyramid(workers)
        return failures

    def totals(self) -> tuple[int, int]:
        """(foreground pixels, NaN in the input) of every finished block."""
        records = [record for _, record in self.journal.records(_BLOCKS)]
        return sum(one["foreground"] for one in records), sum(one["missing"] for one in records)

    def pixels_done(self) -> int:
        """Pixels of the blocks that are on disk."""
        return sum(self.plan.grid[index].box.area for index in self.journal.numbers(_BLOCKS))

    def _build_pyramid(self, workers: int) -> None:
        for level in range(1, len(self.labels.layout.shapes)):
            part = f"{_LEVELS}/{level}"
            done = self.journal.numbers(part)

            def build(task: tuple[int, tuple[int, Box]], level: int = level, part: str = part) -> None:
                number, (plane, box) = task
                with self.clock.stage("pyramid"):
                    self.labels.shrink(level, plane, box)
                    if self.probability is not None:
                        self.probability.shrink(level, plane, box)
                    self.journal.record(part, number, {})

            boxes = enumerate(self.labels.shard_boxes(level))
            waiting = (task for task in boxes if task[0] not in done)
            for _ in run_tasks(build, waiting, workers):
                pass
