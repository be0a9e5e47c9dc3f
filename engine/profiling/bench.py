"""Run the suite of ``cellseg-batch bench``: a few measurements, in turns, on slides that are the same everywhere."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from cellseg_batch.engine.inference.model_pool import ModelPool
from cellseg_batch.engine.models import load_model
from cellseg_batch.engine.profiling.bench_slides import Form, shipped_pieces, write_plate, write_slide
from cellseg_batch.engine.profiling.isolated_stages import measure_alone, memory_bandwidth, opened_alone
from cellseg_batch.engine.profiling.sample import take_sample
from cellseg_batch.engine.run.campaign import Observer, run
from cellseg_batch.engine.settings import Settings

_FIELDS = 16
_MATRIX = 1024
_PRODUCTS = 16


def run_suite(settings: Settings, rounds: int, side: int, folder: Path, observer: Observer) -> dict[str, Any]:
    """Measure end to end and stage by stage.

    Args:
        settings: settings of the runs, such as model and backend.
        rounds: number of rounds of every measurement, after a first round that does not count.
        side: side of the slide in px.
        folder: folder for slides and labels.
        observer: observer of the runs.

    Returns:
        ``backend`` and ``precision`` of the runs; ``rows``, each with a name, the Mpx/s of each round and their median;
        and ``yardstick``, the speed of the machine in each round, measured by work unrelated to segmentation.
    """
    pieces = shipped_pieces()
    inputs = {
        f"{side} px slide, end to end": write_slide(folder / "slide.zarr", Form(side), pieces),
        f"plate of {_FIELDS} fields, end to end": write_plate(folder / "plate.zarr", _FIELDS, pieces),
    }
    settings = replace(settings, downscale=1, skip_background="off", overwrite=True, output=folder / "out")
    bundle = load_model(settings.model)
    (slide,) = take_sample(folder / "slide.zarr", settings, bundle.card.input.pixel_size_um)
    model_pool = ModelPool(bundle, settings, observer.racing)
    rates: dict[str, list[float]] = defaultdict(list)
    yardstick = []
    with opened_alone(slide, settings, model_pool, folder / "alone") as opened:
        for round_number in range(rounds + 1):
            measured = {name: run([path], settings, observer).mpx_per_s for name, path in inputs.items()}
            alone = measure_alone(opened, list(opened.plan.grid), first=0.0)
            measured |= {f"{stage}, alone": opened.plan.pixels / 1e6 / spent for stage, spent in alone.seconds.items()}
            speed = machine_speed()
            if round_number:  # the first round warms up
                yardstick.append(speed)
                for name, rate in measured.items():
                    rates[name].append(rate)
    return {
        "backend": model_pool.choice.backend,
        "precision": model_pool.choice.precision,
        "yardstick": yardstick,
        "rows": [{"name": name, "mpx_per_s": median(values), "rounds": values} for name, values in rates.items()],
    }


def machine_speed() -> float:
    """Measure the present speed of the machine: rounds per second of a fixed set of matrix products and copies."""
    matrix = np.ones((_MATRIX, _MATRIX), np.float32)
    start = time.perf_counter()
    for _ in range(_PRODUCTS):
        matrix @ matrix
    products = time.perf_counter() - start
    return 1 / (products + 1e9 / memory_bandwidth())
