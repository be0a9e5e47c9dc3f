"""A bundle's network as a file that other tools take: a ``torch.export`` program, or ONNX."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from cellseg_batch.trainer.bundle import Bundle
from cellseg_batch.trainer.card import CARD_PROPERTY, ONNX, Card, Output, Tensor
from cellseg_batch.trainer.unet import load_network

Rewrite = Callable[[nn.Module], nn.Module]

FORMATS = ("torch", "onnx")
LARGEST_BATCH = 64
_LARGEST_SIDE = 1 << 16
_PIXELS, _LOGITS = "pixels", "logits"


def export_network(bundle: Bundle, kind: str, tile: int, out: Path, rewrite: Rewrite = lambda network: network) -> None:
    """Write the network to ``out``.

    Its input ``pixels`` is (N, C, tile, tile) float32 in [0, 1] with N from 1 to 64, its output ``logits``
    (N, K, tile, tile) float32; the card's ``output`` names the K logits in order.  ONNX takes sides of any whole
    strides, and holds the card, so that ``import-model`` needs no other.

    Args:
        bundle: the model.
        kind: ``torch`` (a ``.pt2`` of `torch.export.save`) or ``onnx``.
        tile: side in px, a multiple of the network's total stride.
        out: the file.
        rewrite: makes a network that computes the same; by default the network stays as it is.

    Raises:
        ValueError: the tile does not fit the network, or there is no such format.
        OSError: the file cannot be written.
        ModuleNotFoundError: ONNX needs packages that are not installed.
    """
    if kind not in FORMATS:
        raise ValueError(f"`kind` is one of {', '.join(FORMATS)}, not {kind!r}")
    if tile < 1 or tile % bundle.card.total_stride:
        raise ValueError(f"`tile={tile}` is no multiple of the network's total stride of {bundle.card.total_stride} px")
    if bundle.graph is not None:
        raise ValueError(f"{bundle.card.name} is a graph already; take {bundle.graph}")
    network = rewrite(load_network(bundle))
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    # Of two, because an example of one would be taken for a constant.
    example = torch.zeros(2, bundle.card.input.count, tile, tile)
    stride = bundle.card.total_stride
    height, width = (
        stride * torch.export.Dim(side, min=1, max=_LARGEST_SIDE // stride) for side in ("rows", "columns")
    )
    dynamic = {0: batch} if kind == "torch" else {0: batch, 2: height, 3: width}
    program = torch.export.export(network, (example,), dynamic_shapes={_PIXELS: dynamic})
    if kind == "torch":
        with open(out, "wb") as stream:
            torch.export.save(program, stream)
        return
    import onnx

    # The exporter warns of its own internals and of torchvision, which no network of ours needs.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        exported = torch.onnx.export(program, input_names=[_PIXELS], output_names=[_LOGITS], verbose=False)
    if exported is None:
        raise RuntimeError("torch.onnx.export gave no program")
    model = exported.model_proto
    onnx.helper.set_model_props(model, {CARD_PROPERTY: _card_of_graph(bundle.card).to_json()})
    onnx.save(model, out)


def _card_of_graph(card: Card) -> Card:
    """The card of the same model as a graph."""
    output = Output((Tensor(card.output.channels, _LOGITS),))
    return replace(card, format=ONNX, architecture={}, output=output, weights_sha256="")
