"""A bundle's network as a file that other tools take: a ``torch.export`` program, or ONNX."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch

from cellseg_batch.trainer.bundle import Bundle
from cellseg_batch.trainer.unet import load_network

FORMATS = ("torch", "onnx")
LARGEST_BATCH = 64


def export_network(bundle: Bundle, kind: str, tile: int, out: Path) -> None:
    """Write the network to ``out``.

    Its input ``pixels`` is (N, C, tile, tile) float32 in [0, 1] with N from 1 to 64, its output ``logits``
    (N, K, tile, tile) float32; the card's ``outputs`` names the K logits in order.

    Args:
        bundle: the model.
        kind: ``torch`` (a ``.pt2`` of `torch.export.save`) or ``onnx``.
        tile: side in px, a multiple of the network's total stride.
        out: the file.

    Raises:
        ValueError: the tile does not fit the network, or there is no such format.
        OSError: the file cannot be written.
        ModuleNotFoundError: ONNX needs packages that are not installed.
    """
    if kind not in FORMATS:
        raise ValueError(f"`kind` is one of {', '.join(FORMATS)}, not {kind!r}")
    if tile < 1 or tile % bundle.card.total_stride:
        raise ValueError(f"`tile={tile}` is no multiple of the network's total stride of {bundle.card.total_stride} px")
    network = load_network(bundle)
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    # Of two, because an example of one would be taken for a constant.
    example = torch.zeros(2, bundle.card.input.count, tile, tile)
    program = torch.export.export(network, (example,), dynamic_shapes={"pixels": {0: batch}})
    if kind == "torch":
        with open(out, "wb") as stream:
            torch.export.save(program, stream)
        return
    # The exporter warns of its own internals and of torchvision, which no network of ours needs.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        onnx = torch.onnx.export(program, input_names=["pixels"], output_names=["logits"], verbose=False)
    if onnx is None:
        raise RuntimeError("torch.onnx.export gave no program")
    onnx.save(out)
