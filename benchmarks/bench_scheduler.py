"""What a block costs besides its work: no-op blocks through the scheduler, on threads and on worker processes.

python benchmarks/bench_scheduler.py [--blocks 100000] [--workers 2]

The growth is that of the process that runs the campaign, scheduler of the cluster included, over the blocks after the
first tenth.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from common import save

from cellseg_batch.engine.clusters import open_pool
from cellseg_batch.engine.machine import resident_bytes
from cellseg_batch.engine.scheduler import Course, Pool, Work, run_courses
from cellseg_batch.engine.settings import Settings


@dataclass
class Tally:
    """Counts results; notes the memory after a tenth of them, and the most since."""

    expected: int
    done: int = 0
    early: int = 0
    most: int = 0
    seen: list[int] = field(default_factory=list)

    def collect(self, result: int) -> None:
        self.done += 1
        if self.done % (self.expected // 20) == 0:
            resident = resident_bytes()
            self.most = max(self.most, resident)
            if self.done == self.expected // 10:
                self.early = resident


def no_op(number: int) -> int:
    return number


def slides(count: int, blocks: int, tally: Tally) -> Iterator[Course[None]]:
    for _ in range(count):
        yield slide(blocks, tally)


def slide(blocks: int, tally: Tally) -> Course[None]:
    yield Work(no_op, range(blocks), tally.collect)


def measure(pool: Pool, blocks: int, count: int) -> dict[str, float]:
    """Seconds, microseconds per block and growth of memory for ``blocks`` blocks in ``count`` slides."""
    tally = Tally(blocks)
    start = time.perf_counter()
    for _ in run_courses(slides(count, blocks // count, tally), pool):
        pass
    seconds = time.perf_counter() - start
    assert tally.done == blocks
    return {"seconds": seconds, "us_per_block": 1e6 * seconds / blocks, "growth_mb": (tally.most - tally.early) / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    rows = []
    for scheduler in ("threads", "processes"):
        for count in (1, arguments.blocks // 100):
            pool = open_pool(Settings(scheduler=scheduler, workers=arguments.workers, device="cpu"))
            row = measure(pool, arguments.blocks, count)
            rows.append({"scheduler": scheduler, "blocks": arguments.blocks, "slides": count, **row})
            print(rows[-1])
    save("scheduler", rows, workers=arguments.workers)


if __name__ == "__main__":
    main()
