"""The model's rate beside that of OpenVINO's own benchmark loop, on one network and shape, taking turns.

python benchmarks/ceiling.py PRECISION TURNS SIDE     prints rows as JSON; used by bench_pipeline

The turns are short and many, as a machine that others use too has its slow seconds; what counts is the median of the
ratios of neighbours.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
from common import row

from cellseg_batch.engine.geometry import fit_lattice
from cellseg_batch.engine.inference.backends.protocol import Shape
from cellseg_batch.engine.inference.decoders import DECODERS
from cellseg_batch.engine.inference.model_pool import ModelPool
from cellseg_batch.engine.inference.normalise import Bounds
from cellseg_batch.engine.inference.session import Session
from cellseg_batch.engine.models import load_model
from cellseg_batch.engine.run.slide_plan import pick_margin
from cellseg_batch.engine.settings import TILE, Settings
from cellseg_batch.engine.storage.cache import Artefacts

_HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "bf16"}
_SECONDS = 2


def main() -> None:
    precision, turns, side = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])  # of the slide, in px
    settings = Settings(backend="openvino", precision=precision, gate=False)
    bundle = load_model(settings.model)
    margin = pick_margin(settings, bundle.card)
    lattice = fit_lattice((side, side), TILE, margin, bundle.card.total_stride)
    shape = (1, 3, *lattice.tile)
    model_pool = ModelPool(bundle, settings)
    network = DECODERS[bundle.card.decoder].network(bundle, instances=False)
    ours, theirs = [], []
    pixels = np.random.default_rng(0).integers(0, 256, shape[1:], np.uint8)
    rows, columns = (np.arange(length)[None] for length in lattice.tile)
    with model_pool.session(model_pool.chosen, shape, "uint8") as session:
        session.fill(pixels, rows, columns, Bounds((0.0,), (255.0,)))
        for _ in range(turns):
            ours.append(_loop(session))
            theirs.append(_benchmark_app(network.sha256, precision, shape))
    share = median(our_rate / their_rate for our_rate, their_rate in zip(ours, theirs, strict=True))
    print(json.dumps(row("the engine's session", ours, of_benchmark_app=share)))
    print(json.dumps(row("OpenVINO's benchmark_app, latency hint", theirs)))


def _loop(session: Session) -> float:
    """Rate in Mpx/s of computing the same batch again and again."""
    session.logits()
    count, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < _SECONDS:
        session.logits()
        count += 1
    return count * math.prod(session.network.shape[::2]) * session.network.shape[3] / 1e6 / seconds


def _benchmark_app(sha256: str, precision: str, shape: Shape) -> float:
    """Rate in Mpx/s of OpenVINO's own loop over the cached network, request by request, on every core."""
    networks = [
        entry.folder
        for entry in Artefacts().entries()
        if entry.key.get("what") == "openvino network"
        and entry.key["sha256"] == sha256
        and bool(entry.key["quantised"]) == (precision == "int8")
    ]
    newest: Path = max(networks, key=lambda folder: folder.stat().st_mtime)
    loop = "from openvino.tools.benchmark.main import main; main()"
    command = [sys.executable, "-c", loop, "-m", str(newest / "model.xml"), "-d", "CPU"]
    command += ["-shape", str(list(shape)).replace(" ", ""), "-infer_precision", _HINTS[precision]]
    command += ["-hint", "latency", "-api", "sync", "-t", str(_SECONDS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    throughput = re.search(r"Throughput:\s+([\d.]+) FPS", done.stdout)
    assert throughput is not None, done.stdout
    return float(throughput[1]) * shape[0] * shape[2] * shape[3] / 1e6


if __name__ == "__main__":
    main()
