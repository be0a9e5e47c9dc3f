"""OpenVINO on the CPU: the fastest there, with bf16 where the processor has it.

The network goes from ``torch.export`` straight into OpenVINO, once, with dynamic batch and size; each batch
shape is then compiled on its own, which takes a fraction of a second.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.backends.backend import CompiledModel, Shape
from cellseg_batch.engine.models import build_torch_network
from cellseg_batch.trainer.bundle import Bundle

# OpenVINO's telemetry looks up a host and writes files when it is imported.  Without its package OpenVINO falls
# back to a stub of its own, so that no run ever leaves the machine.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

import openvino  # noqa: E402

_HINTS = {"fp32": "f32", "bf16": "bf16"}
_LARGEST_BATCH = 64
_LARGEST_SIDE = 1 << 16


def supported_precisions() -> tuple[str, ...]:
    """The precisions that this processor runs natively, fastest first."""
    capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ("bf16", "fp32") if "BF16" in capabilities else ("fp32",)


class OpenVinoBackend:
    """A bundle's network in OpenVINO."""

    name = "openvino"
    version = openvino.__version__

    def __init__(self, bundle: Bundle, precision: str, threads: int) -> None:
        self.precision = precision
        self._core = openvino.Core()
        self._options = {
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
        }
        self._model = _convert(bundle)

    def compile(self, shape: Shape) -> CompiledModel:
        """Compile for one static batch shape."""
        model = self._model.clone()
        model.reshape(list(shape))
        request = self._core.compile_model(model, "CPU", self._options).create_infer_request()

        def run(batch: NDArray[np.float32]) -> NDArray[np.float32]:
            request.set_input_tensor(openvino.Tensor(batch, shared_memory=True))
            request.infer()
            logits: NDArray[np.float32] = request.get_output_tensor(0).data
            return logits

        return run


def _convert(bundle: Bundle) -> Any:
    import torch
    from torch.export import Dim

    stride = bundle.card.total_stride
    batch = Dim("batch", min=1, max=_LARGEST_BATCH)
    height = stride * Dim("height", min=1, max=_LARGEST_SIDE // stride)
    width = stride * Dim("width", min=1, max=_LARGEST_SIDE // stride)
    # An example of batch 1 would be taken for a constant.
    example = torch.zeros(2, bundle.card.channels, 8 * stride, 8 * stride)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            build_torch_network(bundle), (example,), dynamic_shapes=({0: batch, 2: height, 3: width},)
        )
        return openvino.convert_model(program)
