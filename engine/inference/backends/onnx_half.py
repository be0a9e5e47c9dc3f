"""Convert an ONNX graph to float16 for tiles of one shape, as TensorRT takes it: the dtypes of a graph decide there.

ONNX Runtime computes beforehand whatever depends on the shape alone, because float16 lacks most whole numbers above
2048, which sizes may be.  Its own converter does the rest.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import TensorProto

# Errors are raised; the library would also print them.
_FATAL_ONLY = 4


def in_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph in float16; the scales of Resize and some rare operators stay in float32.

    A graph that has float16 already stays as its author made it.  Weights beyond float16's range become its largest
    number; the gate shows what that does.

    Args:
        model: a graph of one input, whose shape is fixed.

    Raises:
        Exception: the graph takes no input of this shape.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    if any(tensor.data_type == TensorProto.FLOAT16 for tensor in constants_of(model)):
        return model
    half: onnx.ModelProto = convert_float_to_float16(_folded(model))
    return half


def constants_of(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Yield the constants of a graph, of any dtype."""
    yield from model.graph.initializer
    for node in model.graph.node:
        yield from (attribute.t for attribute in node.attribute if attribute.HasField("t"))


def _folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph without the operators whose results are known."""
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="cellseg-graph-") as folder:
        path = Path(folder) / "folded.onnx"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _FATAL_ONLY
        # More would bring in operators of its own.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(path)
