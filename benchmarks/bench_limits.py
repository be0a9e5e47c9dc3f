"""What would saturate first with 1,000 workers and a million blocks: each part alone, at that scale, measured here.

python benchmarks/bench_limits.py [--workers 1000] [--blocks 1000000] [--precision bf16]

    bookkeeping  the run's own: a million no-op blocks of 10,000 slides, as many handed out as the workers would hold
    dask         calls that do nothing through scheduler and client, as many in flight, on two worker processes
    journal      records of blocks, each synced to a local disk; listing them, as a run that goes on does
    store        seconds, files opened and bytes of a block of 2048 px, over a real run on threads

A worker is this machine: it ends a block in the seconds that the run took for one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from bench_scheduler import measure, one_a_call
from common import pieces_of, save, work_folder
from rich.console import Console

from cellseg_batch.engine.cli.progress import RunProgress
from cellseg_batch.engine.profiling.bench_slides import Form, write_slide
from cellseg_batch.engine.run.campaign import run
from cellseg_batch.engine.run.records import BLOCKS, BlockRecord, TaskRecord
from cellseg_batch.engine.scheduling.dask_pools import THREADS_PER_PROCESS, DaskPool, open_pool
from cellseg_batch.engine.scheduling.scheduler import Pool
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.storage.journal import Journal

_SIDE = 8192
_CALLS = 20_000
_RECORDS = 20_000


class AtOnce:
    """Pool that makes every call at once, when it is submitted."""

    def submit(self, call: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(call(*arguments))
        return future

    def close(self, wait: bool) -> None: ...


@dataclass
class Wide:
    """Pool that takes as many calls at a time as a pool of ``processes`` worker processes."""

    pool: AtOnce | Pool
    processes: int
    seconds_per_call = DaskPool.seconds_per_call

    def __post_init__(self) -> None:
        self.workers = THREADS_PER_PROCESS * self.processes
        self.window = 2 * self.workers
        self.submit, self.close = self.pool.submit, self.pool.close


def bookkeeping(workers: int, blocks: int) -> dict[str, Any]:
    figures = measure("bookkeeping", Wide(AtOnce(), workers), blocks, 10_000)
    return {"name": "bookkeeping", "per_s": blocks / figures["seconds"], "growth_mb": figures["growth_mb"]}


def dask(workers: int) -> dict[str, Any]:
    with one_a_call():
        pool = open_pool(Settings(scheduler="processes", workers=2, device="cpu"))
        figures = measure("dask", Wide(pool, workers), _CALLS, 1)
    return {"name": "dask", "per_s": _CALLS / figures["seconds"], "growth_mb": figures["growth_mb"]}


def journal(folder: Path, record: TaskRecord[BlockRecord]) -> list[dict[str, Any]]:
    block_journal = Journal(folder / "journal")
    start = time.perf_counter()
    with ThreadPoolExecutor(8) as threads:
        for _ in threads.map(lambda number: block_journal.record(BLOCKS, number, record), range(_RECORDS)):
            pass
    writing = _RECORDS / (time.perf_counter() - start)
    start = time.perf_counter()
    assert not list(block_journal.missing(BLOCKS, _RECORDS))
    listing = _RECORDS / (time.perf_counter() - start)
    return [{"name": "journal, written", "per_s": writing}, {"name": "journal, listed", "per_s": listing}]


@dataclass
class Opened:
    """Counter of the files opened below a slide and below an output."""

    slide: Path
    out: Path
    counts: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def counted(self) -> Iterator[None]:
        counting = True

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if counting and event == "open" and isinstance(arguments[0], str):
                for name, folder in (("slide", self.slide), ("out", self.out)):
                    self.counts[name] += arguments[0].startswith(str(folder))

        sys.addaudithook(hook)
        yield
        counting = False


def store(folder: Path, precision: str) -> tuple[dict[str, Any], TaskRecord[BlockRecord]]:
    """Measure a run; returns its row and the record of a block."""
    slide, out = write_slide(folder / "slide.zarr", Form(_SIDE), pieces_of(None)), folder / "out"
    usual = {"backend": "openvino", "precision": precision, "gate": False, "downscale": 1, "skip_background": "off"}
    settings = Settings(output=out, **usual)
    opened, process = Opened(slide, out), psutil.Process()
    with RunProgress(Console(), verbosity=-1) as progress:
        run([write_slide(folder / "warm.zarr", Form(512), pieces_of(None))], settings, progress)
        before = process.io_counters()
        with opened.counted():
            report = run([slide], settings, progress)
        after = process.io_counters()
    (slide_report,) = report.slides
    record = Journal(next(out.glob("slide.zarr.cellseg/**/manifest.json")).parent).get(
        BLOCKS, 0, TaskRecord[BlockRecord]
    )
    assert record is not None
    blocks = slide_report.blocks
    figures = {
        "seconds_per_block": report.seconds / blocks,
        "files_read_per_block": opened.counts["slide"] / blocks,
        "files_written_per_block": opened.counts["out"] / blocks,
        "mb_read_per_block": (after.read_chars - before.read_chars) / 1e6 / blocks,
        "mb_written_per_block": (after.write_chars - before.write_chars) / 1e6 / blocks,
    }
    return {"name": "store", "per_s": blocks / report.seconds, **figures}, record


def conclude(rows: list[dict[str, Any]], workers: int) -> str:
    """Describe the figures in words."""
    *parts, _, block = rows
    rate = block["per_s"]
    for part in parts:
        part["workers"] = round(part["per_s"] / rate)
    first = min(parts, key=lambda part: part["per_s"])
    asked = workers * rate
    reads, writes = (asked * block[f"files_{direction}_per_block"] for direction in ("read", "written"))
    read, written = (asked * block[f"mb_{direction}_per_block"] for direction in ("read", "written"))
    return (
        f"A worker like this machine ends {rate:.2f} blocks a second, so {workers:,} end {asked:,.0f} and a million "
        f"take {1e6 / asked / 60:.0f} minutes. Of what they all share, {first['name']} is the slowest: "
        f"{first['per_s']:,.0f} a second, enough for {first['workers']:,} such workers. Meanwhile the store has to "
        f"give {read:,.0f} MB/s in {reads:,.0f} files a second, and to take {written:,.0f} MB/s in {writes:,.0f}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--precision", default="bf16")
    arguments = parser.parse_args()
    with work_folder(None) as folder:
        block, record = store(folder, arguments.precision)
        rows = [bookkeeping(arguments.workers, arguments.blocks), dask(arguments.workers), *journal(folder, record)]
        text = conclude([*rows, block], arguments.workers)
        save("limits", [*rows, block], workers=arguments.workers, blocks=arguments.blocks, text=text)


if __name__ == "__main__":
    main()
