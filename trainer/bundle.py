"""The model bundle: a folder with ``weights.safetensors`` and ``card.json``.

The card is all that the engine knows about a model.  This module needs no torch, so that a run from a
compiled artefact does not load it.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CARD_FILE = "card.json"
WEIGHTS_FILE = "weights.safetensors"
# The architecture of a bundle that works on downscaled images, which only `Bundle.downscaled` makes.
DOWNSCALED = "downscaled"
# Decoder -> meaning of the outputs that it takes, in the network's order.
DECODER_OUTPUTS = {
    "mask": ("foreground",),
    "seeds": ("foreground", "border", "distance"),
    "stardist": ("probability", "ray"),
}
# Its last output stands for any number of rays from three on.
_STARDIST = "stardist"


@dataclass(frozen=True)
class Normalisation:
    """How a slide's pixel values become the network's input; always ``clip((x - low) / (high - low), 0, 1)``.

    Attributes:
        rule: ``percentile`` takes low and high from the slide, ``fixed`` takes the card's own.
        low: percentile in [0, 100], or the pixel value that becomes 0.
        high: percentile in [0, 100], or the pixel value that becomes 1.
    """

    rule: str = "percentile"
    low: float = 0.1
    high: float = 99.9

    def __post_init__(self) -> None:
        if self.rule not in ("percentile", "fixed"):
            raise ValueError(f"normalisation is percentile or fixed, not {self.rule!r}")

    def bounds_of(self, pixels: NDArray[Any]) -> tuple[float, float]:
        """The pixel values that become 0 and 1, from a sample of the slide's finite pixels (any shape)."""
        if self.rule == "fixed" or pixels.size == 0:
            return (self.low, self.high) if self.rule == "fixed" else (0.0, 1.0)
        low, high = _percentiles(pixels, (self.low, self.high))
        if high <= low:  # a few bright pixels on a ground of one value
            low, high = pixels.min(), pixels.max()
        return float(low), float(high)


def _percentiles(pixels: NDArray[Any], percents: tuple[float, float]) -> list[float]:
    """`numpy.percentile` of pixels; those of 8 or 16 bits are counted, which takes a third of the time."""
    if pixels.dtype not in (np.uint8, np.uint16):
        return [float(value) for value in np.percentile(pixels, percents)]
    ends = np.bincount(pixels.ravel()).cumsum()
    values = []
    for percent in percents:
        position = (pixels.size - 1) * (percent / 100)
        below = math.floor(position)
        neighbours = np.searchsorted(ends, (below, min(below + 1, pixels.size - 1)), side="right")
        values.append(float(np.quantile(neighbours.astype(pixels.dtype), position - below)))
    return values


@dataclass(frozen=True)
class Instances:
    """How a model's logits become instances; in px of the image that the model is shown.

    The *seed map* is the probability of distance minus that of border, smoothed.  Its high parts are the seeds.

    Attributes:
        border_weight: how much of the border's probability is taken off the distance.
        smoothing: standard deviation of the Gaussian over the seed map.
        seed_level: of the seed map, above which a foreground pixel is a seed.
        border_level: of the seed map, at or below which seeds grow into a pixel last.
        smallest_seed: px; smaller seeds are no objects.
        growth: px by which seeds grow into the other foreground, and again into the border.
    """

    border_weight: float = 0.2
    smoothing: float = 1.1
    seed_level: float = 0.28
    border_level: float = -0.1
    smallest_seed: int = 15
    growth: int = 8


@dataclass(frozen=True)
class StarDist:
    """How a network for star-convex polygons is read; in px of the image that the model is shown.

    Attributes:
        overlap: pixels that two objects share, per pixel of the smaller one, above which only the better one survives;
            in [0, 1].
        longest_ray: px to which longer rays are cut.
    """

    overlap: float = 0.4
    longest_ray: int = 128

    def __post_init__(self) -> None:
        """Refuse numbers that no star can have.

        Raises:
            ValueError: a number is out of its range.
        """
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"stardist.overlap lies from 0 to 1, found {self.overlap}")
        if not 1 <= self.longest_ray <= 2048:
            raise ValueError(f"stardist.longest_ray lies from 1 to 2048 px, found {self.longest_ray}")


