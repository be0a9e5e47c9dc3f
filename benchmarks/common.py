"""Share what the benchmarks need: processes with their wall time, runs of the command line, results as files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.profiling.bench_conditions import save as save_rows
from cellseg_batch.engine.profiling.bench_slides import Pieces, shipped_pieces
from cellseg_batch.trainer.data.dataset import list_entries

RESULTS = Path(__file__).parent / "results"
COMMAND = [sys.executable, "-m", "cellseg_batch.engine.cli"]


@dataclass(frozen=True)
class Finished:
    """Wall time in seconds and output of a process that has ended."""

    seconds: float
    output: str


def finish(command: list[str], **environment: str) -> Finished:
    """Run a process to its end, with ``environment`` added to ours; a failure ends the benchmark."""
    start = time.perf_counter()
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout[-2000:]}")
    return Finished(time.perf_counter() - start, done.stdout)


def segment(slide: Path, out: Path, *flags: str, keep: bool = False, downscale: bool = False) -> dict[str, Any]:
    """Run ``cellseg-batch run`` in a process of its own; its JSON report, with ``wall`` and ``peak_mb`` of the process.

    ``keep`` leaves the labels in ``out``; the background is computed, and unless ``downscale`` every slide as it is.
    """
    shutil.rmtree(out, ignore_errors=True)
    report = out.with_suffix(".json")
    usual = ["--output", str(out), "--json", str(report), "--quiet", "--skip-background", "off"]
    usual += [] if downscale else ["--downscale", "1"]
    done = finish([*COMMAND, "run", str(slide), *usual, *flags])
    if not keep:
        shutil.rmtree(out)
    content = json.loads(report.read_text())
    return {**content, "wall": done.seconds, "peak_mb": content["peak_rss_bytes"] / 1e6}


def engine_flags(precision: str) -> list[str]:
    """Flags that choose a backend by name, without the race and the gate, to measure its speed and its differences."""
    return ["--backend", "openvino", "--precision", precision, "--no-gate"]


def row(name: str, rates: list[float], **figures: Any) -> dict[str, Any]:
    """Make a row of a result: the rate in Mpx/s of each round, their median, and other figures."""
    return {"name": name, "mpx_per_s": median(rates), "rounds": rates, **figures}


def save(name: str, rows: list[dict[str, Any]], **about: Any) -> None:
    """Print the rows and write them to ``results/<name>.json``."""
    for figures in rows:
        print("  ".join(f"{key} {_brief(value)}" for key, value in figures.items() if key != "rounds"))
    RESULTS.mkdir(exist_ok=True)
    print(save_rows(RESULTS / f"{name}.json", rows, **about))


def _brief(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextmanager
def work_folder(chosen: Path | None) -> Iterator[Path]:
    """Provide a folder for slides and labels: ``chosen``, which stays, or a temporary folder."""
    if chosen is not None:
        chosen.mkdir(parents=True, exist_ok=True)
        yield chosen
        return
    with tempfile.TemporaryDirectory(prefix="cellseg-bench-") as folder:
        yield Path(folder)


def pieces_of(data: Path | None, kind: str = "fluo_small") -> Pieces:
    """Read held-out pictures of the kinds that begin with ``kind``, with their truth, from an annotated folder.

    All are cut to the size of the smallest. Without a folder, the pictures of the package are used.
    """
    if data is None:
        return shipped_pieces()
    entries = [entry for entry in list_entries(data) if entry.split == "val" and entry.kind.startswith(kind)]
    if not entries:
        raise SystemExit(f"{data}: no held-out picture of a kind that begins with {kind}")
    annotations = [entry.read() for entry in entries]
    pairs = [(annotation.image, annotation.labels) for annotation in annotations]
    side = min(min(labels.shape) for _, labels in pairs)
    return [(_rgb(picture)[:side, :side], labels[:side, :side]) for picture, labels in pairs]


def _rgb(picture: NDArray[Any]) -> NDArray[Any]:
    return picture[..., :3] if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=2)
