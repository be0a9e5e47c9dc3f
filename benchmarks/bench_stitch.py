"""Mpx/s and GB/s of the steps around the network on one tile: fused kernels, their plain references, torch's way.

python benchmarks/bench_stitch.py [--tile 1776] [--margin 64] [--rounds 7]

One thread each, as in a run.  Bytes are those that a step must move at least: each value read and written once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from common import row, save

from cellseg_batch.kernels import gather_reference, stitch_reference
from cellseg_batch.kernels.gather import cut, gather
from cellseg_batch.kernels.stitch import stitch_mask, stitch_probability


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tile", type=int, default=1776, help="side in px")
    parser.add_argument("--margin", type=int, default=64, help="in px")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    side, margin = arguments.tile, arguments.margin
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, side, side), np.uint8)
    table = np.arange(side)[None]
    batch, bytes_batch = np.empty((1, 3, side, side), np.float32), np.empty((1, 3, side, side), np.uint8)
    logits = rng.normal(size=(1, 3, side, side)).astype(np.float32)
    core = side - 2 * margin
    places = np.array([(margin, margin, 0, 0, core, core)], np.int64)
    mask = np.empty((core, core), np.uint8)
    foreground = torch.from_numpy(logits)[0, 0, margin:-margin, margin:-margin]
    bounds = 10.0, 1 / 200

    # Name -> (call, pixels, bytes a pixel).
    steps: dict[str, tuple[Callable[[], object], int, int]] = {
        "gather": (lambda: gather(pixels, table, table, *bounds, batch), side**2, 3 * (1 + 4)),
        "gather, reference": (
            lambda: gather_reference.gather(pixels, table, table, *bounds, batch),
            side**2,
            3 * (1 + 4),
        ),
        "cut, for networks that take bytes": (lambda: cut(pixels, table, table, bytes_batch), side**2, 3 * (1 + 1)),
        "stitch, mask": (lambda: stitch_mask(logits, places, 0.0, mask), core**2, 4 + 1),
        "stitch, mask, reference": (
            lambda: stitch_reference.stitch_mask(logits, places, np.float32(0), mask),
            core**2,
            4 + 1,
        ),
        "stitch, mask, torch sigmoid": (lambda: (torch.sigmoid(foreground) > 0.5).byte(), core**2, 4 + 1),
        "stitch, probability": (lambda: stitch_probability(logits, places, mask), core**2, 4 + 1),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(arguments.rounds + 1):
        for name, (call, _, _) in steps.items():
            start = time.perf_counter()
            call()
            if turn:  # the first one compiles
                seconds[name].append(time.perf_counter() - start)
    rows = [
        row(
            name,
            [count / 1e6 / duration for duration in seconds[name]],
            gb_per_s=count * size / 1e9 / float(np.median(seconds[name])),
        )
        for name, (_, count, size) in steps.items()
    ]
    save("stitch", rows, tile=side, margin=margin)


if __name__ == "__main__":
    main()
