"""Prove and measure a GPU, in at most eight minutes: parity, tests, networks, whole runs, MONAI beside them, kernels.

    python benchmarks/bench_gpu.py [--out DIR] [--only PART...] [--device cuda:0] [--seconds 470]

Each part is a process with a limit.  A row is in ``DIR/rows.jsonl`` the moment it exists, so a run that is cut keeps
its rows, and a later run with ``--only`` adds to them.  ``cellseg-batch doctor`` shows how each part ended.  The exit
code is 1 if a part failed or had no time left.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_bench import Bench, Row
from gpu_kernels import check_kernels, measure_kernels
from gpu_parts import FAILED, Part, Rows, choose, run_parts
from repeated_slide import write_repeated_slide
from rich.console import Console
from roofline import least_seconds

from cellseg_batch.engine.cli.progress import RunProgress
from cellseg_batch.engine.inference.backends import torch_cuda
from cellseg_batch.engine.inference.backends.cuda import Device
from cellseg_batch.engine.inference.backends.registry import make_backend
from cellseg_batch.engine.machine import cores, gpus
from cellseg_batch.engine.models import build_torch_network, load_model
from cellseg_batch.engine.profiling.bench_conditions import conditions
from cellseg_batch.engine.profiling.bench_slides import PATTERN, shipped_pieces, write_plate
from cellseg_batch.engine.reports.gpu_proof import ProvenPart, keep_proof, today
from cellseg_batch.engine.run.campaign import run
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.storage.cache import Artefacts
from cellseg_batch.trainer.bundle import Bundle
from cellseg_batch.trainer.card import Card, Input, Normalisation, Size, plain_output
from cellseg_batch.trainer.unet import build_network

_HERE = Path(__file__).parent
_ARCHITECTURES: dict[str, Row] = {
    "unet": {"name": "unet", "outputs": 1},
    "unet-mobilenetv2": {"name": "unet-mobilenetv2", "outputs": 1},
}
# A slide of 32768 px lasts seconds on the fastest GPUs; plates are slower, and MONAI holds its slide on the GPU.
_SLIDE, _MONAI_SLIDE, _FIELDS = 32768, 16384, 200
_MOST_WORKERS = 12
_SECONDS = 470
_TENSORRT = dict.fromkeys(("tensorrt", "torch_tensorrt"), "pip install 'cellseg-batch[tensorrt]'")


def parts_for(device: str, out: Path) -> list[Part]:
    """All parts, what matters most first; their limits add up to at most `_SECONDS`."""

    def measured(name: str, seconds: float, **needs: str) -> Part:
        command = (sys.executable, __file__, "--measure", name, "--device", device, "--out", str(out))
        return Part(name, seconds, command, needs)

    def tested(name: str, seconds: float, tests: str, *arguments: str, **needs: str) -> Part:
        # Libraries that the project was not tested with may warn.
        pytest = (sys.executable, "-m", "pytest", "-v", "-n", "0", "-o", "filterwarnings=default")
        path = _HERE.parent / "tests" / "engine" / "inference" / tests
        return Part(name, seconds, (*pytest, str(path), *arguments), {"pytest": "pip install pytest"} | needs)

    return [
        measured("parity", 25),
        tested("tests", 60, "test_gpu.py", "-m", "gpu", "-k", "not torch-compile"),
        measured("networks", 40),
        measured("slide", 60),
        measured("host", 25),
        measured("monai", 35, monai="pip install monai"),
        measured("plate", 30),
        measured("kernels", 30),
        tested("compile-tests", 50, "test_gpu.py", "-m", "gpu", "-k", "torch-compile"),
        measured("compile", 30),
        tested("tensorrt-tests", 50, "backends/test_tensorrt.py", "-m", "tensorrt", **_TENSORRT),
        measured("tensorrt", 35, **_TENSORRT),
    ]


def measure(name: str, bench: Bench, device: str, folder: Path) -> Iterator[Row]:
    """Measure a part and yield its rows; ``folder`` holds slides and what is made of them."""
    measures: dict[str, Callable[[], Iterator[Row]]] = {
        "parity": lambda: check_kernels(bench),
        "networks": lambda: measure_networks(bench, "torch-cuda"),
        "compile": lambda: measure_networks(bench, "torch-compile"),
        "tensorrt": lambda: measure_networks(bench, "tensorrt"),
        "slide": lambda: measure_slide(device, folder),
        "host": lambda: measure_host(folder),
        "plate": lambda: measure_plate(device, folder),
        "monai": lambda: measure_monai(bench, folder),
        "kernels": lambda: measure_kernels(bench),
    }
    return measures[name]()


def measure_networks(bench: Bench, backend: str) -> Iterator[Row]:
    """Measure three networks in a backend on random pixels, also as a share of the roofline."""
    yield {
        "name": "copy; matrix product in float16",
        "gb_per_s": bench.copy / 1e9,
        "tflops": bench.flops / 1e12,
    }
    eager = backend == "torch-cuda"
    # Compiling takes minutes.
    names = ("nuclei", *_ARCHITECTURES) if eager and not bench.tiny else ("nuclei",)
    shapes = [(1, 3, 64, 64)] if bench.tiny else [(1, 3, 1776, 1776), (16, 3, 512, 512)]
    for name in names:
        bundle = load_model("nuclei") if name == "nuclei" else random_bundle(name)
        for shape in shapes if eager else shapes[:1]:
            yield _network_row(bench, bundle, backend, shape)
    if eager:
        with mock.patch.object(torch_cuda, "fuse_relu", lambda network: network):
            unfused = _network_row(bench, load_model("nuclei"), backend, shapes[0])
        yield {**unfused, "name": f"{unfused['name']}, ReLU not fused"}


def _network_row(bench: Bench, bundle: Bundle, backend: str, shape: tuple[int, int, int, int]) -> Row:
    with tempfile.TemporaryDirectory() as cache:
        start = time.perf_counter()
        model = _make(bench, bundle, backend, Artefacts(Path(cache))).compile(shape)
        compiling = time.perf_counter() - start
        # On zeros a GPU draws less power and clocks higher.
        model.pixels.copy_(torch.rand(shape).half())
        seconds = bench.seconds(model.enqueue)
    least = least_seconds(build_torch_network(bundle), shape, bench.flops, bench.copy)
    return {
        "name": f"network {bundle.card.name}, {shape[0]} x {shape[2]} px, {backend}",
        "mpx_per_s": shape[0] * shape[2] * shape[3] / seconds / 1e6,
        "of_ceiling": least / seconds,
        "compile_seconds": compiling,
    }


def _make(bench: Bench, bundle: Bundle, backend: str, artefacts: Artefacts) -> Any:
    if bench.device.is_gpu:
        return make_backend(bundle, backend, "fp16", 1, artefacts, str(bench.device.torch_device))
    return torch_cuda.TorchCudaBackend(bundle, bench.device, compiled=False)


def random_bundle(name: str) -> Bundle:
    """Make a network of another architecture with random weights, which take as long as any."""
    torch.manual_seed(0)
    network = build_network(_ARCHITECTURES[name])
    weights = {key: value.numpy() for key, value in network.state_dict().items()}
    taken = Input(("rgb",), Normalisation(), Size(32, 32), 0.5)
    card = Card(name, taken, plain_output("foreground"), "mask", 32, 128, 64, architecture=_ARCHITECTURES[name])
    return Bundle(card, weights)


def measure_slide(device: str, folder: Path, side: int = _SLIDE, pattern: int = PATTERN) -> Iterator[Row]:
    """Measure whole runs over a slide, from zarr to zarr on local disk."""
    image = write_repeated_slide(folder / "slide.zarr", side, shipped_pieces(), min(1024, pattern), pattern)
    for workers in sorted({min(cores(), count) for count in (_MOST_WORKERS, 4)}, reverse=True):
        yield _run_row(f"slide of {side} px, {workers} threads", image, folder, device, workers=workers)


def measure_plate(device: str, folder: Path, fields: int = _FIELDS) -> Iterator[Row]:
    """Measure a whole run over a plate of small fields, four at a time on the GPU."""
    image = write_plate(folder / "plate.zarr", fields, shipped_pieces())
    workers = min(cores(), _MOST_WORKERS)
    yield _run_row(f"plate of {fields} fields, {workers} threads", image, folder, device, workers=workers, batch=4)
    if find_spec("distributed") is not None:
        name = f"plate of {fields} fields, processes by cores and GPUs"
        row = _run_row(name, image, folder, device, scheduler="processes", batch=4)
        del row["gpu_busy"]  # the batches of several processes overlap
        yield row


def _run_row(name: str, image: Path, folder: Path, device: str, **changes: Any) -> Row:
    """Run twice in this process; the figures of the second run.

    Raises:
        RuntimeError: a slide failed.
    """
    settings = Settings(
        output=folder / "out",
        backend="torch-cuda",
        device=device,
        gate=False,
        downscale=1,
        skip_background="off",
        **changes,
    )
    for _ in range(2):
        shutil.rmtree(folder / "out", ignore_errors=True)
        report = run([image], settings, RunProgress(Console(), verbosity=-1))
        reasons = [slide.reason for slide in report.slides if slide.status != "done"]
        if reasons:
            raise RuntimeError(reasons[0])
    seconds = report.seconds - report.starting_seconds
    return {
        "name": name,
        "mpx_per_s": sum(slide.pixels for slide in report.slides) / seconds / 1e6,
        "seconds": seconds,
        "gpu_busy": report.stages["model"] / seconds,
        "compile_seconds": report.compile_seconds,
        "stages": report.stages,
        "tile": report.tile,
    }


def measure_host(folder: Path, side: int = _SLIDE, pattern: int = PATTERN) -> Iterator[Row]:
    """Measure the host's ceiling: the same slide on a GPU that takes no time."""
    image = write_repeated_slide(folder / "slide.zarr", side, shipped_pieces(), min(1024, pattern), pattern)
    workers = min(cores(), _MOST_WORKERS)
    command = [sys.executable, str(_HERE / "bench_host.py"), "--workers", str(workers), "--measure", str(image)]
    done = subprocess.run([*command, str(folder / "out")], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip()[-300:])
    figures = json.loads(done.stdout.splitlines()[-1])
    yield {
        "name": f"host alone, slide of {side} px, {workers} threads",
        "mpx_per_s": figures["mpx"] / figures["seconds"],
        "mpx_per_s_and_core": figures["mpx"] / figures["processor"],
        "seconds": figures["seconds"],
    }


