"""Write the figures of a measurement together with its conditions to one JSON file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from cellseg_batch.engine.inference.backends.registry import packages
from cellseg_batch.engine.machine import cores, package_version, processor

_PACKAGES = ("cellseg-batch", "numpy", "numba", "zarr", "dask")


def conditions() -> dict[str, Any]:
    """Hardware, load, versions, date, and the commit if the source is a clone."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "processor": processor(),
        "cores": cores(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in (*_PACKAGES, *packages())},
        "commit": _git("rev-parse", "--short", "HEAD"),
        "changed_files": len(_git("status", "--porcelain").splitlines()),
    }


def save(path: Path, rows: list[dict[str, Any]], **about: Any) -> Path:
    """Write ``rows``, the present conditions and the entries of ``about`` to ``path``; returns the path."""
    path.write_text(json.dumps({"conditions": conditions(), **about, "rows": rows}, indent=2) + "\n")
    return path


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:  # no git on this machine
        return ""
    return done.stdout.strip()
