"""The conditions of a measurement, kept with its figures."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from cellseg_batch.engine.machine import package_version, processor

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("cellseg-batch", "torch", "openvino", "numpy", "numba", "zarr", "dask")


def conditions() -> dict[str, Any]:
    """Hardware, versions, commit, load and date."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in _PACKAGES},
        "commit": _git("rev-parse", "--short", "HEAD"),
        "changed_files": len(_git("status", "--porcelain").splitlines()),
    }


def save(name: str, rows: list[dict[str, Any]]) -> Path:
    """Write a result with its conditions to ``results/<name>.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"conditions": conditions(), "rows": rows}, indent=2) + "\n")
    return path


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()
