"""Hold the values that a graph gives for real tiles against what its card says they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.inference.backends.gate import tiles_for
from cellseg_batch.engine.inference.backends.onnxruntime_cpu import run_graph
from cellseg_batch.trainer.bundle import Bundle
from cellseg_batch.trainer.card import BACKGROUND, RAY, Size, Tensor

_TILES = 3
# Deviation of the noise, far above that of images, so that logits of networks that are hardly trained are spread too.
_LOUD = 10
# What float16 and the sum of many probabilities may be off.
_NEAR = 1e-2
# Maps of HoVer-Net may lie from 0 to 1 as well as from -1 to 1.
_MAPS = ("horizontal", "vertical")


def check_values(bundle: Bundle, side: int, threads: int) -> tuple[str, ...]:
    """Check what a graph gives for real tiles, and for noise, which networks answer with more than a few values.

    Args:
        bundle: a bundle with a graph.
        side: side in px of the tiles.
        threads: threads of ONNX Runtime.

    Returns:
        Names of the tensors that are logits by the card, whose values are all probabilities.

    Raises:
        ValueError: the graph gives NaN for a real tile, or no probabilities where the card names an activation.
    """
    assert bundle.graph is not None
    card, graph = bundle.card, bundle.graph.read_bytes()
    tiles = tiles_for("gate", replace(card, input=replace(card.input, size=Size(side, 0))))
    tiles = tiles[:: -(-len(tiles) // _TILES)]
    noise = np.random.default_rng(0).normal(0, _LOUD, tiles[:1].shape).astype(np.float32)
    given = [run_graph(graph, pixels[None], threads, card.input.layout) for pixels in (*tiles, *noise)]
    unlike_logits = []
    for tensor in card.output.tensors:
        images = [one[tensor.name] for one in given]
        defined = [not np.isnan(image).any() for image in images]
        if undefined := len(tiles) - sum(defined[: len(tiles)]):
            raise ValueError(
                f"{tensor.name}: NaN for {undefined} of {len(tiles)} real tiles, by its weights or by a normalisation "
                "that it was not trained with"
            )
        values = np.stack([image[0] for image, usable in zip(images, defined, strict=True) if usable]).astype(
            np.float32
        )
        if tensor.activation != "none":
            _demand_probabilities(tensor, values)
        elif _are_probabilities(tensor, values):
            unlike_logits.append(tensor.name)
    return tuple(unlike_logits)


def _of_channels(tensor: Tensor, values: NDArray[Any], but: tuple[str, ...]) -> NDArray[Any]:
    """The values (N, K, h, w) of all channels but those whose meaning begins so."""
    return values[:, [number for number, channel in enumerate(tensor.channels) if not channel.startswith(but)]]


def _are_probabilities(tensor: Tensor, values: NDArray[Any]) -> bool:
    """Whether values (N, K, h, w) lie from 0 to 1 and, with a background among them, add up to 1.

    Those of a network that is always of one mind say nothing.
    """
    values = _of_channels(tensor, values, but=(RAY, *_MAPS))
    within = bool(values.size) and 0 <= values.min() < values.max() <= 1
    return within and (BACKGROUND not in tensor.channels or _add_up(values))


def _add_up(values: NDArray[Any]) -> bool:
    """Whether values (N, K, h, w) add up to 1 over the channels."""
    return bool(np.abs(values.sum(axis=1) - 1).max() <= _NEAR)


def _demand_probabilities(tensor: Tensor, values: NDArray[Any]) -> None:
    """Refuse values (N, K, h, w) that the activation of the card does not make; raises ValueError."""
    values = _of_channels(tensor, values, but=(RAY,))
    low, high = (float(end) for end in (values.min(), values.max()))
    if low < -_NEAR or high > 1 + _NEAR:
        raise ValueError(
            f"output.activation: {tensor.activation} gives values from 0 to 1, {tensor.name} has some from {low:.3g} "
            f"to {high:.3g}"
        )
    if tensor.activation == "softmax" and not _add_up(values):
        raise ValueError(
            f"output.activation: softmax gives values that add up to 1 over the channels, those of {tensor.name} do "
            "not; say sigmoid for probabilities of their own"
        )
