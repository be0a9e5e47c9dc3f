"""Mpx/s of the shipped model in every backend at one tile, with its parity beside it: the race, with its conditions.

python benchmarks/bench_model.py [--tile 1776] [--batch 1]
"""

from __future__ import annotations

import argparse

from conditions import save

from cellseg_batch.engine.artefacts import Artefacts
from cellseg_batch.engine.machine import cores
from cellseg_batch.engine.models import load_model
from cellseg_batch.engine.race import Request, race
from cellseg_batch.engine.settings import RACE_TILE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tile", type=int, default=RACE_TILE, help="side in px")
    parser.add_argument("--batch", type=int, default=1)
    arguments = parser.parse_args()
    request = Request("nuclei", "auto", "auto", arguments.tile, arguments.batch, cores())
    certificate = race(request, load_model(request.model), Artefacts())
    for one in certificate.candidates:
        print(one.name, one.missing or f"{one.mpx_per_s:.2f} Mpx/s", one.parity.text if one.parity else "")
    print(save("model", certificate.to_json()["candidates"]))


if __name__ == "__main__":
    main()
