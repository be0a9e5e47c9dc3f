"""What scheduling costs: no-op blocks through every pool, and real blocks on worker processes, in parts.

python benchmarks/bench_scheduler.py PART... [--blocks 100000] [--workers 2] [--precision bf16] [--rounds 2]

    noop      no-op blocks of one slide and of many, on threads and on worker processes
    calls     the same with every block handed out alone, as blocks that take long are
    scaling   a slide of 12288 px on one and on two worker processes of one thread and one core each
    cluster   4,096 blocks of a slide of 16384 px on threads, and on one worker process with as many

The growth is that of the process that runs the campaign, scheduler of the cluster included, over the blocks after the
first tenth.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from common import engine_flags, pieces_of, row, save, segment, work_folder

from cellseg_batch.engine.machine import resident_bytes
from cellseg_batch.engine.profiling.bench_slides import Form, write_slide
from cellseg_batch.engine.scheduling import scheduler
from cellseg_batch.engine.scheduling.dask_pools import open_pool
from cellseg_batch.engine.scheduling.scheduler import Pool, TaskGroup, Workflow, run_workflows
from cellseg_batch.engine.settings import Settings

# 64 x 64 blocks of one tile each.
_SMALL_BLOCKS = ["--block", "256", "--tile", "320", "--margin", "32"]


@dataclass
class Tally:
    """Counts results; notes the memory after a tenth of them, and the most since."""

    expected: int
    done: int = 0
    early: int = 0
    most: int = 0

    def collect(self, result: int) -> None:
        self.done += 1
        step = self.expected // 20
        if self.done % step == 0:
            resident = resident_bytes()
            self.most = max(self.most, resident)
            if self.done == 2 * step:
                self.early = resident


def no_op(number: int) -> int:
    return number


def slides(count: int, blocks: int, tally: Tally) -> Iterator[Workflow[None]]:
    for _ in range(count):
        yield slide(blocks, tally)


def slide(blocks: int, tally: Tally) -> Workflow[None]:
    yield TaskGroup(no_op, range(blocks), tally.collect)


def measure(name: str, pool: Pool, blocks: int, count: int) -> dict[str, Any]:
    """Seconds, microseconds per block and growth of memory for ``blocks`` blocks in ``count`` slides."""
    tally = Tally(blocks)
    start = time.perf_counter()
    for _ in run_workflows(slides(count, blocks // count, tally), pool):
        pass
    seconds = time.perf_counter() - start
    assert tally.done == blocks
    figures = {
        "seconds": seconds,
        "us_per_block": 1e6 * seconds / blocks,
        "growth_mb": (tally.most - tally.early) / 1e6,
    }
    return {"name": name, "blocks": blocks, "slides": count, **figures}


def pools(workers: int) -> Iterator[tuple[str, Pool]]:
    """Threads and worker processes, as many as a run would have them."""
    for name in ("threads", "processes"):
        yield name, open_pool(Settings(scheduler=name, workers=workers, device="cpu"))


@contextmanager
def one_a_call() -> Iterator[None]:
    """Blocks are handed out alone, however short they are."""
    most, scheduler._MOST_PER_CALL = scheduler._MOST_PER_CALL, 1
    try:
        yield
    finally:
        scheduler._MOST_PER_CALL = most


def noop(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    blocks = arguments.blocks
    return [
        measure(name, pool, blocks, count) for count in (1, blocks // 100) for name, pool in pools(arguments.workers)
    ]


def calls(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    with one_a_call():
        return [measure(name, pool, 4096, 1) for name, pool in pools(arguments.workers)]


def scaling(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    variants = {
        f"{count} x 1 thread": ["--scheduler", "processes", "--workers", str(count), "--threads", "1"]
        for count in (1, 2)
    }
    # With a second core to itself, one process would read and write while its thread computes.
    rows = _take_turns(arguments, 12288, variants, cores=(1, 2))
    rows[1]["times_faster"] = rows[1]["mpx_per_s"] / rows[0]["mpx_per_s"]
    return rows


def cluster(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    variants = {
        "threads": [*_SMALL_BLOCKS, "--workers", "2"],
        "one worker process": [*_SMALL_BLOCKS, "--scheduler", "processes", "--workers", "1"],
    }
    rows = _take_turns(arguments, 16384, variants)
    rows[1]["overhead"] = rows[0]["mpx_per_s"] / rows[1]["mpx_per_s"] - 1
    return rows


def _take_turns(
    arguments: argparse.Namespace, side: int, variants: dict[str, list[str]], cores: tuple[int, ...] = ()
) -> list[dict[str, Any]]:
    """A row of rates for each variant on one slide; ``cores`` are how many each may use, all of them if left out."""
    every_core = os.sched_getaffinity(0)
    rates: dict[str, list[float]] = {name: [] for name in variants}
    blocks = 0
    with work_folder(arguments.folder) as folder:
        path = folder / f"slide-{side}.zarr"
        if not path.exists():
            write_slide(path, Form(side), pieces_of(None))
        # Compiles; no worker finds anything else to do.
        segment(write_slide(folder / "warm.zarr", Form(512), pieces_of(None)), folder / "out", *arguments.flags)
        order = list(zip_longest(variants.items(), cores))
        for turn in range(arguments.rounds):
            for (name, flags), count in order:
                os.sched_setaffinity(0, sorted(every_core)[:count])
                report = segment(path, folder / "out", *arguments.flags, *flags)
                rates[name].append(report["mpx_per_s"])
                blocks = sum(slide_report["blocks"] for slide_report in report["slides"])
                print(f"round {turn}: {name} {report['seconds']:.2f} s", flush=True)
            order.reverse()  # a machine that gets slower does so for both
        os.sched_setaffinity(0, every_core)
    return [row(name, every, blocks=blocks) for name, every in rates.items()]


PARTS = {part.__name__: part for part in (noop, calls, scaling, cluster)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART")
    parser.add_argument("--blocks", type=int, default=100_000, help="of noop")
    parser.add_argument("--workers", type=int, default=2, help="of noop and calls")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--rounds", type=int, default=2, help="of scaling and cluster")
    parser.add_argument("--folder", type=Path, help="keep the slides here, for another call")
    arguments = parser.parse_args()
    arguments.flags = engine_flags(arguments.precision)
    for name in arguments.parts:
        about = {"workers": arguments.workers} if name in ("noop", "calls") else {"precision": arguments.precision}
        save(f"scheduler_{name}", PARTS[name](arguments), **about)


if __name__ == "__main__":
    main()
