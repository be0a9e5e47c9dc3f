"""Memory and time of the merge of a slide's seeds, on synthetic blocks: ``python benchmarks/bench_merge.py``.

Each block of 4096 px has as many objects as asked for, and along each side a run of 30 px for every 50 px that touches
the next block's.  What is measured is what a run does: records become ids, which are saved and read block by block.
"""

from __future__ import annotations

import argparse
import math
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cellseg_batch.engine.geometry import Block, BlockGrid, Lattice
from cellseg_batch.engine.objects.merge import FinalIds, merge_seeds
from cellseg_batch.engine.objects.seeds import EdgeSeeds, SeedRecord, SideRuns

_BLOCK, _PITCH, _WIDTH = 4096, 50, 30


def records(grid: BlockGrid, seeds: int) -> Iterator[tuple[Block, SeedRecord]]:
    """Every block with its record."""
    height, width = grid.lattice.shape
    starts = np.arange(0, _BLOCK - _WIDTH, _PITCH)
    for block in grid:
        box = block.box
        sides = {"top": box.y0 > 0, "left": box.x0 > 0, "bottom": box.y1 < height, "right": box.x1 < width}
        runs, ids, firsts = {}, [], []
        for number, (side, is_open) in enumerate(sides.items()):
            if is_open:
                own = 1 + number * len(starts) + np.arange(len(starts))
                runs[side] = SideRuns(own.tolist(), starts.tolist(), (starts + _WIDTH).tolist())
                along = starts if side in ("top", "bottom") else 0 * starts + (_BLOCK - 1) * (side == "right")
                down = starts if side in ("left", "right") else 0 * starts + (_BLOCK - 1) * (side == "bottom")
                ids += own.tolist()
                firsts += ((box.y0 + down) * width + box.x0 + along).tolist()
        yield block, SeedRecord([seeds], EdgeSeeds(ids, [300] * len(ids), firsts), runs)


def main() -> None:
    """Measure one slide."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=float, default=1e8)
    parser.add_argument("--per-block", type=int, default=6700)
    arguments = parser.parse_args()
    side = math.isqrt(round(arguments.objects / arguments.per_block)) + 1
    grid = BlockGrid(Lattice((side * _BLOCK, side * _BLOCK), (_BLOCK, _BLOCK), 0), (1, 1), 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    merged = merge_seeds(records(grid, arguments.per_block), grid, smallest=10)
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        merged.save(Path(folder))
        start = time.perf_counter()
        FinalIds.load(Path(folder)).codes_of(grid[len(grid) // 2], grid)
        lookup = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{side} x {side} blocks, {merged.objects / 1e6:.1f} million objects")
    print(f"joined or dropped {len(merged.moved) / 1e6:.1f} million seeds in {seconds:.1f} s (records made meanwhile)")
    print(f"peak {peak / 1024:.0f} MB, of which {before / 1024:.0f} MB before; ids of a block in {1e3 * lookup:.1f} ms")


if __name__ == "__main__":
    main()
