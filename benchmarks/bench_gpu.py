"""Measure a GPU: its copies, our kernels, networks, whole runs, and MONAI's sliding window beside them.

    python benchmarks/bench_gpu.py [--device cuda:0] [--minutes 7] [--out FILE]

Every part is measured separately and saved at once; a part that cannot be measured, or for which no time is left, gets
the reason instead of figures. ``--tiny`` tries this script on a machine without a GPU; its figures then mean nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gpu_bench import Bench, Row
from gpu_kernels import measure_kernels
from roofline import least_seconds

from cellseg_batch.engine.backend_table import KNOWN_BACKENDS
from cellseg_batch.engine.inference.backends.cuda import Device
from cellseg_batch.engine.inference.backends.registry import make_backend, why_not
from cellseg_batch.engine.models import build_torch_network, load_model
from cellseg_batch.engine.storage.cache import Artefacts
from cellseg_batch.trainer.bundle import Bundle, Card, Normalisation
from cellseg_batch.trainer.unet import build_network

_ARCHITECTURES: dict[str, Row] = {
    "unet": {"name": "unet", "outputs": 1},
    "unet-mobilenetv2": {"name": "unet-mobilenetv2", "outputs": 1},
}
_RUN = "from cellseg_batch.engine.cli.main import main; main()"


def measure_networks(bench: Bench, backend: str) -> list[Row]:
    """Measure tiles per second of three networks in a backend, also as a share of the roofline."""
    reason = why_not(backend, "fp16")
    if reason and (bench.device.is_gpu or backend != "torch-cuda"):
        return [{"backend": backend, "missing": reason}]
    rows = []
    shapes = [(1, 3, 64, 64)] if bench.tiny else [(16, 3, 512, 512), (1, 3, 1776, 1776)]
    with tempfile.TemporaryDirectory() as folder:
        for name in ("nuclei", *_ARCHITECTURES):
            bundle = load_model("nuclei") if name == "nuclei" else random_bundle(name)
            network_backend = _on(bench, bundle, backend, Artefacts(Path(folder)))
            # Building and tuning takes minutes; one shape is enough to compare backends.
            for shape in shapes if backend == "torch-cuda" else shapes[:1]:
                start = time.perf_counter()
                model = network_backend.compile(shape)
                compiling = time.perf_counter() - start
                seconds = bench.seconds(model.enqueue)
                least = least_seconds(build_torch_network(bundle), shape, bench.flops, bench.copy)
                rows.append(
                    {
                        "backend": backend,
                        "network": name,
                        "batch": shape[0],
                        "tile": shape[2],
                        "tiles_per_s": shape[0] / seconds,
                        "mpx_per_s": shape[0] * shape[2] * shape[3] / seconds / 1e6,
                        "of_roofline": least / seconds,
                        "compile_seconds": compiling,
                    }
                )
                del model
                bench.device.settle()
    return rows


def _on(bench: Bench, bundle: Bundle, backend: str, artefacts: Artefacts) -> Any:
    if bench.device.is_gpu:
        return make_backend(bundle, backend, "fp16", 1, artefacts, str(bench.device.torch_device))
    from cellseg_batch.engine.inference.backends.torch_cuda import TorchCudaBackend

    return TorchCudaBackend(bundle, bench.device, compiled=False)


def random_bundle(name: str) -> Bundle:
    """Make a network of another architecture with random weights, which take as long as any."""
    torch.manual_seed(0)
    network = build_network(_ARCHITECTURES[name])
    weights = {key: value.numpy() for key, value in network.state_dict().items()}
    card = Card(name, _ARCHITECTURES[name], 3, ("foreground",), "mask", 32, 128, 64, 0.5, 0.5, Normalisation())
    return Bundle(card, weights)


def input_in(folder: Path, name: str, side: int) -> Path:
    """Path of a slide of ``side`` px, or of a plate of small fields with as many pixels; the first call writes it."""
    from cellseg_batch.engine.profiling.bench_slides import Form, shipped_pieces, write_plate, write_slide

    path = folder / f"{name}-{side}.zarr"
    if not path.exists():
        pieces = shipped_pieces()
        if name == "plate":
            write_plate(path, max(2, side * side // 1080**2), pieces)
        else:
            write_slide(path, Form(side, chunk=min(1024, side)), pieces)
    return path


def measure_run(bench: Bench, folder: Path, name: str, backend: str, workers: int, batch: int) -> list[Row]:
    """Measure a whole run, from zarr to zarr on local disk; the second of two, so that it compiles nothing."""
    if not bench.device.is_gpu:
        return [{"backend": backend, "missing": "no GPU"}]
    report, path = folder / "report.json", input_in(folder, name, 16384)
    device = str(bench.device.torch_device)
    flags = ["--backend", backend, "--device", device, "--workers", str(workers), "--batch", str(batch), "--no-gate"]
    flags += ["--downscale", "1", "--skip-background", "off", "--overwrite", "-q"]
    command = [sys.executable, "-c", _RUN, "run", str(path), *flags, "--json", str(report)]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return [{"backend": backend, "missing": (done.stderr or done.stdout).strip()[-300:]}]
    figures = json.loads(report.read_text())
    return [
        {
            "backend": backend,
            "input": name,
            "workers": workers,
            "batch": batch,
            "tile": figures["tile"],
            "mpx_per_s": figures["mpx_per_s"],
            "seconds": figures["seconds"],
            "gpu_busy": figures["stages"]["model"] / figures["seconds"],
            "stages": figures["stages"],
        }
    ]


def measure_monai(bench: Bench, folder: Path) -> list[Row]:
    """Measure MONAI's sliding window with the same weights in float16, slide and GPU, from zarr to zarr."""
    import zarr
    from monai.inferers import sliding_window_inference

    bundle = load_model("nuclei")
    network = build_torch_network(bundle).to(bench.device.torch_device).to(memory_format=torch.channels_last)
    network = network.half() if bench.device.is_gpu else network
    tile, at_once = (64, 2) if bench.tiny else (512, 16)
    source = zarr.open_array(str(input_in(folder, "slide", 128 if bench.tiny else 8192)), path="0", mode="r")
    target = zarr.create_array(str(folder / "monai.zarr"), shape=source.shape[1:], chunks=source.chunks[1:], dtype="u1")
    kind = next(network.parameters()).dtype

    def foreground(tiles: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = network(tiles)[:, :1]
        return logits

    seconds = 0.0
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        pixels = torch.from_numpy(source[...]).to(bench.device.torch_device)[None].to(kind) / 255
        with torch.inference_mode():
            logits = sliding_window_inference(pixels, (tile, tile), at_once, foreground, 0.25, "gaussian")
        target[...] = (logits[0, 0] > 0).to(torch.uint8).cpu().numpy()
        seconds = time.perf_counter() - start
    return [{"what": "MONAI sliding window, float16", "mpx_per_s": target.size / seconds / 1e6, "seconds": seconds}]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--minutes", type=float, default=7)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    chosen = parser.parse_args(arguments)
    device = Device(chosen.device)
    if chosen.out is None and not device.is_gpu:
        parser.error("without a GPU there are no figures to keep: name a file with --out")
    out = chosen.out or Path(__file__).parent / "results" / f"{'-'.join(device.model.lower().split())}.json"
    bench = Bench(device, chosen.tiny, chosen.minutes, out)
    bench.part("ceilings", bench.measure_ceilings)
    bench.part("kernels", lambda: measure_kernels(bench))
    bench.part("networks", lambda: measure_networks(bench, "torch-cuda"))
    other_backends = [name for name, entry in KNOWN_BACKENDS.items() if entry.on_gpu and name != "torch-cuda"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench.part("run", lambda: measure_run(bench, folder, "slide", "torch-cuda", 4, 1))
        bench.part("run", lambda: measure_run(bench, folder, "slide", "torch-cuda", 12, 1))
        bench.part("run", lambda: measure_run(bench, folder, "plate", "torch-cuda", 12, 4))
        bench.part("monai", lambda: measure_monai(bench, folder))
        for backend in other_backends:
            bench.part("networks", lambda backend=backend: measure_networks(bench, backend))
            bench.part("run", lambda backend=backend: measure_run(bench, folder, "slide", backend, 12, 1))
    print(out)


if __name__ == "__main__":
    main()
