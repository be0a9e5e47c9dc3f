"""TensorRT on an NVIDIA GPU in fp16, through torch.export and torch-tensorrt.

Written against TensorRT 10.15 and 11.0 (torch-tensorrt 2.11 and 2.13), where a network's own types decide the
precision: a float16 network is the only thing that is asked for.  Neither library is imported before a GPU is known
to be there, as both fail in their own ways without one.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from cellseg_batch.engine.errors import BackendError
from cellseg_batch.engine.inference.backends import cuda
from cellseg_batch.engine.inference.backends.cuda import Device, GraphedHalf, demand_gpu
from cellseg_batch.engine.inference.backends.fold_layers import fold_batch_norm
from cellseg_batch.engine.inference.backends.protocol import BackendRequest, Shape
from cellseg_batch.engine.inference.backends.tensorrt_errors import demand, explained, given
from cellseg_batch.engine.models import build_torch_network
from cellseg_batch.engine.storage.cache import Artefacts, Key
from cellseg_batch.trainer.bundle import Bundle

PRECISIONS = ("fp16",)
_LARGEST_BATCH = 64
# An engine in fp16 holds 2 bytes a weight and some padding, one in fp32 holds 4.
_BYTES_PER_WEIGHT = 3
_PADDING_BYTES = 1 << 20
_PLAN, _TIMINGS = "model.plan", "timings.bin"


def supported_precisions() -> tuple[str, ...]:
    """The precisions offered on this machine.

    Raises:
        BackendError: as `load_libraries`.
    """
    load_libraries()
    return PRECISIONS


def load_libraries() -> tuple[Any, Any]:
    """The modules ``tensorrt`` and ``torch_tensorrt``.

    Raises:
        BackendError: there is no GPU that torch can use, or one of them cannot be imported.
    """
    demand_gpu("TensorRT")
    try:
        with _quiet():
            # In this order: torch_tensorrt puts a stand-in of its own in tensorrt's place.
            import torch_tensorrt

            import tensorrt  # isort: skip
    except Exception as error:  # a missing library is a plain Exception there, not an ImportError
        raise BackendError(
            "TensorRT",
            expected="torch_tensorrt and tensorrt that can be imported",
            found=f"{type(error).__name__}: {error}",
            cause="not installed, or built for another torch",
            remedy="pip install 'cellseg-batch[tensorrt]'",
        ) from error
    return tensorrt, torch_tensorrt


def make(bundle: Bundle, request: BackendRequest) -> TensorRtBackend:
    """The backend of a bundle's network; raises BackendError as `load_libraries`."""
    return TensorRtBackend(bundle, request.precision, cuda.Device(request.gpu), request.artefacts)


class TensorRtBackend:
    """A bundle's network in TensorRT.

    Args:
        bundle: the model.
        precision: fp16.
        device: that computes.
        artefacts: where plans are kept.

    Raises:
        BackendError: as `load_libraries`.
    """

    name = "tensorrt"

    def __init__(self, bundle: Bundle, precision: str, device: Device, artefacts: Artefacts) -> None:
        self.precision = precision
        self._tensorrt, self._torch_tensorrt = load_libraries()
        self.version = f"{self._tensorrt.__version__} (torch-tensorrt {self._torch_tensorrt.__version__})"
        self._bundle = bundle
        self._device = device
        self._artefacts = artefacts

    def compile_bytes(self, shape: Shape) -> None:
        """Not offered."""

    def compile(self, shape: Shape) -> GraphedHalf:
        """Make the plan for batches of ``shape`` (N, C, H, W) ready to run.

        Raises:
            BackendError: TensorRT cannot build or load it, or it would not run in fp16.
        """
        weights = sum(array.size for array in self._bundle.weights.values())
        # One logger a process: TensorRT keeps the first that it is given.
        logger = self._torch_tensorrt.logging.TRT_LOGGER
        plan = self.plan(shape)
        with explained(f"load the plan for batches of {shape}"), self._device.on(self._device.stream()):
            return load_plan(self._tensorrt, logger, plan, shape, weights, self._device)

    def plan(self, shape: Shape) -> bytes:
        """The plan for batches of ``shape``, built if none is kept for these libraries and this GPU model.

        Raises:
            BackendError: TensorRT cannot build it, or the batch is too large.
        """
        if shape[0] > _LARGEST_BATCH:
            raise BackendError(
                f"`batch={shape[0]}`",
                expected=f"at most {_LARGEST_BATCH} tiles with TensorRT",
                found=f"{shape[0]}",
                remedy="choose a smaller `batch`",
            )
        key = {
            "what": "tensorrt plan",
            "model": self._bundle.card.name,
            "sha256": self._bundle.sha256,
            "shape": list(shape),
            "precision": self.precision,
            "gpu": self._device.model,
            "versions": {"tensorrt": self.version, "torch": torch.__version__},
        }

        def make(folder: Path) -> None:
            with explained(f"build a plan for batches of {shape}"):
                timings = folder / _TIMINGS
                timings.write_bytes(self._known_timings(key))
                (folder / _PLAN).write_bytes(self._build(shape, timings))

        return (self._artefacts.get(key, make) / _PLAN).read_bytes()

    def _known_timings(self, key: Key) -> bytes:
        """What these libraries timed on this GPU model for other plans; b"" if nothing."""
        alike = [
            entry.folder / _TIMINGS
            for entry in self._artefacts.entries()
            if entry.sound and all(entry.key.get(name) == key[name] for name in ("what", "gpu", "versions"))
        ]
        # Each holds those that it began with, so that the largest holds the most.
        return max((path.read_bytes() for path in alike), key=len, default=b"")

    def _build(self, shape: Shape, timings: Path) -> bytes:
        batch, *rest = shape
        # One more than asked for where only one is: a profile of one shape would make the batch a constant.
        largest = (max(batch, 2), *rest)
        profile = self._torch_tensorrt.Input(min_shape=(1, *rest), opt_shape=shape, max_shape=largest, dtype=torch.half)
        program = export_half(self._bundle, (rest[1], rest[2]), self._device)
        with _quiet():
            plan = self._torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
                program,
                arg_inputs=[profile],
                require_full_compilation=True,
                optimization_level=3,
                timing_cache_path=str(timings),
            )
        return bytes(plan)


