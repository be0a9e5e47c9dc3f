"""Measure the shipped model in every backend on a single tile, with its parity: the race, with its conditions.

python benchmarks/bench_model.py [--tile N] [--batch 1]
"""

from __future__ import annotations

import argparse

from common import row, save

from cellseg_batch.engine.inference.race import large_tile, race
from cellseg_batch.engine.inference.race_result import Request
from cellseg_batch.engine.machine import cores
from cellseg_batch.engine.models import load_model
from cellseg_batch.engine.storage.cache import Artefacts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tile", type=int, help="side in px; those of a large slide unless given")
    parser.add_argument("--batch", type=int, default=1)
    arguments = parser.parse_args()
    bundle = load_model("nuclei")
    tile = (arguments.tile, arguments.tile) if arguments.tile else large_tile(bundle.card)
    request = Request("nuclei", "auto", "auto", tile, arguments.batch, cores(), complete=True)
    race_result = race(request, bundle, Artefacts())
    rows = [
        row(
            candidate.name,
            [candidate.slowest, candidate.mpx_per_s, candidate.fastest],
            flipped=candidate.parity.flipped,
            max_dp=candidate.parity.max_dp,
        )
        for candidate in race_result.candidates
        if candidate.parity is not None
    ]
    save("model", rows, tile=tile, batch=arguments.batch)


if __name__ == "__main__":
    main()
