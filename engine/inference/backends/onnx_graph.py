"""Make any ONNX graph a plain one: pixels (N, C, H, W) float32 in, logits (N, K, H, W) float32 out, of one size.

What a card says that differs is undone here and nowhere else, with operators of ONNX around the graph: channels last,
half precision, an output that is cropped or coarser than its input, an activation that was applied already, outputs
in several tensors or in another order, and images that are shown downscaled.  So a backend knows none of it.  For
backends in float16, the graph itself, pixels and logits are in float16; what is added behind the graph is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from cellseg_batch.engine.errors import ModelError
from cellseg_batch.engine.inference.backends.onnx_half import constants_of, in_half
from cellseg_batch.engine.inference.backends.protocol import Shape
from cellseg_batch.trainer.bundle import Bundle
from cellseg_batch.trainer.card import BACKGROUND, RAY, Card, Tensor

# No name in a graph begins so.
_OURS = "cellseg/"
PIXELS, LOGITS = f"{_OURS}pixels", f"{_OURS}logits"
# Probabilities are taken for at least this and at most 1 - this, so that their logits are finite.
_SURE = 1e-6
# Logit of what never is; float16 has it too.
_NEVER = -1e4
_TO_CHANNELS_LAST, _TO_CHANNELS_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]


def plain_graph(bundle: Bundle, half: Shape | None = None) -> bytes:
    """Return the plain graph of a bundle, serialised.

    A tensor with a channel for background is one of a softmax, whose logit is log(p / (1 - p)), but of classes log(p).
    The border that a cropped output lacks is filled with logits of 0; margins are at least as wide.  An output with a
    stride is repeated to the size of its input, but for rays (`Card.grid`).

    Args:
        bundle: a bundle with a graph whose card was checked against it.
        half: shape (N, C, H, W) of every batch, for a graph in float16; None for one in float32 of any shape.

    Raises:
        ModelError: see `load_graph`.
    """
    model, card = load_graph(bundle), bundle.card
    factor = int(card.architecture.get("factor", 1))
    # Shapes that the graph states of its own tensors are those of other sizes.
    del model.graph.value_info[:]
    if half is not None:
        (source,) = inputs_of(model.graph)
        for axis, length in zip(source.type.tensor_type.shape.dim, _own_shape(card, half, factor), strict=True):
            axis.dim_value = length
        model = in_half(model)
    graph, kind = _Graph(model), TensorProto.FLOAT if half is None else TensorProto.FLOAT16
    (source,) = inputs_of(model.graph)
    with graph.in_front():
        pixels = PIXELS
        if factor > 1:
            pixels = graph.add("AveragePool", pixels, kernel_shape=[factor, factor], strides=[factor, factor])
        if card.input.layout == "NHWC":
            pixels = graph.add("Transpose", pixels, perm=_TO_CHANNELS_LAST)
        graph.add("Cast", pixels, to=source.type.tensor_type.elem_type, gives=source.name)
    parts = [_logits_of(graph, tensor, card.input.layout, card.decoder) for tensor in card.output.tensors]
    channels = list(card.output.channels)
    if BACKGROUND in bundle.outputs and BACKGROUND not in channels:
        # Classes that do not exclude each other: where none has even odds, the logit of 0 of the background wins.
        first = graph.add("Gather", parts[0], np.array([0], np.int64), axis=1)
        odds = np.array(_NEVER if card.exclusive else 0, np.float32)
        parts.append(graph.add("Add", graph.add("Mul", first, np.array(0, np.float32)), odds))
        channels.append(BACKGROUND)
    logits = graph.add("Concat", *parts, axis=1) if len(parts) > 1 else parts[0]
    order = [channels.index(output) for output in bundle.outputs]
    if order != list(range(len(channels))):
        logits = graph.add("Gather", logits, np.array(order, np.int64), axis=1)
    if (repeats := card.output.stride // card.grid) > 1:
        logits = _enlarged(graph, logits, repeats, mode="nearest", nearest_mode="floor", at="asymmetric")
    if border := card.output.crop // factor:
        logits = graph.add("Pad", logits, np.array([0, 0, border, border] * 2, np.int64), mode="constant")
    if factor > 1:
        logits = _enlarged(graph, logits, factor, mode="linear", at="half_pixel")
    graph.add("Cast", logits, to=kind, gives=LOGITS)
    size = [card.input.size.fixed, card.input.size.fixed] if card.input.size.fixed else ["height", "width"]
    taken = half or (card.input.batch or "batch", card.input.count, *size)
    for values, name, shape in (
        (model.graph.input, PIXELS, taken),
        (model.graph.output, LOGITS, (taken[0], len(bundle.outputs), None, None)),
    ):
        del values[:]
        values.append(helper.make_tensor_value_info(name, kind, shape))
    model.ir_version = max(model.ir_version, 4)  # since then initial values are no inputs
    serialised: bytes = model.SerializeToString()
    return serialised


def load_graph(bundle: Bundle) -> onnx.ModelProto:
    """Return the graph of a bundle that has one, as its file has it.

    Raises:
        ModelError: its weights lie in other files, which backends would look for in the current folder.
    """
    assert bundle.graph is not None
    model = onnx.load(bundle.graph, load_external_data=False)
    if any(tensor.data_location == TensorProto.EXTERNAL for tensor in constants_of(model)):
        raise ModelError(
            str(bundle.graph),
            expected="a graph that holds its weights",
            found="weights in another file",
            cause="a bundle made by hand",
            remedy="make it with cellseg-batch import-model, which takes them in",
        )
    return model


def count_weights(bundle: Bundle) -> int:
    """Return how many numbers the constants of a bundle's graph hold."""
    return sum(math.prod(tensor.dims) for tensor in constants_of(load_graph(bundle)))


