"""Run networks in TensorRT on an NVIDIA GPU in fp16: ours through torch-tensorrt, graphs through its parser.

Written against TensorRT 10.15 and 11.0 (torch-tensorrt 2.11 and 2.13), where the network's own dtypes decide
the precision, so a network is exported in float16, and a graph converted to it.  Neither library is imported before
torch sees a GPU, because both fail in their own ways without one.

In TensorRT's words, a plan is a serialised network, and an engine a plan that is loaded on a GPU.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from cellseg_batch.engine.errors import BackendError
from cellseg_batch.engine.inference.backends import cuda
from cellseg_batch.engine.inference.backends.cuda import Device, GraphedHalf, demand_gpu
from cellseg_batch.engine.inference.backends.fold_layers import fold_batch_norm, plain_clamps
from cellseg_batch.engine.inference.backends.protocol import CONVERSION_VERSION, BackendRequest, Shape
from cellseg_batch.engine.inference.backends.tensorrt_errors import demand, demand_result, explained
from cellseg_batch.engine.inference.backends.tensorrt_parser import build_plan
from cellseg_batch.engine.inference.backends.torch_turn import TORCH_TURN
from cellseg_batch.engine.machine import package_version
from cellseg_batch.engine.models import build_torch_network
from cellseg_batch.engine.storage.cache import Artefacts, Key
from cellseg_batch.trainer.bundle import Bundle

PRECISIONS = ("fp16",)
_LARGEST_BATCH = 64
# A TensorRT engine in fp16 takes 2 bytes per weight and some padding; in fp32 it takes 4.
_BYTES_PER_WEIGHT = 3
_PADDING_BYTES = 1 << 19
_PLAN, _TIMINGS = "model.plan", "timings.bin"


def supported_precisions() -> tuple[str, ...]:
    """Return the precisions offered on this machine.

    Raises:
        BackendError: see `load_libraries`.
    """
    load_libraries()
    return PRECISIONS


def load_libraries() -> tuple[Any, Any]:
    """Import and return the modules ``tensorrt`` and ``torch_tensorrt``.

    Raises:
        BackendError: there is no GPU that torch can use, or a module cannot be imported.
    """
    demand_gpu("TensorRT")
    try:
        with _quiet():
            # Import in this order: torch_tensorrt registers its own stand-in for the module tensorrt.
            import torch_tensorrt

            import tensorrt  # isort: skip
    except Exception as error:  # torch_tensorrt raises a plain Exception for a missing library
        raise BackendError(
            "TensorRT",
            expected="torch_tensorrt and tensorrt that can be imported",
            found=f"{type(error).__name__}: {error}",
            cause="not installed, or built for another torch",
            remedy="pip install 'cellseg-batch[tensorrt]'",
        ) from error
    return tensorrt, torch_tensorrt


def make(bundle: Bundle, request: BackendRequest) -> TensorRtBackend:
    """Make the backend of a bundle's network; raises BackendError, see `load_libraries`."""
    return TensorRtBackend(bundle, request.precision, cuda.Device(request.gpu), request.artefacts)


