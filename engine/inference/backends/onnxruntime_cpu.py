"""Run ONNX graphs in ONNX Runtime on the CPU in fp32: the reference for models that come as a graph."""

from __future__ import annotations

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from cellseg_batch.engine.inference.backends.onnx_graph import LOGITS, PIXELS, plain_graph
from cellseg_batch.engine.inference.backends.protocol import BackendRequest, CompiledModel, Logits, Shape
from cellseg_batch.trainer.bundle import Bundle

_ERRORS_ONLY = 3


def supported_precisions() -> tuple[str, ...]:
    """Return fp32, which every processor runs."""
    return ("fp32",)


def make(bundle: Bundle, request: BackendRequest) -> OnnxRuntimeBackend:
    """Make the backend of a bundle's graph."""
    return OnnxRuntimeBackend(bundle, request.threads)


class OnnxRuntimeBackend:
    """A bundle's graph in ONNX Runtime."""

    name = "onnxruntime"
    precision = "fp32"
    version = str(onnxruntime.__version__)

    def __init__(self, bundle: Bundle, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = _ERRORS_ONLY
        self._session = onnxruntime.InferenceSession(plain_graph(bundle), options, providers=["CPUExecutionProvider"])

    def compile(self, shape: Shape) -> CompiledModel:
        """Return the model; ONNX Runtime takes batches of any shape."""
        return self._run

    def compile_bytes(self, shape: Shape) -> None:
        """Return None: it would normalise bytes no faster than the gather kernel."""

    def _run(self, batch: NDArray[np.float32], *, out: Logits | None = None) -> Logits:
        (logits,) = self._session.run([LOGITS], {PIXELS: batch})
        result: Logits = logits
        return result
