"""Seconds from `cellseg-batch run` to the first label of the demo on disk, with an empty cache.

python benchmarks/first_label.py [--rounds 5]

The cache and the store are new in each round; installing and the demo's own writing are not counted.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import time
from statistics import median

from common import COMMAND, finish, save, work_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    seconds = [first_label() for _ in range(rounds)]
    print(", ".join(f"{turn:.1f} s" for turn in seconds))
    save("first_label", [{"name": "first label of the demo", "seconds": median(seconds), "rounds": seconds}])


def first_label() -> float:
    """Seconds until the first chunk of labels lies on disk."""
    with work_folder(None) as folder:
        store = folder / "slides.zarr"
        finish([*COMMAND, "demo", str(store)])
        environment = {**os.environ, "CELLSEG_CACHE_DIR": str(folder / "cache")}
        start = time.perf_counter()
        run = subprocess.Popen([*COMMAND, "run", str(store), "--quiet"], env=environment)
        while not any(store.glob("*/labels/cellseg/0/c/**/[0-9]*")):
            if run.poll() is not None:
                raise SystemExit(f"the run ended with exit {run.returncode} before its first label")
            time.sleep(0.01)
        seconds = time.perf_counter() - start
        run.wait()
        return seconds


if __name__ == "__main__":
    main()
