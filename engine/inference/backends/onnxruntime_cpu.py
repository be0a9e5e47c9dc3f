"""Run ONNX graphs in ONNX Runtime on the CPU in fp32: the reference for models that come as a graph."""

from __future__ import annotations

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from cellseg_batch.engine.inference.backends.onnx_graph import LOGITS, PIXELS, plain_graph
from cellseg_batch.engine.inference.backends.protocol import BackendRequest, CompiledModel, Logits, Shape
from cellseg_batch.trainer.bundle import Bundle
from cellseg_batch.trainer.card import LAYOUTS

_PLAIN = LAYOUTS[0]
# Errors are raised; the library would also print them.
_FATAL_ONLY = 4


def supported_precisions() -> tuple[str, ...]:
    """Return fp32, which every processor runs."""
    return ("fp32",)


def make(bundle: Bundle, request: BackendRequest) -> OnnxRuntimeBackend:
    """Make the backend of a bundle's graph."""
    return OnnxRuntimeBackend(plain_graph(bundle), request.threads)


def run_graph(
    graph: bytes, pixels: NDArray[np.float32], threads: int, layout: str = _PLAIN
) -> dict[str, NDArray[np.generic]]:
    """Run a graph as its file has it, and not plain; name of each tensor that it gives -> values (N, K, h, w).

    Args:
        graph: serialised graph of one input.
        pixels: the input, (N, C, H, W).
        threads: number of threads.
        layout: order of the graph's axes; that of pixels and values if they are to stay as they are.
    """
    pixels = np.ascontiguousarray(pixels.transpose([_PLAIN.index(axis) for axis in layout]))
    session = _session(graph, threads)
    (source,) = session.get_inputs()
    names = [output.name for output in session.get_outputs()]
    taken = pixels.astype(np.float16) if source.type == "tensor(float16)" else pixels
    given = zip(names, session.run(names, {source.name: taken}), strict=True)
    return {name: values.transpose([layout.index(axis) for axis in _PLAIN]) for name, values in given}


def _session(graph: bytes, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _FATAL_ONLY
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class OnnxRuntimeBackend:
    """A plain graph in ONNX Runtime.

    Args:
        graph: serialised graph of `plain_graph`.
        threads: number of threads.
    """

    name = "onnxruntime"
    precision = "fp32"
    version = str(onnxruntime.__version__)

    def __init__(self, graph: bytes, threads: int) -> None:
        self._session = _session(graph, threads)

    def compile(self, shape: Shape) -> CompiledModel:
        """Return the model; ONNX Runtime takes batches of any shape."""
        return self._run

    def compile_bytes(self, shape: Shape) -> None:
        """Return None: it would normalise bytes no faster than the gather kernel."""

    def _run(self, batch: NDArray[np.float32], *, out: Logits | None = None) -> Logits:
        (logits,) = self._session.run([LOGITS], {PIXELS: batch})
        result: Logits = logits
        return result
