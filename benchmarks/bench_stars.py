"""Processor time and memory from candidates to labels of stars, on synthetic objects: ``bench_stars.py``.

Ellipses of 8 to 14 px lie at random in a slide; every second pixel near the middle of one is a candidate, with noise on
its logit and its rays.  What is measured is what a run does behind the network, in one thread: candidates are decided
in their block, open ones are merged, labels are drawn.  The survivors are held against those of one call for the slide.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from cellseg_batch.engine.geometry import BlockGrid, fit_lattice, lay_blocks
from cellseg_batch.engine.objects.star_merge import draw_objects, merge_stars
from cellseg_batch.engine.objects.stars import StarRule, StarScratch, decide, inside
from cellseg_batch.engine.run.memory_model import star_memory
from cellseg_batch.kernels.stardist import OPEN, SHORTEST_RAY, SURVIVOR, Stars, join, suppress
from cellseg_batch.kernels.warm_up import compile_kernels
from cellseg_batch.trainer.card import StarDist

_RAYS, _GRID = 32, 2


def grid_of(side: int, block: int) -> BlockGrid:
    """The blocks of a square slide, as the shipped model's are laid."""
    return lay_blocks(fit_lattice((side, side), 1824, 64, 16), block)


def candidates(side: int, objects: int) -> Stars:
    """Candidates of touching ellipses, in no order."""
    random = np.random.default_rng(0)
    angles = 2 * np.pi / _RAYS * np.arange(_RAYS)
    parts = []
    for _ in range(0, objects, 5000):
        count = min(5000, objects)
        centres, radii = random.uniform(0, side, (count, 2, 1)), random.uniform(8, 14, (count, 2, 1))
        offsets = _GRID * np.array([(y, x) for y in range(-4, 5) for x in range(-4, 5)]).T
        points = centres // _GRID * _GRID + offsets
        scaled = (points - centres) / radii
        distance = np.hypot(scaled[:, 0], scaled[:, 1])
        one, point = np.nonzero((distance < 0.5) & ((points >= 0) & (points < side)).all(axis=1))
        along = np.array([np.sin(angles), np.cos(angles)]) / radii[one]
        dot = np.einsum("nk,nkr->nr", scaled[one, :, point], along)
        square = np.square(along).sum(axis=1)
        rays = (np.sqrt(dot**2 + square * (1 - distance[one, point, None] ** 2)) - dot) / square
        rays += random.normal(0, 0.5, rays.shape)
        y, x = points[one, :, point].T.astype(np.int32)
        logits = 3 - 4 * distance[one, point] + random.normal(0, 0.3, len(one))
        parts.append(Stars(y, x, logits.astype(np.float32), np.maximum(rays, SHORTEST_RAY).astype(np.float32)))
    stars = join(parts, _RAYS)
    _, first = np.unique(stars.y.astype(np.int64) * side + stars.x, return_index=True)
    return stars.take(first)


def prepare(folder: Path, side: int, objects: int, block: int) -> tuple[int, int, int]:
    """Write the candidates of every block; (their number, survivors of one call, a hash of their places)."""
    stars = candidates(side, objects)
    scratch = StarScratch(folder, "candidates", _RAYS)
    for part in grid_of(side, block):
        own = stars.take(inside(stars.y, stars.x, part.box))
        scratch.write(part, own, np.full(len(own.y), OPEN, np.uint8))
    stars = stars.take(stars.ranking())
    count = len(stars.y)
    states = suppress(stars, np.full(count, OPEN, np.uint8), np.zeros(count, np.bool_), StarDist().overlap)
    survivors = stars.take(states == SURVIVOR)
    return count, len(survivors.y), hash_of(survivors)


def hash_of(stars: Stars) -> int:
    """A number that tells sets of places apart."""
    return int(
        np.bitwise_xor.reduce((stars.y.astype(np.uint64) << 32 | stars.x.astype(np.uint64)) * 0x9E3779B97F4A7C15)
    )


def measure(folder: Path, side: int, block: int) -> dict[str, Any]:
    """Decide, merge and draw, with the seconds of each and the most memory that they took."""
    grid, rule = grid_of(side, block), StarRule(StarDist(), _RAYS, _GRID)
    given, scratch, survivors = (StarScratch(folder, name, _RAYS) for name in ("candidates", "stars", "survivors"))
    which = {"probability", "blend", "classes", "instances", "cells", "objects"}
    compile_kernels("uint8", stars=True, **dict.fromkeys(which, False))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, standing = {"decide": 0.0}, 0
    for part in grid:
        _, stars = given.read(part, part.box)
        states = np.full(len(stars.y), OPEN, np.uint8)
        start = time.process_time()
        states = decide(stars, states, part.box, grid.lattice.shape, rule)
        scratch.write(part, stars, states)
        seconds["decide"] += time.process_time() - start
        standing += int(np.count_nonzero(states))
    start = time.process_time()
    ids, _ = merge_stars(scratch, survivors, grid, rule)
    seconds["merge"] = time.process_time() - start
    start = time.process_time()
    labelled = 0
    for part in grid:
        labelled += int(np.count_nonzero(draw_objects(part.plane, part.box, survivors, ids, grid, rule)))
    seconds["draw"] = time.process_time() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    objects = join([survivors.read(part, part.box)[1] for part in grid], _RAYS)
    return {
        **{f"{name}_s": value for name, value in seconds.items()},
        "standing": standing,
        "objects": ids.objects,
        "hash": hash_of(objects),
        "labelled_fraction": labelled / side**2,
        "took_mb": (after - before) / 1024,
        "announced_mb": star_memory(grid, rule, 0.5, on_gpu=False) / 1e6,
    }


def main() -> None:
    """Measure one slide."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=8192, help="of the slide in px")
    parser.add_argument("--objects", type=int, default=50_000)
    parser.add_argument("--block", type=int, default=2048)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cellseg-bench-") as folder:
        # In a process of its own, whose memory does not count.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            given = (Path(folder), arguments.side, arguments.objects, arguments.block)
            count, survivors, expected = pool.submit(prepare, *given).result()
        figures = measure(Path(folder), arguments.side, arguments.block)
    same = figures.pop("hash") == expected
    seconds = figures["decide_s"] + figures["merge_s"] + figures["draw_s"]
    rates = {"candidates_per_s": count / seconds, "mpx_per_s": arguments.side**2 / seconds / 1e6}
    about = {"candidates": count, "survivors": survivors, "same_as_one_call": same}
    for name, value in {**about, **figures, **rates}.items():
        print(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")


if __name__ == "__main__":
    main()
