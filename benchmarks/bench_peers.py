"""The same weights and slide through MONAI, through dask's map_overlap and through ours, taking turns.

python benchmarks/bench_peers.py [--data FOLDER] [--side 8192] [--rounds 5] [--slow-rounds 1] [--quick]

Speed from opening the slide to the mask on disk, and of the whole process; flipped pixels against the untiled
float32 mask and Dice against the truth beside it.  The untiled mask is that of tiles with the network's exact margin,
which `cellseg-batch verify-seams` shows to be the same.  --data is a folder of annotated images, such as the 2018
Data Science Bowl's with an index.csv; without it the pictures of the package are used and there is no truth.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import zarr
from common import engine_flags, finish, pieces_of, row, save, segment, work_folder
from numpy.typing import NDArray

from cellseg_batch.engine.inference.backends.registry import why_not
from cellseg_batch.engine.inference.normalise import settle_bounds
from cellseg_batch.engine.models import load_model
from cellseg_batch.engine.profiling.bench_slides import Form, write_slide
from cellseg_batch.engine.slides.discover import find_images
from cellseg_batch.engine.slides.reader import SlideReader
from cellseg_batch.engine.slides.slide import Slide

# Large arrays are given back to the system and faulted in again on every call unless malloc is told otherwise.
_TUNED = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}
_PEERS = {
    "MONAI, stock": ("monai", {}),
    "MONAI, malloc tuned": ("monai", _TUNED),
    "MONAI, malloc tuned, bf16 channels-last": ("monai-bf16", _TUNED),
    "dask map_overlap, torch fp32": ("map-overlap", {}),
}
_SLOW = ("MONAI, stock", "dask map_overlap, torch fp32")
_OURS = {f"cellseg-batch, {precision}": precision for precision in ("fp32", "bf16", "int8")}
_BASE = "MONAI, malloc tuned"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of annotated images")
    parser.add_argument("--side", type=int, default=8192, help="of the slide in px")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slow-rounds", type=int, default=1, help="of stock MONAI and map_overlap")
    parser.add_argument("--quick", action="store_true", help="3 rounds")
    parser.add_argument("--folder", type=Path, help="keep slides and masks here")
    arguments = parser.parse_args()
    with work_folder(arguments.folder) as folder:
        slide = write_slide(folder / "peers.zarr", Form(arguments.side), pieces_of(arguments.data))
        rows = measure(slide, folder, 3 if arguments.quick else arguments.rounds, arguments.slow_rounds)
    save("peers", rows, side=arguments.side, data=arguments.data.name if arguments.data else "shipped pictures")


def measure(slide: Path, folder: Path, rounds: int, slow_rounds: int) -> list[dict[str, Any]]:
    """Measure every peer that is installed and every precision of ours that this machine has; returns their rows."""
    (image,) = find_images(slide, None)
    assert isinstance(image, Slide)
    with SlideReader(image, 0, (0, 1, 2)) as reader:
        bounds = settle_bounds(reader, load_model("nuclei").card.input.normalisation)
    low_high = str(bounds.low[0]), str(bounds.high[0])
    truth = zarr.open_group(str(slide), mode="r").get("labels/truth")
    untiled = ours_mask(segment(slide, folder / "untiled", *engine_flags("fp32"), "--margin", "exact", keep=True))
    peers = _PEERS if importlib.util.find_spec("monai") else {}
    if not peers:
        print("MONAI is not installed, so only map_overlap is compared; pip install monai")
        peers = {name: peer for name, peer in _PEERS.items() if peer[0] == "map-overlap"}
    lacking = {precision: why_not("openvino", precision) for precision in _OURS.values()}
    for precision in filter(lacking.get, lacking):
        print(f"without {precision}: {lacking[precision]}")
    ours = {name: precision for name, precision in _OURS.items() if not lacking[precision]}
    if lacking["bf16"]:  # MONAI's best case is native bf16
        peers = {name: peer for name, peer in peers.items() if peer[0] != "monai-bf16"}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in (*peers, *ours)}
    masks: dict[str, NDArray[np.bool_]] = {}
    for name, precision in ours.items():  # the first run of a precision compiles it
        masks[name] = ours_mask(segment(slide, folder / "ours", *engine_flags(precision), keep=True))
    for turn in range(rounds):
        for name, (peer, environment) in peers.items():
            if turn < slow_rounds or name not in _SLOW:
                out = folder / "peer.zarr"
                command = [sys.executable, str(Path(__file__).with_name("peers.py"))]
                done = finish([*command, peer, str(slide), str(out), *low_high], **environment)
                figures = json.loads(done.output.strip().splitlines()[-1])
                times[name].append({**figures, "wall": done.seconds})
                masks[name] = np.asarray(zarr.open_array(str(out), mode="r")[...]) > 0
                print(f"round {turn + 1}: {name} {figures['seconds']:.1f} s", flush=True)
        for name, precision in ours.items():
            report = segment(slide, folder / "ours", *engine_flags(precision))
            seconds = report["seconds"] - report["starting_seconds"]
            figures = {"seconds": seconds, "model_seconds": report["stages"]["model"]}
            times[name].append(figures | {key: report[key] for key in ("wall", "peak_mb")})
            print(f"round {turn + 1}: {name} {seconds:.1f} s", flush=True)
    megapixels = untiled.size / 1e6
    base = median(turn["seconds"] for turn in times.get(_BASE) or times["cellseg-batch, fp32"])
    return [
        row(
            name,
            [megapixels / turn["seconds"] for turn in turns],
            seconds=median(turn["seconds"] for turn in turns),
            model_seconds=median(turn["model_seconds"] for turn in turns),
            wall_seconds=median(turn["wall"] for turn in turns),
            peak_mb=max(turn["peak_mb"] for turn in turns),
            faster_than_monai_tuned=base / median(turn["seconds"] for turn in turns) if _BASE in times else None,
            flipped=float(np.mean(masks[name] != untiled)),
            dice=dice(masks[name], truth) if truth is not None else None,
        )
        for name, turns in times.items()
        if turns
    ]


def ours_mask(report: dict[str, Any]) -> NDArray[np.bool_]:
    """Read the mask that a run has written."""
    return np.asarray(zarr.open_array(f"{report['slides'][0]['labels']}/0", mode="r")[...]) > 0


def dice(mask: NDArray[np.bool_], truth: Any) -> float:
    """Dice score: twice the overlap divided by the sum of both areas."""
    true = np.asarray(truth[...]) > 0
    return float(2 * np.count_nonzero(mask & true) / (np.count_nonzero(mask) + np.count_nonzero(true)))


if __name__ == "__main__":
    main()
