"""The model bundle: a folder with a card and a file of weights, ``weights.safetensors`` or ``model.onnx``.

This module needs no torch, so that a run from a compiled artefact does not load it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.trainer.card import ONNX, SAFETENSORS, Card, Size, Tensor

CARD_FILE = "card.json"
WEIGHTS_FILES = {SAFETENSORS: "weights.safetensors", ONNX: "model.onnx"}
# The architecture of a bundle that works on downscaled images, which only `Bundle.downscaled` makes.
DOWNSCALED = "downscaled"


@dataclass(frozen=True)
class Bundle:
    """A card and its weights.

    Attributes:
        card: the card.
        weights: name -> array, as stored; {} for a graph.
        graph: the ONNX graph on disk; None for a network of ours.
        taken: outputs that are taken of a graph; None takes those of its decoder.
    """

    card: Card
    weights: dict[str, NDArray[Any]] = field(default_factory=dict)
    graph: Path | None = None
    taken: tuple[str, ...] | None = None

    @property
    def outputs(self) -> tuple[str, ...]:
        """Meaning of each logit that a backend gives, in order."""
        return self.card.output.channels if self.graph is None else self.taken or self.card.decoded

    def with_outputs(self, outputs: tuple[str, ...]) -> Bundle:
        """The model with some of its outputs alone; up to rounding, the same logits.

        A network of ours computes them in less time.  Every architecture ends in a convolution ``head``, which holds
        the weights of one output after the other's.
        """
        if outputs == self.outputs:
            return self
        if self.graph is not None:
            return replace(self, taken=outputs)
        kept = [self.outputs.index(output) for output in outputs]

        def cut(array: NDArray[Any]) -> NDArray[Any]:
            by_output = array.reshape(len(self.outputs), -1, *array.shape[1:])
            return by_output[kept].reshape(-1, *array.shape[1:])

        weights = {name: cut(array) if name.startswith("head.") else array for name, array in self.weights.items()}
        architecture = {**self.card.architecture, "outputs": len(outputs)}
        output = replace(self.card.output, tensors=(Tensor(outputs),))
        card = replace(self.card, architecture=architecture, output=output)
        return Bundle(card, weights)

    def downscaled(self, factor: int) -> Bundle:
        """The model that works on images downscaled by ``factor``; see `cellseg_batch.trainer.unet.Downscaled`.

        Its stride and margins are ``factor`` times as many px; interpolating its logits adds one px of the downscaled
        image to what it sees, for which the exact margin grows by one stride.
        """
        if factor == 1:
            return self
        card, reach = self.card, self.card.exact_margin
        size = Size(factor * card.input.size.min, factor * card.input.size.step)
        card = replace(
            card,
            architecture={"name": DOWNSCALED, "factor": factor, "inner": card.architecture},
            input=replace(card.input, size=size),
            output=replace(card.output, crop=factor * card.output.crop),
            total_stride=factor * card.total_stride,
            exact_margin=None if reach is None else factor * (reach + card.total_stride),
            margin=factor * card.margin,
            downscale={},
        )
        return replace(self, card=card, weights={f"inner.{name}": array for name, array in self.weights.items()})

    @cached_property  # for the manifest of every slide
    def sha256(self) -> str:
        """Hash of everything that decides the logits: weights, and what the card says of the network."""
        digest = hashlib.sha256()
        card = self.card
        decisive = {
            "architecture": card.architecture,
            "normalisation": asdict(card.input.normalisation),
            "layout": card.input.layout,
            "output": asdict(card.output),
            "outputs": self.outputs,
            "graph": card.weights_sha256 if self.graph is not None else "",
        }
        digest.update(json.dumps(decisive, sort_keys=True).encode())
        for name in sorted(self.weights):
            array = self.weights[name]
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def load_bundle(folder: Path) -> Bundle:
    """Read a bundle.

    Raises:
        FileNotFoundError: the card or the weights are missing.
        ValueError: the card or the weights file is damaged, or they do not belong together.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    card = Card.from_json((folder / CARD_FILE).read_text())
    path = folder / WEIGHTS_FILES[card.format]
    found = _sha256_of(path)
    if found != card.weights_sha256:
        raise ValueError(
            f"{path.name} is damaged, or of another model: its card expects the sha256 {card.weights_sha256[:12]}..., "
            f"it has {found[:12]}..."
        )
    if card.format == ONNX:
        return Bundle(card, graph=path)
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path.name} is damaged: {error}") from error
    return Bundle(card, weights)


def save_bundle(bundle: Bundle, folder: Path) -> None:
    """Write a bundle; floating point weights are stored as float16 where it holds them, a graph is copied."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / WEIGHTS_FILES[bundle.card.format]
    if bundle.graph is None:
        save_file({name: np.ascontiguousarray(_halved(array)) for name, array in bundle.weights.items()}, path)
    elif bundle.graph.resolve() != path.resolve():
        shutil.copyfile(bundle.graph, path)
    path.chmod(0o644)  # safetensors writes for its owner alone
    card = replace(bundle.card, weights_sha256=_sha256_of(path))
    (folder / CARD_FILE).write_text(card.to_json())


def _halved(array: NDArray[Any]) -> NDArray[Any]:
    """Floats as float16, or as they are if one is too large for it, such as the variance of strong features."""
    if array.dtype.kind != "f" or np.abs(array).max(initial=0) > np.finfo(np.float16).max:
        return array
    return array.astype(np.float16)


def _sha256_of(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
