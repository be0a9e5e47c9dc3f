"""Convert an ONNX graph to float16 for tiles of one shape, as TensorRT takes it: the dtypes of a graph decide there.

ONNX Runtime computes beforehand whatever depends on the shape alone, because float16 has no sizes above 2048 that are
odd.  Its own converter does the rest.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx

# Errors are raised; the library would also print them.
_FATAL_ONLY = 4


def in_half(model: onnx.ModelProto, shape: Sequence[int]) -> onnx.ModelProto:
    """Return a graph of one input in float16; the scales of Resize and some rare operators stay in float32.

    Weights beyond float16's range become its largest number; the gate shows what that does.

    Args:
        model: the graph, in float32 or float16; it is changed.
        shape: shape of the input, in the graph's own layout.

    Raises:
        Exception: the graph takes no input of this shape.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    return convert_float_to_float16(_folded(model, shape))


def _folded(model: onnx.ModelProto, shape: Sequence[int]) -> onnx.ModelProto:
    """Return the graph for one shape, without the operators whose results are known."""
    import onnxruntime

    initial = {value.name for value in model.graph.initializer}
    (source,) = (value for value in model.graph.input if value.name not in initial)
    for axis, length in zip(source.type.tensor_type.shape.dim, shape, strict=True):
        axis.dim_value = length
    # Shapes that the graph states of its own tensors are those of other sizes.
    del model.graph.value_info[:]
    with tempfile.TemporaryDirectory(prefix="cellseg-graph-") as folder:
        path = Path(folder) / "folded.onnx"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _FATAL_ONLY
        # More would bring in operators of its own.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(path)
