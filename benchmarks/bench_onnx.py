"""ONNX files through ONNX Runtime in a loop of numpy tiles, and imported through ours, taking turns.

python benchmarks/bench_onnx.py [--data FOLDER] [--side 8192] [--rounds 3]

Two networks: `nuclei` as `export` writes it, and, where MONAI is installed, its BasicUNet at the usual width with
weights that nobody trained.  Speed from opening the slide to the mask on disk, and flipped pixels between both masks.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from common import COMMAND, engine_flags, finish, pieces_of, row, save, segment, work_folder

from cellseg_batch.engine.inference.normalise import settle_bounds
from cellseg_batch.engine.models import load_model
from cellseg_batch.engine.profiling.bench_slides import Form, write_slide
from cellseg_batch.engine.slides.discover import find_images
from cellseg_batch.engine.slides.reader import SlideReader
from cellseg_batch.engine.slides.slide import Slide

_CARD = """
[input]
channels = ["rgb"]
normalisation = {kind = "percentile", low = 0.1, high = 99.9}
[output]
decoder = "mask"
margin = 64
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of annotated images")
    parser.add_argument("--side", type=int, default=8192, help="of the slide in px")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep slides and masks here")
    arguments = parser.parse_args()
    rows = []
    with work_folder(arguments.folder) as folder:
        slide = write_slide(folder / "onnx.zarr", Form(arguments.side), pieces_of(arguments.data))
        for name, file in write_networks(folder).items():
            rows += measure(name, file, slide, folder, arguments.rounds)
    save("onnx", rows, side=arguments.side, data=arguments.data.name if arguments.data else "shipped pictures")


def write_networks(folder: Path) -> dict[str, Path]:
    """Write the files, and import each beside it, as ``<file's name>.bundle``."""
    nuclei, unet = folder / "nuclei.onnx", folder / "unet.onnx"
    finish([*COMMAND, "export", "nuclei", "--format", "onnx", "--out", str(nuclei)])
    finish([*COMMAND, "import-model", str(nuclei), "--out", f"{nuclei}.bundle"])
    if importlib.util.find_spec("monai") is None:
        print("MONAI is not installed, so only nuclei is measured; pip install monai")
        return {"nuclei": nuclei}
    from monai.networks.nets import BasicUNet

    torch.manual_seed(0)
    network = BasicUNet(2, 3, 1, norm="batch").eval()
    with torch.no_grad():
        network.final_conv.bias -= network(torch.rand(1, 3, 128, 128)).median()
    axes = {name: {0: "n", 2: "h", 3: "w"} for name in ("x", "y")}
    example = (torch.rand(1, 3, 128, 128),)
    torch.onnx.export(
        network, example, str(unet), dynamo=False, input_names=["x"], output_names=["y"], dynamic_axes=axes
    )
    (folder / "card.toml").write_text(_CARD)
    finish([*COMMAND, "import-model", str(unet), "--out", f"{unet}.bundle", "--card", str(folder / "card.toml")])
    return {"nuclei": nuclei, "MONAI BasicUNet": unet}


def measure(name: str, file: Path, slide: Path, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Rows of the loop and of each of our precisions for one network."""
    bundle = f"{file}.bundle"
    (image,) = find_images(slide, None)
    assert isinstance(image, Slide)
    with SlideReader(image, 0, (0, 1, 2)) as reader:
        bounds = settle_bounds(reader, load_model(bundle).card.input.normalisation)
    loop = [sys.executable, str(Path(__file__).with_name("onnx_loop.py")), str(file), str(slide)]
    loop += [str(folder / "loop.zarr"), str(bounds.low[0]), str(bounds.high[0])]
    ours = {precision: ["--model", bundle, *engine_flags(precision)] for precision in ("fp32", "bf16")}
    masks, seconds = {}, {key: [] for key in ("ONNX Runtime in a loop", *ours)}
    for precision, flags in ours.items():  # the first run of a precision compiles it
        report = segment(slide, folder / "ours", *flags, keep=True)
        masks[precision] = zarr.open_array(f"{report['slides'][0]['labels']}/0", mode="r")[...] > 0
    for turn in range(rounds):
        seconds["ONNX Runtime in a loop"].append(json.loads(finish(loop).output.splitlines()[-1])["seconds"])
        for precision, flags in ours.items():
            report = segment(slide, folder / "ours", *flags)
            seconds[precision].append(report["seconds"] - report["starting_seconds"])
        print(f"round {turn + 1}: {name} " + ", ".join(f"{key} {times[-1]:.1f} s" for key, times in seconds.items()))
    mask = zarr.open_array(str(folder / "loop.zarr"), mode="r")[...] > 0
    base = float(np.median(seconds["ONNX Runtime in a loop"]))
    return [
        row(
            f"{name}, {key if key not in ours else f'cellseg-batch, {key}'}",
            [mask.size / 1e6 / turn for turn in times],
            seconds=float(np.median(times)),
            faster_than_the_loop=base / float(np.median(times)),
            flipped=float(np.mean(masks[key] != mask)) if key in masks else 0.0,
        )
        for key, times in seconds.items()
    ]


if __name__ == "__main__":
    main()
