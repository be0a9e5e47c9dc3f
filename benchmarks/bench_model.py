"""Mpx/s of the shipped model in every backend at one tile, with its parity beside it.

python benchmarks/bench_model.py [--tile 1776] [--rounds 7]
"""

from __future__ import annotations

import argparse

import numpy as np
from conditions import interleaved_seconds, median, save
from rich.console import Console
from rich.table import Table

from cellseg_batch.engine.backends.choose import available_precisions, make_backend
from cellseg_batch.engine.backends.parity import gate_tiles, measure_parity
from cellseg_batch.engine.machine import cores
from cellseg_batch.engine.models import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tile", type=int, default=1776, help="side in px")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    bundle, threads = load_model("nuclei"), cores()
    names = [(name, precision) for name in ("torch", "openvino") for precision in available_precisions(name)]
    backends = {f"{name} {precision}": make_backend(bundle, name, precision, threads) for name, precision in names}
    tiles = gate_tiles(bundle)
    repeats = -(-arguments.tile // tiles.shape[-1])
    batch = np.tile(tiles[:1], (1, 1, repeats, repeats))[..., : arguments.tile, : arguments.tile].copy()
    models = {name: backend.compile(batch.shape) for name, backend in backends.items()}
    seconds = interleaved_seconds({name: lambda m=model: m(batch) for name, model in models.items()}, arguments.rounds)
    rows = []
    for name, backend in backends.items():
        parity = measure_parity(backend, backends["torch fp32"], tiles, bundle.card.threshold)
        rates = [batch.shape[-1] * batch.shape[-2] / 1e6 / one for one in seconds[name]]
        rows.append(
            {
                "backend": name,
                "tile": arguments.tile,
                "threads": threads,
                "mpx_per_s": median(rates),
                "mpx_per_s_min": min(rates),
                "mpx_per_s_max": max(rates),
                "flipped": parity.flipped,
                "max_dp": parity.max_dp,
            }
        )
    table = Table("backend", "Mpx/s (median)", "min - max", "flipped pixels", "max |dp|")
    for row in rows:
        span = f"{row['mpx_per_s_min']:.2f} - {row['mpx_per_s_max']:.2f}"
        table.add_row(row["backend"], f"{row['mpx_per_s']:.2f}", span, f"{row['flipped']:.1e}", f"{row['max_dp']:.1e}")
    Console().print(table, str(save("model", rows)))


if __name__ == "__main__":
    main()
