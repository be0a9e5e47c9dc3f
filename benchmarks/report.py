"""Write README.md and the chart of the peers from results/*.json; run it after any benchmark.

python benchmarks/report.py
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from common import RESULTS
from matplotlib.figure import Figure

_README = Path(__file__).with_name("README.md")
_CHART = "peers.png"
_INTRODUCTION = """# Benchmarks

Written by `python benchmarks/report.py` from `results/*.json`; nothing here was typed. Each file holds its conditions,
the rate of every round and the median that is shown; what is compared took turns, on slides composed of real pictures
(`cellseg_batch.engine.profiling.bench_slides`). Trials are in [NOTES.md](NOTES.md), decisions in
[DESIGN.md](../engine/DESIGN.md). Results up to commit 015d2de are of the former model (3.9 M parameters), later
ones of the present one (1.0 M), which is about 2.8 times as fast.

| script | what it measures |
|---|---|
| `bench_peers.py` | the same weights and slide through MONAI, dask's `map_overlap` and ours; flipped pixels, Dice |
| `bench_pipeline.py PART...` | a run, one factor at a time; `--help` lists the parts |
| `bench_model.py` | every backend at one tile |
| `bench_stitch.py` | the steps around the network |
| `compare_versions.py PART` | two installed versions: are labels and tables bit-identical, and which is faster |
| `bench_scheduler.py PART...` | no-op blocks through every pool; worker processes against one and against threads |
| `bench_limits.py` | what 1,000 workers and a million blocks would saturate first |
| `bench_instances.py PART...` | objects against the truth, the same however a slide is cut, and what they cost |
| `bench_onnx.py` | ONNX files through ONNX Runtime in a loop of numpy tiles, and imported through ours |
| `first_label.py` | seconds from the first `run` on a machine to the first label |
| `hover_postprocessing.py` | instances of HoVer-Net's maps, beside MONAI's post-processing |
| `bench_host.py` | what the host could feed a GPU that takes no time |
| `gpu.sh [--only PART...]` | a GPU: parity and tests, then networks, whole runs, MONAI, kernels |
| `cellseg-batch bench` | a small set in under a minute; `cellseg-batch bench compare A B` finds regressions |
"""
_HIDDEN = ("name", "rounds", "part", "reason")
# Shown first, in this order; what else there is follows.
_ORDER = ("peers", "overhead", "overhead_int8", "ceiling", "ceiling_int8", "plate", "background", "memory")


def main() -> None:
    results = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    results |= {path.parent.name: gpu_results(path.read_text()) for path in RESULTS.glob("*/rows.jsonl")}
    shown = {name: content for name, content in results.items() if _has_names(content)}
    names = [*(name for name in _ORDER if name in shown), *sorted(set(shown) - set(_ORDER))]
    parts = [_INTRODUCTION]
    for name in names:
        parts.append(_section(name, shown[name]))
        if name == "peers":
            _draw(shown[name]["rows"])
            parts.append(f"![Mpx/s of each engine](results/{_CHART})\n")
    _README.write_text("\n".join(parts))
    print(_README)


def gpu_results(lines: str) -> dict[str, Any]:
    """Content of a file of `bench_gpu`: the latest conditions, and the latest row of each name."""
    rows = [json.loads(line) for line in lines.splitlines()]
    conditions = [row["conditions"] for row in rows if "conditions" in row]
    return {"conditions": conditions[-1], "rows": list({row["name"]: row for row in rows if "name" in row}.values())}


def _has_names(content: dict[str, Any]) -> bool:
    return bool(content.get("rows")) and all("name" in row for row in content["rows"])


def _section(name: str, content: dict[str, Any]) -> str:
    about = {key: value for key, value in content.items() if key not in ("conditions", "rows", "yardstick", "text")}
    at = content["conditions"]
    rounds = max(len(row.get("rounds", [])) for row in content["rows"])
    conditions = [
        *(f"{key} {value}" for key, value in about.items()),
        f"medians of {rounds} rounds" if rounds > 1 else "one round",
        f"{at['processor']}, {at['cores']} cores",
        f"load {at['load']:.1f}",
        f"commit {at['commit']}",
        at["date"][:10],
    ]
    values = {key: value for row in content["rows"] for key, value in row.items()}
    columns = [key for key, value in values.items() if key not in _HIDDEN and not isinstance(value, dict | list)]
    lines = [
        f"## {name.replace('_', ' ')}\n",
        ", ".join(conditions) + ".\n",
        "| | " + " | ".join(_heading(column) for column in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for row in content["rows"]:
        lines.append(f"| {row['name']} | " + " | ".join(_cell(row.get(column)) for column in columns) + " |")
    if "text" in content:
        lines += ["", *textwrap.wrap(content["text"], 120)]
    return "\n".join(lines) + "\n"


def _heading(column: str) -> str:
    known = {
        "mpx_per_s": "Mpx/s",
        "opened_mpx_per_s": "Mpx/s once opened",
        "engine_mpx_per_s": "Mpx/s in the model",
        "peak_mb": "peak MB",
        "gb_per_s": "GB/s",
    }
    return known.get(column, column.replace("_", " "))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value >= 100 else f"{value:.1e}" if 0 < value < 0.01 else f"{value:.3g}"


def _draw(rows: list[dict[str, Any]]) -> None:
    rows = sorted(rows, key=lambda row: row["mpx_per_s"])
    figure = Figure(figsize=(8, 0.6 + 0.4 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    colours = ["#c8553d" if row["name"].startswith("cellseg-batch") else "#8a8d91" for row in rows]
    bars = axes.barh([row["name"] for row in rows], [row["mpx_per_s"] for row in rows], color=colours)
    axes.bar_label(bars, fmt="%.1f", padding=4)
    axes.set_xlabel("Mpx/s, pixels on disk to mask on disk")
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS / _CHART, dpi=110)


if __name__ == "__main__":
    main()
