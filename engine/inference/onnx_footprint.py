"""Strides and exact margin of any graph, found by changing a column or a row of its input.

The outputs that change are those that see it.  Two networks are asked, and the wider answer counts: the graph itself on
noise, and the same graph with means instead of its weights on an empty image.  There nothing cancels, and what is seen
faintly is not rounded away.  The graph is also run on a shifted image: where its result is not the shifted one, a
pixel's logits depend on where it lies in the tile, and no margin is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from cellseg_batch.engine.inference.backends.onnx_graph import plain_graph
from cellseg_batch.engine.inference.backends.onnxruntime_cpu import OnnxRuntimeBackend
from cellseg_batch.trainer.bundle import Bundle
from cellseg_batch.trainer.card import Card
from cellseg_batch.trainer.receptive_field import Footprint, footprint_of

_LARGEST_STRIDE = 64
# Stride of most networks; that of one whose pixels see the whole tile cannot be seen.
_USUAL_STRIDE = 32
_SPANS = (512, 1024, 2048)
_ACROSS = 64
# Change of the noise, which lies in [0, 1], and of the empty image, which each layer makes a mean of.
_CHANGE, _LARGE_CHANGE = 100.0, 1e20
_SAME = 1e-4
# Bands of columns that are changed to see how coarse an output is, and the share of the largest answer that is none.
_BANDS, _FAINT = 9, 1e-3

Pixels = NDArray[np.float32]
Model = Callable[[Pixels], NDArray[np.float32]]
"""Function (N, C, H, W) -> (N, K, H, W)."""


def measure_footprint(bundle: Bundle, threads: int) -> Footprint:
    """Measure the footprint of a bundle's graph along both axes.

    Args:
        bundle: a bundle whose graph takes tiles of several sizes.
        threads: threads of ONNX Runtime.
    """
    graph, card = plain_graph(bundle), bundle.card
    # Sides of what is asked are multiples of it: of any stride up to the largest, and of what the card says.
    unit = math.lcm(_LARGEST_STRIDE, card.input.size.step)
    stride = _coarsest(graph, card.input.count, unit)
    if stride is None:
        return Footprint(_USUAL_STRIDE, None, "the network sees the whole tile")
    stride = math.lcm(stride, card.output.stride)
    across = _whole(2 * card.output.crop + max(_ACROSS, card.input.size.min), unit)
    model, means = (_Probe(serialised, threads, card.grid) for serialised in (graph, _with_means(graph)))
    margin = 0
    for axis in (_as_it_is, _turned):
        along = _margin_along_x(axis(model), axis(means), card, across, stride, unit)
        if along is None:
            return Footprint(_USUAL_STRIDE, None, "the network sees the whole tile")
        margin = max(margin, along)
    if not _shifts(model, card.input.count, stride, margin + card.output.crop, unit):
        return Footprint(_USUAL_STRIDE, None, "a pixel's logits depend on where in the tile it lies")
    return Footprint(stride, margin)


def measure_output_stride(bundle: Bundle, side: int, given: int, threads: int) -> int | None:
    """Measure how many px of the input each value of the output stands for.

    A smaller output may be coarser than its input, or cropped, or both.  Bands of columns are changed all over its
    tile: of answers that begin or end inside the output, the ends lie as far apart as their bands by the stride.

    Args:
        bundle: a bundle whose card says nothing of crop and stride yet.
        side: side in px of a tile.
        given: values along a side of what the graph gives for it.
        threads: threads of ONNX Runtime.

    Returns:
        The stride; None if as much cannot be cut from each side of the tile whatever the stride.
    """
    strides = [stride for stride in range(1, side // given + 1) if (side - stride * given) % 2 == 0]
    if len(strides) < 2:
        return strides[0] if strides else None
    graph, pixels = plain_graph(bundle), np.zeros((1, bundle.card.input.count, side, side), np.float32)
    bands = np.linspace(0, side - strides[-1], _BANDS).astype(int)
    for serialised in (_with_means(graph), graph):
        model, answers = _Probe(serialised, threads, 1), []
        nothing = model(pixels)
        for band in bands:
            changed = pixels.copy()
            changed[..., band : band + strides[-1]] = 1
            answers.append(np.abs(model(changed) - nothing).sum((0, 1, 2), dtype=np.float64))
        spreads = [_spread_of_ends(np.stack(answers), bands / stride) for stride in strides]
        if math.isfinite(min(spreads)):
            return strides[int(np.argmin(spreads))]
    return strides[0] if side % given else side // given


def _spread_of_ends(answers: NDArray[np.float64], places: NDArray[np.float64]) -> float:
    """How differently far the ends of answers (B, W) lie from the places (B,) in them that were changed.

    Infinite if there are no two ends inside.
    """
    if answers.min() > 0:  # what is seen everywhere says no place
        answers = answers - np.median(answers, axis=1, keepdims=True)
    seen = answers > _FAINT * answers.max()
    firsts, lasts = seen.argmax(axis=1), seen.shape[1] - 1 - seen[:, ::-1].argmax(axis=1)
    spreads = []
    for ends, inside in ((firsts, firsts > 0), (lasts, lasts < seen.shape[1] - 1)):
        apart = (ends - places)[inside & seen.any(axis=1)]
        spreads += [float(np.ptp(apart))] if len(apart) > 1 else []
    return max(spreads, default=math.inf)


class _Probe:
    """A serialised plain graph, ready to run; logits that lie ``grid`` px apart are repeated."""

    def __init__(self, serialised: bytes, threads: int, grid: int) -> None:
        self._grid = grid
        self._run = OnnxRuntimeBackend(serialised, threads).compile((1, 1, 1, 1))

    def __call__(self, pixels: Pixels) -> NDArray[np.float32]:
        return self._run(np.ascontiguousarray(pixels)).repeat(self._grid, axis=2).repeat(self._grid, axis=3)


def _as_it_is(model: Model) -> Model:
    return model


def _turned(model: Model) -> Model:
    return lambda pixels: model(pixels.swapaxes(2, 3)).swapaxes(2, 3)


def _whole(side: int, unit: int) -> int:
    """A side in px rounded up to multiples of ``unit``."""
    return -(-side // unit) * unit


def _coarsest(graph: bytes, channels: int, unit: int) -> int | None:
    """Px of the input that one pixel of the coarsest features stands for; None above 64, as of means of all pixels."""
    side = 16 * unit
    model = onnx.load_model_from_string(graph)
    for axis, length in zip(model.graph.input[0].type.tensor_type.shape.dim, (1, channels, side, side), strict=True):
        axis.dim_value = length
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = [[axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in inferred.value_info]
    # Channels last or first: the two axes of an image are next to each other and equally long.
    pairs = [pair for shape in shapes if len(shape) == 4 for pair in ((shape[2], shape[3]), (shape[1], shape[2]))]
    sides = [high for high, wide in pairs if 0 < high == wide and side % high == 0]
    stride = side // min(sides, default=side)
    return stride if stride <= _LARGEST_STRIDE else None


def _with_means(graph: bytes) -> bytes:
    """The same graph with layers that take means, without biases."""
    model = onnx.load_model_from_string(graph)
    initial = {value.name: value for value in model.graph.initializer}

    def put(name: str, value: float) -> None:
        if name in initial:
            old = numpy_helper.to_array(initial[name])
            initial[name].CopyFrom(numpy_helper.from_array(np.full_like(old, value), name))

    for node in model.graph.node:
        if node.op_type in ("Conv", "ConvTranspose") and node.input[1] in initial:
            shape = initial[node.input[1]].dims
            inputs = shape[0] if node.op_type == "ConvTranspose" else np.prod(shape[1:])
            put(node.input[1], 1 / float(inputs))
            for bias in node.input[2:]:
                put(bias, 0.0)
        elif node.op_type == "BatchNormalization":
            for name, value in zip(node.input[1:], (1.0, 0.0, 0.0, 1.0), strict=True):
                put(name, value)
    serialised: bytes = model.SerializeToString()
    return serialised


def _margin_along_x(model: Model, means: Model, card: Card, across: int, stride: int, unit: int) -> int | None:
    """The exact margin in px along x; None if some column is seen as far as any image was wide.

    Args:
        model: the network.
        means: the network that takes means.
        card: the network's card.
        across: height of the images in px.
        stride: the total stride in px.
        unit: px of which the images' sides are multiples.
    """
    channels, crop = card.input.count, card.output.crop
    for span in (_whole(span, unit) for span in _SPANS):
        noise = np.random.default_rng(0).random((1, channels, across, span), np.float32)
        asked = _Asked(model, noise, _CHANGE), _Asked(means, np.zeros_like(noise), _LARGE_CHANGE)
        middle, least = span // 2, crop + _LARGEST_STRIDE
        before, after = _seen_by(asked, middle)
        if middle + before > least and middle + after < span - least:
            return footprint_of([_seen_by(asked, middle + place) for place in range(stride)]).exact_margin
    return None


def _seen_by(asked: tuple[_Asked, ...], column: int) -> tuple[int, int]:
    """Px from an input column to the first and to the last output column that sees it in any network."""
    hit = np.flatnonzero(np.logical_or.reduce([one.changes(column) for one in asked]))
    # An output that nothing changes, as of a saturated network, sees its own column.
    return (int(hit[0]) - column, int(hit[-1]) - column) if hit.size else (0, 0)


class _Asked:
    """A network and an image, of which one column after the other is changed by a number."""

    def __init__(self, model: Model, pixels: Pixels, change: float) -> None:
        self._model, self._pixels, self._change = model, pixels, np.float32(change)
        self._before = model(pixels)

    def changes(self, column: int) -> NDArray[np.bool_]:
        """Whether each output column (W,) changes with an input column."""
        pixels = self._pixels.copy()
        pixels[..., column] += self._change
        changed: NDArray[np.bool_] = (self._model(pixels) != self._before).any(axis=(0, 1, 2))
        return changed


def _shifts(model: Model, channels: int, stride: int, margin: int, unit: int) -> bool:
    """Whether the result of an image shifted by one stride is the shifted result, ``margin`` px from its edges."""
    side = _whole(2 * margin + 2 * _ACROSS, unit)
    image = np.random.default_rng(1).random((1, channels, side + stride, side + stride), np.float32)
    first, second = (model(image[..., start : start + side, start : start + side]) for start in (0, stride))
    later, earlier = slice(margin + stride, side - margin), slice(margin, side - margin - stride)
    expected, found = first[..., later, later], second[..., earlier, earlier]
    scale = max(1.0, float(np.abs(expected).max()))
    return bool(np.abs(expected - found).max() <= _SAME * scale)
