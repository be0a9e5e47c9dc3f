"""Measure a run's time divided by that of its model alone on as many tiles, in turns; used by bench_pipeline.

python benchmarks/overhead.py SLIDE FOLDER PRECISION ROUNDS     prints rows as JSON
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median

from common import engine_flags, row, segment
from rich.console import Console

from cellseg_batch.engine.cli.progress import RunProgress
from cellseg_batch.engine.inference.model_pool import ModelPool
from cellseg_batch.engine.models import load_model
from cellseg_batch.engine.profiling.isolated_stages import measure_alone, opened_alone
from cellseg_batch.engine.profiling.sample import take_sample
from cellseg_batch.engine.run.campaign import run
from cellseg_batch.engine.settings import Settings


def main() -> None:
    slide, folder, precision, rounds = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    settings = Settings(
        output=folder / "out",
        backend="openvino",
        precision=precision,
        gate=False,
        downscale=1,
        skip_background="off",
        overwrite=True,
    )
    bundle = load_model(settings.model)
    observer = RunProgress(Console(), verbosity=-1)
    model_pool = ModelPool(bundle, settings)
    (part,) = take_sample(slide, settings, bundle.card.input.pixel_size_um)
    walls, commands, models = [], [], []
    with opened_alone(part, settings, model_pool, folder / "alone") as opened:
        plan = opened.plan
        for turn in range(rounds + 1):
            wall = run([slide], settings, observer).seconds
            command = segment(slide, folder / "command", *engine_flags(precision))["seconds"]
            model = measure_alone(opened, list(plan.grid), first=0.0).seconds["model"]
            if turn:
                walls.append(wall)
                commands.append(command)
                models.append(model)
    tile = plan.grid.lattice.tile
    computed = plan.tiles * tile[0] * tile[1] / 1e6
    megapixels = plan.pixels / 1e6
    about = {"model_seconds": median(models), "computed_per_px": plan.grid.lattice.cost}
    for name, times in (("run", walls), ("command, with its imports", commands)):
        over = median(time / model for time, model in zip(times, models, strict=True))
        print(json.dumps(row(name, [megapixels / seconds for seconds in times], over_model_alone=over, **about)))
    print(json.dumps(row("model alone, per px computed", [computed / seconds for seconds in models])))


if __name__ == "__main__":
    main()