def inputs_of(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """Return the inputs of a graph that have no initial value."""
    initial = {value.name for value in graph.initializer}
    return [value for value in graph.input if value.name not in initial]


def _own_shape(card: Card, shape: Shape, factor: int) -> tuple[int, int, int, int]:
    """The shape of the graph's own input for pixels of ``shape`` (N, C, H, W)."""
    count, channels, height, width = shape[0], shape[1], shape[2] // factor, shape[3] // factor
    return (count, height, width, channels) if card.input.layout == "NHWC" else (count, channels, height, width)


def _logits_of(graph: _Graph, tensor: Tensor, layout: str, decoder: str) -> str:
    """Name of a tensor's logits, (N, K, h, w) float32.

    Classes are compared with each other, so that theirs need no common scale: what a softmax takes is as good.
    """
    exclusive = (tensor.activation == "softmax" or BACKGROUND in tensor.channels) and decoder != "classes"
    # Taking the activation's own input loses nothing; what was rounded to 1 could not be told apart.
    applied = {"sigmoid": "Sigmoid", "softmax": "Softmax"}.get(tensor.activation)
    before = graph.input_of(tensor.name, applied) if applied else None
    undone = tensor.activation == "none" or (before is not None and (not exclusive or len(tensor.channels) == 2))
    values = graph.add("Cast", before if before is not None and undone else tensor.name, to=TensorProto.FLOAT)
    if layout == "NHWC":
        values = graph.add("Transpose", values, perm=_TO_CHANNELS_FIRST)
    if not undone and decoder == "classes" and tensor.activation == "softmax":
        return graph.add("Log", graph.add("Clip", values, np.array(_SURE, np.float32)))
    if not undone:
        rays = [number for number, channel in enumerate(tensor.channels) if channel.startswith(RAY)]
        if not rays:
            return _log_odds(graph, values)
        # The activation is that of the other channels.
        kept, others = np.array(rays, np.int64), np.setdiff1d(np.arange(len(tensor.channels)), rays)
        odds = _log_odds(graph, graph.add("Gather", values, others, axis=1))
        parted = graph.add("Concat", odds, graph.add("Gather", values, kept, axis=1), axis=1)
        return graph.add("Gather", parted, np.argsort(np.append(others, kept)), axis=1)
    if not exclusive:
        return values
    if len(tensor.channels) == 2:
        return graph.add("Sub", values, graph.add("Gather", values, np.array([1, 0], np.int64), axis=1))
    return _log_odds(graph, graph.add("Softmax", values, axis=1))


def _log_odds(graph: _Graph, probability: str) -> str:
    bounds = np.array(_SURE, np.float32), np.array(1 - _SURE, np.float32)
    sure = graph.add("Clip", probability, *bounds)
    return graph.add("Log", graph.add("Div", sure, graph.add("Sub", np.array(1, np.float32), sure)))


def _enlarged(graph: _Graph, values: str, factor: int, at: str, **options: str) -> str:
    scales = np.array([1, 1, factor, factor], np.float32)
    return graph.add("Resize", values, np.zeros(0, np.float32), scales, coordinate_transformation_mode=at, **options)


class _Graph:
    """A graph to which operators are added, in front of its own or behind them."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._graph = model.graph
        self._made_by = {output: node for node in model.graph.node for output in node.output}
        self._front: int | None = None
        self._count = 0

    @contextmanager
    def in_front(self) -> Iterator[None]:
        """Add operators in front of the graph's own in the context."""
        self._front = 0
        yield
        self._front = None

    def input_of(self, name: str, operator: str) -> str | None:
        """Name of what ``operator`` makes the tensor ``name`` of; None if another operator makes it."""
        node = self._made_by.get(name)
        return node.input[0] if node is not None and node.op_type == operator else None

    def add(self, operator: str, *inputs: str | NDArray[np.generic], gives: str = "", **options: Any) -> str:
        """Add an operator on tensors and constants, and return the name of its result, ``gives`` or a new one."""
        self._count += 1
        result = gives or f"{_OURS}{operator.lower()}_{self._count}"
        names = [value if isinstance(value, str) else self._constant(value) for value in inputs]
        node = helper.make_node(operator, names, [result], **options)
        if self._front is None:
            self._graph.node.append(node)
        else:
            self._graph.node.insert(self._front, node)
            self._front += 1
        return result

    def _constant(self, value: NDArray[np.generic]) -> str:
        self._count += 1
        name = f"{_OURS}constant_{self._count}"
        self._graph.initializer.append(numpy_helper.from_array(value, name))
        return name
