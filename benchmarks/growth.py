"""Measure the growth of a run's memory from block to block; used by bench_pipeline.

python benchmarks/growth.py SLIDE FOLDER PRECISION     prints a row as JSON; the slide has to give 1,000 blocks or more
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from common import row

from cellseg_batch.engine.machine import peak_resident_bytes, resident_bytes
from cellseg_batch.engine.run.campaign import Unheard, run
from cellseg_batch.engine.run.results import EndedTask
from cellseg_batch.engine.settings import Settings

# 1,024 blocks of one tile each on a slide of 32768 px.
_TILE, _BLOCK = 1152, 1


class Watch(Unheard):
    """Observer that notes the resident memory in bytes after every block."""

    def __init__(self) -> None:
        self.bytes: list[int] = []

    def advanced(self, task: EndedTask) -> None:
        self.bytes.append(resident_bytes())


def main() -> None:
    slide, folder, precision = sys.argv[1:]
    settings = Settings(
        output=Path(folder) / "growth",
        backend="openvino",
        precision=precision,
        gate=False,
        downscale=1,
        skip_background="off",
        overwrite=True,
        tile=_TILE,
        block=_BLOCK,
    )
    watch = Watch()
    report = run([Path(slide)], settings, watch)
    steady = np.array(watch.bytes[len(watch.bytes) // 10 :])
    slope = float(np.polyfit(np.arange(len(steady)), steady, 1)[0])
    name = f"{len(watch.bytes)} blocks of one tile"
    peak = peak_resident_bytes() / 1e6
    figures = {"peak_mb": peak, "bytes_per_block": slope, "torch_imported": "torch" in sys.modules}
    print(json.dumps(row(name, [report.mpx_per_s], **figures)))


if __name__ == "__main__":
    main()