@dataclass(frozen=True)
class Card:
    """What a bundle says about its model.

    Attributes:
        name: the model's name.
        architecture: ``{"name": ..., **arguments}`` of `cellseg_batch.trainer.unet.build_network`.
        channels: input channels.
        outputs: meaning of each logit, in the network's order.
        decoder: how logits become masks and instances, a name in `DECODER_OUTPUTS`: ``mask`` makes an object of every
            component of the foreground, ``seeds`` tells touching objects apart by border and distance, ``stardist``
            takes star-convex polygons: an object's probability, and its rays in px of the image.
        total_stride: px; tiles, cores and margins are multiples of it.
        exact_margin: px of context beyond which nothing changes a pixel's logits.
        margin: px of context cut from each side of a tile by default.
        threshold: probability above which a pixel is foreground by default.
        pixel_size_um: µm per px that the model was trained at; None when the data do not record it.
        normalisation: how a slide's pixels become the input.
        downscale: factor -> width of objects in px of the image downscaled by it, from which on the model is shown
            that image; see `cellseg_batch.trainer.scale`. Empty: always the image as it is.
        instances: how logits become instances, by growth.
        stardist: how they do as star-convex polygons.
        training: data, licence, recipe.
        metrics: what it reached, on which data.
    """

    name: str
    architecture: dict[str, Any]
    channels: int
    outputs: tuple[str, ...]
    decoder: str
    total_stride: int
    exact_margin: int
    margin: int
    threshold: float
    pixel_size_um: float | None
    normalisation: Normalisation
    downscale: dict[str, float] = field(default_factory=dict)
    instances: Instances = field(default_factory=Instances)
    stardist: StarDist = field(default_factory=StarDist)
    training: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, text: str) -> Card:
        """Parse a card.

        Raises:
            ValueError: it is not JSON, a field is missing or unknown, or the outputs are not those of the decoder.
        """
        try:
            fields = json.loads(text)
            fields["outputs"] = tuple(fields["outputs"])
            fields["normalisation"] = Normalisation(**fields["normalisation"])
            fields["instances"] = Instances(**fields.get("instances", {}))
            fields["stardist"] = StarDist(**fields.get("stardist", {}))
            card = cls(**fields)
            _check_decoder(card)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a model card: {error}") from error
        return card


def _check_decoder(card: Card) -> None:
    """Raise ValueError if the card's decoder is unknown, or its outputs are not those that the decoder takes."""
    if card.decoder not in DECODER_OUTPUTS:
        raise ValueError(f"decoder: expected one of {', '.join(DECODER_OUTPUTS)}, found {card.decoder!r}")
    expected = DECODER_OUTPUTS[card.decoder]
    if card.decoder == _STARDIST:
        expected += expected[-1:] * max(2, len(card.outputs) - len(expected))
    if card.outputs != expected:
        raise ValueError(
            f"outputs: expected {', '.join(expected)} for the decoder {card.decoder}, found {', '.join(card.outputs)}"
        )


@dataclass(frozen=True)
class Bundle:
    """A card and its weights, name -> array, as stored (float16)."""

    card: Card
    weights: dict[str, NDArray[Any]]

    def with_outputs(self, outputs: tuple[str, ...]) -> Bundle:
        """The model with some of its outputs alone, which it computes in less time; up to rounding, the same logits.

        Every architecture ends in a convolution ``head``, which holds the weights of one output after the other's.
        """
        if outputs == self.card.outputs:
            return self
        kept = [self.card.outputs.index(output) for output in outputs]

        def cut(array: NDArray[Any]) -> NDArray[Any]:
            by_output = array.reshape(len(self.card.outputs), -1, *array.shape[1:])
            return by_output[kept].reshape(-1, *array.shape[1:])

        weights = {name: cut(array) if name.startswith("head.") else array for name, array in self.weights.items()}
        architecture = {**self.card.architecture, "outputs": len(outputs)}
        return Bundle(replace(self.card, architecture=architecture, outputs=outputs), weights)

    def downscaled(self, factor: int) -> Bundle:
        """The model that works on images downscaled by ``factor``; see `cellseg_batch.trainer.unet.Downscaled`.

        Its stride and margins are ``factor`` times as many px; interpolating its logits adds one px of the downscaled
        image to what it sees, for which the exact margin grows by one stride.
        """
        if factor == 1:
            return self
        card = replace(
            self.card,
            architecture={"name": DOWNSCALED, "factor": factor, "inner": self.card.architecture},
            total_stride=factor * self.card.total_stride,
            exact_margin=factor * (self.card.exact_margin + self.card.total_stride),
            margin=factor * self.card.margin,
            downscale={},
        )
        return Bundle(card, {f"inner.{name}": array for name, array in self.weights.items()})

    @cached_property  # for the manifest of every slide
    def sha256(self) -> str:
        """Hash of everything that decides the logits: architecture, normalisation and weights."""
        digest = hashlib.sha256()
        decisive = {"architecture": self.card.architecture, "normalisation": asdict(self.card.normalisation)}
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
        ValueError: the card or the weights file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    card = Card.from_json((folder / CARD_FILE).read_text())
    try:
        weights = load_file(folder / WEIGHTS_FILE)
    except SafetensorError as error:
        raise ValueError(f"{WEIGHTS_FILE} is damaged: {error}") from error
    return Bundle(card, weights)


def save_bundle(bundle: Bundle, folder: Path) -> None:
    """Write a bundle; floating point weights are stored as float16."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    halved = {
        name: np.ascontiguousarray(array.astype(np.float16) if array.dtype.kind == "f" else array)
        for name, array in bundle.weights.items()
    }
    save_file(halved, folder / WEIGHTS_FILE)
    (folder / WEIGHTS_FILE).chmod(0o644)  # the library writes for its owner alone
    (folder / CARD_FILE).write_text(json.dumps(asdict(bundle.card), indent=2) + "\n")
