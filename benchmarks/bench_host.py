"""Measure the host's ceiling: Mpx/s of runs from zarr to zarr on a GPU that takes no time.

    python benchmarks/bench_host.py [--side 8192] [--fields 200] [--rounds 5] [--workers 2]

The network, cutting and stitching cost nothing; what remains is reading, decoding, copying, queueing, encoding, writing
and the journal.  A GPU that computes more than the number of cores times the rate per core waits for the host.  Slide
and plate take turns; every run is a process of its own, whose first run does not count.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from common import finish, row, save, work_folder
from numpy.typing import NDArray
from rich.console import Console

from cellseg_batch.engine.cli.progress import RunProgress
from cellseg_batch.engine.inference import gpu_probe
from cellseg_batch.engine.inference.backends import cuda, torch_cuda
from cellseg_batch.engine.inference.backends.protocol import BackendRequest, Shape
from cellseg_batch.engine.machine import cores
from cellseg_batch.engine.profiling.bench_slides import PATTERN, Form, shipped_pieces, write_plate, write_slide
from cellseg_batch.engine.run.campaign import run
from cellseg_batch.engine.settings import Settings
from cellseg_batch.kernels import gather_triton, stitch_triton
from cellseg_batch.trainer.bundle import Bundle


class NullModel:
    """A compiled network that does nothing; nothing reads its logits."""

    def __init__(self, shape: Shape) -> None:
        self.pixels = torch.empty(shape[0], 1, 1, 1)
        self.logits = torch.empty(shape[0], 1, 1, 1)

    def enqueue(self) -> None:
        """Do nothing."""


class NullBackend:
    """A backend whose networks do nothing."""

    name, precision, version = "torch-cuda", "fp16", "none"

    def __init__(self, bundle: Bundle, request: BackendRequest) -> None: ...

    def compile(self, shape: Shape) -> NullModel:
        """Return a network that does nothing."""
        return NullModel(shape)


def install_null_gpu() -> None:
    """Put a GPU that takes no time in the place of real ones; its masks show real nuclei, as encoding depends on it."""
    mask = torch.from_numpy(_mask_of_nuclei())

    def stitch_mask(logits: torch.Tensor, places: NDArray[np.int64], threshold: float, out: torch.Tensor) -> Any:
        for to_y, to_x, height, width in places[:, 2:].tolist():
            out[to_y : to_y + height, to_x : to_x + width] = mask[:height, :width]
        return torch.zeros(2, dtype=torch.int64)

    real = cuda.Device
    replaced: list[tuple[Any, str, Any]] = [
        (cuda, "available", lambda: True),
        (cuda, "Device", lambda name: real("cpu")),
        (torch_cuda, "make", NullBackend),
        (gpu_probe, "why_no_kernels", lambda gpu: ""),
        (gather_triton, "gather", lambda *arguments: None),
        (stitch_triton, "stitch_mask", stitch_mask),
    ]
    for module, name, stand_in in replaced:
        setattr(module, name, stand_in)


def _mask_of_nuclei() -> NDArray[np.uint8]:
    """A mask as large as any core."""
    pictures = [picture[..., 0] for picture, _ in shipped_pieces()]
    mask = np.concatenate([picture > picture.mean() for picture in pictures], axis=1)[:, :PATTERN]
    return np.tile(mask, (PATTERN // mask.shape[0], -(-PATTERN // mask.shape[1])))[:, :PATTERN].astype(np.uint8)


def measure(image: Path, out: Path, workers: int) -> dict[str, float]:
    """Run twice in this process; the second run's Mpx, seconds and seconds of processor."""
    install_null_gpu()
    settings = Settings(
        output=out,
        backend="torch-cuda",
        gate=False,
        downscale=1,
        skip_background="off",
        workers=workers,
    )
    for _ in range(2):
        shutil.rmtree(out, ignore_errors=True)
        wall, processor = time.perf_counter(), time.process_time()
        report = run([image], settings, RunProgress(Console(), verbosity=-1))
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
    failed = [slide.reason for slide in report.slides if slide.status != "done"]
    if failed:
        raise SystemExit(failed[0])
    return {"mpx": sum(slide.pixels for slide in report.slides) / 1e6, "seconds": wall, "processor": processor}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=8192)
    parser.add_argument("--fields", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=cores())
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--measure", nargs=2, type=Path, metavar=("IMAGE", "OUT"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        print(json.dumps(measure(*chosen.measure, chosen.workers)))
        return
    with work_folder(chosen.folder) as folder:
        pieces = shipped_pieces()
        images = {
            "slide": write_slide(folder / "slide.zarr", Form(chosen.side, chunk=1024), pieces),
            f"plate of {chosen.fields} fields": write_plate(folder / "plate.zarr", chosen.fields, pieces),
        }
        figures: dict[str, list[dict[str, float]]] = {name: [] for name in images}
        for _ in range(chosen.rounds):
            for name, image in images.items():
                command = [sys.executable, __file__, "--workers", str(chosen.workers)]
                done = finish([*command, "--measure", str(image), str(folder / "out")])
                figures[name].append(json.loads(done.output.splitlines()[-1]))
    rows = [
        row(
            name,
            [run_figures["mpx"] / run_figures["seconds"] for run_figures in rounds],
            per_core=median(run_figures["mpx"] / run_figures["processor"] for run_figures in rounds),
        )
        for name, rounds in figures.items()
    ]
    save("host", rows, side=chosen.side, workers=chosen.workers)


if __name__ == "__main__":
    main()