def measure_monai(bench: Bench, folder: Path) -> Iterator[Row]:
    """Measure MONAI's sliding window with the same weights in float16, slide and GPU, from zarr to zarr.

    cuDNN is set as MONAI's recipes set it: it times its convolutions, and need not choose the same ones in each run.
    """
    import zarr
    from monai.inferers import sliding_window_inference

    network = build_torch_network(load_model("nuclei")).to(bench.device.torch_device)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network = network if bench.tiny else network.half()
    side, pattern, tile, at_once = (128, 128, 64, 2) if bench.tiny else (_MONAI_SLIDE, PATTERN, 512, 16)
    image = write_repeated_slide(folder / "slide.zarr", side, shipped_pieces(), min(1024, pattern), pattern)
    source = zarr.open_array(str(image), path="0", mode="r")
    target = zarr.create_array(str(folder / "monai.zarr"), shape=source.shape[1:], chunks=source.chunks[1:], dtype="u1")
    kind = next(network.parameters()).dtype

    def foreground(tiles: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = network(tiles)[:, :1]
        return logits

    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False):
        for _ in range(2):  # the first one warms up
            start = time.perf_counter()
            pixels = torch.from_numpy(source[...]).to(bench.device.torch_device)[None].to(kind) / 255
            bench.device.settle()
            read = time.perf_counter()
            with torch.inference_mode():
                logits = sliding_window_inference(pixels, (tile, tile), at_once, foreground, 0.25, "gaussian")
            bench.device.settle()
            computed = time.perf_counter()
            target[...] = (logits[0, 0] > 0).to(torch.uint8).cpu().numpy()
            seconds = time.perf_counter() - start
    yield {
        "name": f"MONAI's sliding window, float16, slide of {side} px",
        "mpx_per_s": target.size / seconds / 1e6,
        "seconds": seconds,
        "sliding_window_mpx_per_s": target.size / (computed - read) / 1e6,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the rows and logs; by default one named by the GPU")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="run these parts alone")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="for all parts together")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    out = chosen.out or _HERE / "results" / "-".join((gpus() or ["no-gpu"])[0].lower().split())
    rows = Rows(out.resolve())
    if chosen.measure:
        with (
            tempfile.TemporaryDirectory() as name,
            closing(measure(chosen.measure, Bench(Device(chosen.device)), chosen.device, Path(name))) as measured,
        ):
            for row in measured:
                rows.add(part=chosen.measure, **row)
                print(json.dumps(row))
        return
    try:
        parts = choose(parts_for(chosen.device, rows.folder), chosen.only)
    except ValueError as error:
        parser.error(str(error))
    rows.add(conditions={"gpu": gpus(), "cuda": torch.version.cuda, **conditions()})
    failed = False
    with tempfile.TemporaryDirectory() as cache:
        for outcome in run_parts(parts, rows, chosen.seconds, CELLSEG_CACHE_DIR=cache):
            failed |= outcome.status == FAILED
            if gpus():
                keep_proof(ProvenPart(outcome.part, outcome.status, today(), outcome.reason))
    print(rows.folder)
    sys.exit(failed)


if __name__ == "__main__":
    main()
