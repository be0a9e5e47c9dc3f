"""Show without a GPU that every preset's network becomes one TensorRT engine in float16.

    python -m tests.support.lowering tensorrt_cu13_bindings-11.0.0.114-*.whl torch_tensorrt-2.13.0-*.whl

Runs torch-tensorrt's own lowering, converter registry and partitioner on the network as the backend exports it; what it
asks of a GPU is answered as an H100 would.  TensorRT itself is not there, so nothing is built or timed.  The wheels
must be of this Python's version and of the torch that is installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import types
import warnings
import zipfile
from pathlib import Path

from tests.support.signatures.dump import unpack_bindings

# Beside the presets' own: what else a recipe or a bundle may ask for.
VARIANTS = [
    {"name": "unet", "width": 8, "up": "bilinear", "grey": True},
    {"name": "unet-plus", "width": 8, "up": "bilinear"},
    {"name": "unet-resnet34", "up": "transposed"},
]


def main(bindings: Path, torch_tensorrt: Path) -> int:
    """Unpack the wheels into a folder of their own and lower there, in a process that sees them."""
    with tempfile.TemporaryDirectory() as folder:
        unpack_bindings(bindings, folder)
        with zipfile.ZipFile(torch_tensorrt) as archive:
            # Its compiled runtime needs CUDA; without it, it falls back to Python.
            archive.extractall(folder, [name for name in archive.namelist() if not name.endswith(".so")])
        alias = Path(folder) / "tensorrt"
        alias.mkdir()
        code = "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__, tensorrt\n"
        (alias / "__init__.py").write_text(code)
        paths = os.pathsep.join([folder, str(Path(__file__).parents[2])])
        environment = {**os.environ, "LD_LIBRARY_PATH": folder, "PYTHONPATH": paths}
        child = [sys.executable, str(Path(__file__).resolve()), "--lower"]
        return subprocess.run(child, env=environment, check=False).returncode


def pretend_a_gpu() -> None:
    """Answer the few questions that torch-tensorrt asks while it is imported."""
    import torch

    h100 = types.SimpleNamespace(major=9, minor=0, name="NVIDIA H100", total_memory=80 << 30)
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_properties = lambda *_: h100
    torch.cuda.mem_get_info = lambda *_: (80 << 30, 80 << 30)
    if not hasattr(torch._C, "_CudaDeviceProperties"):
        torch._C._CudaDeviceProperties = object
    # Lists loaded libraries; needed for Windows only.
    sys.modules.setdefault("dllist", types.SimpleNamespace(dllist=list))


def lower_all() -> int:
    """Print one line a network; returns how many are not one engine in float16."""
    import logging

    import torch
    import torch_tensorrt
    from torch_tensorrt.dynamo._settings import CompilationSettings
    from torch_tensorrt.dynamo.conversion import DYNAMO_CONVERTERS
    from torch_tensorrt.dynamo.lowering import get_decompositions, post_lowering, pre_export_lowering
    from torch_tensorrt.dynamo.partitioning import fast_partition

    from cellseg_batch.engine.inference.backends import cuda, tensorrt_gpu
    from cellseg_batch.trainer.recipe import list_presets, load_preset
    from cellseg_batch.trainer.unet import ARCHITECTURES, DOWNSCALED, build_network

    logging.disable(logging.ERROR)
    tensorrt_gpu.build_torch_network = lambda bundle: build_network(bundle.card.architecture).eval()
    recipes = {preset: load_preset(preset) for preset in list_presets()}
    networks = {preset: recipe.architecture for preset, recipe in recipes.items()}
    networks |= {
        f"{preset} downscaled": {"name": DOWNSCALED, "factor": int(factor), "inner": recipe.architecture}
        for preset, recipe in recipes.items()
        for factor in list(recipe.downscale)[-1:]
    }
    networks |= {f"variant {number}": variant for number, variant in enumerate(VARIANTS, start=1)}
    assert {architecture["name"] for architecture in networks.values()} == {*ARCHITECTURES, DOWNSCALED}
    settings = CompilationSettings(require_full_compilation=True)
    DYNAMO_CONVERTERS.set_compilation_settings(settings)
    print(f"torch {torch.__version__}, torch-tensorrt {torch_tensorrt.__version__}")
    wrong = 0
    for name, architecture in networks.items():
        card = types.SimpleNamespace(architecture=architecture, input=types.SimpleNamespace(count=3))
        bundle = types.SimpleNamespace(card=card)
        program = pre_export_lowering(tensorrt_gpu.export_half(bundle, (64, 64), cuda.Device("cpu")), settings)
        program = program.run_decompositions(get_decompositions())
        graph = post_lowering(program.module(), settings)
        values = [node.meta.get("val") for node in graph.graph.nodes]
        kinds = {value.dtype for value in values if isinstance(value, torch.Tensor)}
        kinds = {str(kind) for kind in kinds if kind.is_floating_point}
        parts, support = fast_partition(
            graph, min_block_size=1, torch_executed_ops=set(), require_full_compilation=True
        )
        engines = [engine for engine, _ in parts.named_children()]
        fine = engines == ["_run_on_acc_0"] and not support.unsupported_operators and kinds == {"torch.float16"}
        wrong += not fine
        found = f"{engines}, {sorted(kinds)}, {support.unsupported_operators}"
        print(f"{'ok   ' if fine else 'WRONG'} {name} {architecture}: {found}")
    return wrong + (not reaches_the_builder())


def reaches_the_builder() -> bool:
    """Build the shipped network with the real torch-tensorrt: its own code takes our call, TensorRT's stub gives up."""
    from cellseg_batch.engine.inference.backends import cuda, tensorrt_gpu
    from cellseg_batch.engine.models import build_torch_network, load_model
    from cellseg_batch.engine.storage.cache import Artefacts

    cuda.available = lambda: True
    tensorrt_gpu.build_torch_network = build_torch_network
    cuda.Device.model = "pretended"
    with tempfile.TemporaryDirectory() as folder:
        artefacts = Artefacts(Path(folder))
        backend = tensorrt_gpu.TensorRtBackend(load_model("nuclei"), "fp16", cuda.Device("cpu"), artefacts)
        return _fails_in_the_builder(backend)


def _fails_in_the_builder(backend) -> bool:
    from cellseg_batch.engine.errors import BackendError

    try:
        backend.plan((2, 3, 64, 64))
    except BackendError as error:
        print(f"TensorRT {backend.version}: {error}")
        return "factory function returned nullptr" in str(error)
    return False


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if sys.argv[1:] == ["--lower"]:
        pretend_a_gpu()
        sys.exit(lower_all())
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
