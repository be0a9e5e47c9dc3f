"""Mpx/s of the shipped model in every backend at one tile, with its parity beside it: the race, with its conditions.

python benchmarks/bench_model.py [--tile 1776] [--batch 1]
"""

from __future__ import annotations

import argparse

from common import row, save

from cellseg_batch.engine.inference.race import race
from cellseg_batch.engine.inference.race_result import Request
from cellseg_batch.engine.machine import cores
from cellseg_batch.engine.models import load_model
from cellseg_batch.engine.settings import RACE_TILE
from cellseg_batch.engine.storage.cache import Artefacts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tile", type=int, default=RACE_TILE, help="side in px")
    parser.add_argument("--batch", type=int, default=1)
    arguments = parser.parse_args()
    request = Request("nuclei", "auto", "auto", arguments.tile, arguments.batch, cores(), complete=True)
    race_result = race(request, load_model(request.model), Artefacts())
    rows = [
        row(one.name, [one.slowest, one.mpx_per_s, one.fastest], flipped=one.parity.flipped, max_dp=one.parity.max_dp)
        for one in race_result.candidates
        if one.parity is not None
    ]
    save("model", rows, tile=arguments.tile, batch=arguments.batch)


if __name__ == "__main__":
    main()