class TensorRtBackend:
    """A bundle's network in TensorRT.

    Args:
        bundle: the model.
        precision: fp16.
        device: the device that computes.
        artefacts: cache of plans.

    Raises:
        BackendError: see `load_libraries`.
    """

    name = "tensorrt"

    def __init__(self, bundle: Bundle, precision: str, device: Device, artefacts: Artefacts) -> None:
        self.precision = precision
        self._tensorrt, self._torch_tensorrt = load_libraries()
        # Each process has one logger: TensorRT keeps the first that it gets.
        self._logger = self._torch_tensorrt.logging.TRT_LOGGER
        self.version = f"{self._tensorrt.__version__} (torch-tensorrt {self._torch_tensorrt.__version__})"
        self._bundle = bundle
        self._device = device
        self._artefacts = artefacts

    def compile_bytes(self, shape: Shape) -> None:
        """Return None: not offered."""

    def compile(self, shape: Shape) -> GraphedHalf:
        """Make the plan for batches of ``shape`` (N, C, H, W) ready to run.

        Raises:
            BackendError: TensorRT cannot build or load the plan, or would not run it in fp16.
        """
        weights = _count_weights(self._bundle)
        # On the device's own stream: both libraries build and load for the current device.
        with self._device.compiling(), self._device.on(self._device.stream()):
            plan = self.plan(shape)
            with explained(f"load the plan for batches of {shape}"):
                return load_plan(self._tensorrt, self._logger, plan, shape, weights, self._device)

    def plan(self, shape: Shape) -> bytes:
        """Return the plan for batches of ``shape``; build it if none is cached for these libraries and this GPU.

        Raises:
            BackendError: TensorRT cannot build the plan, or the batch is too large.
        """
        if shape[0] > _LARGEST_BATCH:
            raise BackendError(
                f"`batch={shape[0]}`",
                expected=f"at most {_LARGEST_BATCH} tiles with TensorRT",
                found=f"{shape[0]}",
                remedy="choose a smaller `batch`",
            )
        converters = ("torch",) if self._bundle.graph is None else ("onnx", "onnxruntime")
        key = {
            "what": "tensorrt plan",
            "model": self._bundle.card.name,
            "sha256": self._bundle.sha256,
            "shape": list(shape),
            "precision": self.precision,
            "conversion_version": CONVERSION_VERSION,
            "gpu": self._device.model,
            "versions": {"tensorrt": self.version} | {package: package_version(package) for package in converters},
        }

        def make(folder: Path) -> None:
            with explained(f"build a plan for batches of {shape}"):
                timings = folder / _TIMINGS
                timings.write_bytes(self._known_timings(key))
                build = self._build if self._bundle.graph is None else self._build_graph
                (folder / _PLAN).write_bytes(build(shape, timings))

        return (self._artefacts.get(key, make) / _PLAN).read_bytes()

    def _known_timings(self, key: Key) -> bytes:
        """Return the timings of these libraries on this GPU model for other plans; b"" if there are none."""
        timing_files = [
            entry.folder / _TIMINGS
            for entry in self._artefacts.entries()
            if entry.sound and all(entry.key.get(name) == key[name] for name in ("what", "gpu", "versions"))
        ]
        # Each file includes the timings that its build began with, so the largest file has the most.
        return max((path.read_bytes() for path in timing_files), key=len, default=b"")

    def _build(self, shape: Shape, timings: Path) -> bytes:
        batch, *rest = shape
        # The largest batch is at least 2: a profile of a single shape would make the batch a constant.
        largest = (max(batch, 2), *rest)
        profile = self._torch_tensorrt.Input(min_shape=(1, *rest), opt_shape=shape, max_shape=largest, dtype=torch.half)
        program = export_half(self._bundle, (rest[1], rest[2]), self._device)
        with _quiet():
            plan = self._torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
                program,
                arg_inputs=[profile],
                device=self._device.torch_device,
                require_full_compilation=True,
                optimization_level=3,
                timing_cache_path=str(timings),
            )
        return bytes(plan)

    def _build_graph(self, shape: Shape, timings: Path) -> bytes:
        from cellseg_batch.engine.inference.backends.onnx_graph import plain_graph

        return build_plan(self._tensorrt, self._logger, plain_graph(self._bundle, half=shape), timings)


def _count_weights(bundle: Bundle) -> int:
    if bundle.graph is None:
        return sum(array.size for array in bundle.weights.values())
    from cellseg_batch.engine.inference.backends.onnx_graph import count_weights

    return count_weights(bundle)