def load_plan(tensorrt: Any, logger: Any, plan: bytes, shape: Shape, weights: int, device: Device) -> GraphedHalf:
    """A plan made ready to run at one batch shape.

    Args:
        tensorrt: the module.
        logger: what TensorRT tells its troubles.
        plan: what TensorRT built.
        shape: (N, C, H, W) of every batch.
        weights: number of weights in the network, to tell fp16 from fp32.
        device: that computes.

    Raises:
        BackendError: the engine is not in fp16.
        Exception: the plan cannot be loaded or run here.
    """
    runtime = tensorrt.Runtime(logger)
    engine = given(runtime.deserialize_cuda_engine(plan), "deserialize_cuda_engine")
    pixels, logits = _tensor_names(tensorrt, engine)
    _demand_half(tensorrt, engine, weights)
    context = given(engine.create_execution_context(), "create_execution_context")
    demand(context.set_input_shape(pixels, shape), "set_input_shape")
    n, k, height, width = context.get_tensor_shape(logits)
    buffers = GraphedHalf(shape, (n, k, height, width), device)
    demand(context.set_tensor_address(pixels, buffers.pixels.data_ptr()), "set_tensor_address")
    demand(context.set_tensor_address(logits, buffers.logits.data_ptr()), "set_tensor_address")
    # A tuple is taken down from its end: nothing outlives what it was made from.
    kept = (runtime, engine, context)

    def launch(stream: int) -> None:
        demand(kept[-1].execute_async_v3(stream), "execute_async_v3")

    buffers.capture(launch)
    return buffers


def export_half(bundle: Bundle, sides: tuple[int, int], device: Device) -> ExportedProgram:
    """The network in float16 on the device, batch norm folded, for batches (1 to 64, C, *sides).

    Its logits are not clamped: what TensorRT's clamp makes of NaN is not laid down, and NaN is how an overflow is seen.
    """
    network = _with_plain_clamps(fold_batch_norm(build_torch_network(bundle))).half().to(device.torch_device)
    # An example of batch 1 would be taken for a constant.
    example = torch.zeros(2, bundle.card.channels, *sides, dtype=torch.half, device=device.torch_device)
    batch = Dim("batch", min=1, max=_LARGEST_BATCH)
    with torch.no_grad(), _quiet():
        return torch.export.export(network, (example,), dynamic_shapes=({0: batch},))


class _ReLU6(nn.Module):
    """``torch.nn.ReLU6``, which torch lowers to a float32 clamp between two casts, as one clamp in any type."""

    def forward(self, features: Tensor) -> Tensor:
        """``features`` held between 0 and 6."""
        return features.clamp(0.0, 6.0)


def _with_plain_clamps(network: nn.Module) -> nn.Module:
    """Replace every ReLU6 in place, so that no layer leaves float16; returns ``network``."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(module, name, _ReLU6())
    return network


def _tensor_names(tensorrt: Any, engine: Any) -> tuple[str, str]:
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == tensorrt.TensorIOMode.INPUT]
    outputs = [name for name in names if name not in inputs]
    if (len(inputs), len(outputs)) != (1, 1):
        raise _refusal("one input and one output", f"inputs {inputs}, outputs {outputs}", "a plan of another network")
    return inputs[0], outputs[0]


def _demand_half(tensorrt: Any, engine: Any, weights: int) -> None:
    """TensorRT has built fp32 engines without a word where fp16 was asked for; so look at what was built.

    Its inspector tells the types of layers only of engines built to be debugged; the size of the weights always tells.
    """
    types = {name: engine.get_tensor_dtype(name) for name in _tensor_names(tensorrt, engine)}
    if any(dtype != tensorrt.DataType.HALF for dtype in types.values()):
        built = ", ".join(f"{name} {dtype.name}" for name, dtype in types.items())
        raise _refusal("HALF input and output", built, "a network that was exported in float32")
    size, limit = engine.get_engine_stat(tensorrt.EngineStat.TOTAL_WEIGHTS_SIZE), _BYTES_PER_WEIGHT * weights
    if size > limit + _PADDING_BYTES:
        built = f"{size} bytes for {weights} weights"
        raise _refusal("layers in fp16 (2 bytes a weight)", built, "layers that TensorRT kept in fp32")


def _refusal(expected: str, found: str, cause: str) -> BackendError:
    return BackendError(
        "TensorRT engine",
        expected=expected,
        found=found,
        cause=cause,
        remedy="use the versions that cellseg-batch[tensorrt] pins, or another `backend`",
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' warnings about their own insides from the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