def load_plan(tensorrt: Any, logger: Any, plan: bytes, shape: Shape, weights: int, device: Device) -> GraphedHalf:
    """Load a plan and make it ready to run at one batch shape.

    Args:
        tensorrt: the module.
        logger: TensorRT's logger.
        plan: the plan that TensorRT built.
        shape: (N, C, H, W) of every batch.
        weights: number of weights in the network, to tell fp16 from fp32.
        device: the device that computes.

    Raises:
        BackendError: the TensorRT engine is not in fp16.
        Exception: the plan cannot be loaded or run on this machine.
    """
    runtime = tensorrt.Runtime(logger)
    engine = demand_result(runtime.deserialize_cuda_engine(plan), "deserialize_cuda_engine")
    pixels, logits = _tensor_names(tensorrt, engine)
    _demand_half(tensorrt, engine, weights)
    context = demand_result(engine.create_execution_context(), "create_execution_context")
    demand(context.set_input_shape(pixels, shape), "set_input_shape")
    n, k, height, width = context.get_tensor_shape(logits)
    buffers = GraphedHalf(shape, (n, k, height, width), device)
    demand(context.set_tensor_address(pixels, buffers.pixels.data_ptr()), "set_tensor_address")
    demand(context.set_tensor_address(logits, buffers.logits.data_ptr()), "set_tensor_address")
    # Python frees a tuple from its end, so that no object outlives the object that made it.
    owners = (runtime, engine, context)

    def launch(stream: int) -> None:
        demand(owners[-1].execute_async_v3(stream), "execute_async_v3")

    buffers.capture(launch)
    return buffers


def export_half(bundle: Bundle, sides: tuple[int, int], device: Device) -> ExportedProgram:
    """Export the network in float16 on the device, batch norm folded, for batches (1 to 64, C, *sides).

    Its logits are not clamped: an overflow shows as NaN, and TensorRT does not define what its clamp makes of NaN.
    """
    network = plain_clamps(fold_batch_norm(build_torch_network(bundle))).half().to(device.torch_device)
    # torch.export would take a batch of 1 for a constant.
    example = torch.zeros(2, bundle.card.input.count, *sides, dtype=torch.half, device=device.torch_device)
    batch = Dim("batch", min=1, max=_LARGEST_BATCH)
    with TORCH_TURN, torch.no_grad(), _quiet():
        return torch.export.export(network, (example,), dynamic_shapes=({0: batch},))


def _tensor_names(tensorrt: Any, engine: Any) -> tuple[str, str]:
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == tensorrt.TensorIOMode.INPUT]
    outputs = [name for name in names if name not in inputs]
    if (len(inputs), len(outputs)) != (1, 1):
        raise _refusal("one input and one output", f"inputs {inputs}, outputs {outputs}", "a plan of another network")
    return inputs[0], outputs[0]


def _demand_half(tensorrt: Any, engine: Any, weights: int) -> None:
    """Raise BackendError unless the engine runs in fp16: TensorRT may silently build fp32 from a request for fp16.

    TensorRT's inspector gives the dtypes of layers only for debug builds, but the size of the weights always tells.
    """
    types = {name: engine.get_tensor_dtype(name) for name in _tensor_names(tensorrt, engine)}
    if any(dtype != tensorrt.DataType.HALF for dtype in types.values()):
        names = ", ".join(f"{name} {dtype.name}" for name, dtype in types.items())
        raise _refusal("HALF input and output", names, "a network that was exported in float32")
    size, limit = engine.get_engine_stat(tensorrt.EngineStat.TOTAL_WEIGHTS_SIZE), _BYTES_PER_WEIGHT * weights
    if size > limit + _PADDING_BYTES:
        raise _refusal(
            "layers in fp16 (2 bytes a weight)",
            f"{size} bytes for {weights} weights",
            "layers that TensorRT kept in fp32",
        )


def _refusal(expected: str, actual: str, cause: str) -> BackendError:
    return BackendError(
        "TensorRT engine",
        expected=expected,
        found=actual,
        cause=cause,
        remedy="use the versions that cellseg-batch[tensorrt] pins, or another `backend`",
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the libraries' warnings about their own internals from the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
