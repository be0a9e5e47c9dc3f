"""The model card: all that the engine knows about a model.

A card is data: dataclasses of plain values, read and written as JSON.  Which library runs the model is not in it.
"""

from __future__ import annotations

import colorsys
import json
import math
import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

VERSION = 2
SAFETENSORS, ONNX = FORMATS = ("safetensors", "onnx")
# Name of the card among the remarks in an ONNX file of ours.
CARD_PROPERTY = "cellseg_batch.card"
LAYOUTS = ("NCHW", "NHWC")
KINDS = ("percentile", "zscore", "fixed", "linear")
ACTIVATIONS = ("none", "sigmoid", "softmax")
# Output beside those of the classes; a graph that gives each class a probability of its own has none.
BACKGROUND = "background"
# Decoder -> meaning of the outputs that it takes, in its order; classes takes those of the card's classes too.
DECODER_OUTPUTS: dict[str, tuple[str, ...]] = {
    "mask": ("foreground",),
    "seeds": ("foreground", "border", "distance"),
    "classes": (BACKGROUND,),
    "hover": ("foreground", "horizontal", "vertical"),
    "stardist": ("probability", "rays"),
}
# Meaning of the first output of a class map if it says that a pixel is of no class.
NO_CLASS = "no class"
_MOST_CLASSES = 255
# An output of this meaning stands for "ray 1", "ray 2" and so on, as many as a network has.
RAYS, RAY = "rays", "ray "
# Role of an input channel -> channels of the network's input that it stands for.
_CHANNELS_OF = {"rgb": 3}


@dataclass(frozen=True)
class Normalisation:
    """How a slide's pixel values become the network's input: ``(x - low) / (high - low)``, channel by channel.

    What a slide is asked for is asked once for the whole slide, never per tile.

    Attributes:
        kind: where low and high come from: ``percentile`` takes two percentiles of the slide, ``zscore`` its mean and
            its mean plus one standard deviation, ``fixed`` and ``linear`` the card's own pixel values.
        low: percentile in [0, 100], or the pixel value that becomes 0; one for all channels or one for each.
        high: percentile in [0, 100], or the pixel value that becomes 1; as low.
        joint: whether the slide's channels are taken together, or each for itself.
        clip: whether the result is clipped to [0, 1]; never for ``zscore`` and ``linear``.
        per_tile: whether the model was trained on inputs that were each normalised for themselves.
    """

    kind: str = "percentile"
    low: tuple[float, ...] = (0.1,)
    high: tuple[float, ...] = (99.9,)
    joint: bool = True
    clip: bool = True
    per_tile: bool = False

    def __post_init__(self) -> None:
        """Refuse what is no rule.

        Raises:
            ValueError: the kind is unknown, or the other values do not go with it.
        """
        _demand_one_of("normalisation", self.kind, KINDS)
        if self.kind in ("zscore", "linear") and self.clip:
            raise ValueError(f"normalisation {self.kind} has clip = false; fixed and percentile may clip")
        if len(self.low) != len(self.high) or not self.low:
            raise ValueError(f"normalisation: low has {len(self.low)} numbers, high {len(self.high)}")
        if not all(math.isfinite(number) for number in (*self.low, *self.high)):
            raise ValueError(f"normalisation: expected finite numbers, found low {self.low} and high {self.high}")
        if self.kind != "zscore" and not all(low < high for low, high in zip(self.low, self.high, strict=True)):
            raise ValueError(f"normalisation: low {self.low} is not below high {self.high}")
        if self.kind == "percentile" and not (min(self.low) >= 0 and max(self.high) <= 100):
            raise ValueError(f"normalisation: percentiles lie from 0 to 100, found {self.low} and {self.high}")

    @property
    def asks_slide(self) -> bool:
        """Whether the bounds depend on the slide's pixels."""
        return self.kind in ("percentile", "zscore")

    def bounds_of(self, pixels: NDArray[Any], channel: int = 0) -> tuple[float, float]:
        """Return the pixel values that become 0 and 1, from a sample of the slide's finite pixels.

        Args:
            pixels: sample of one channel, or of all of them if they are taken together; any shape.
            channel: index of the channel among the model's.
        """
        number = channel if len(self.low) > 1 else 0
        low, high = self.low[number], self.high[number]
        if not self.asks_slide:
            return low, high
        if pixels.size == 0:
            return 0.0, 1.0
        if self.kind == "zscore":
            mean = float(pixels.mean(dtype=np.float64))
            return mean, mean + float(pixels.std(dtype=np.float64))
        at_low, at_high = _percentiles(pixels, (low, high))
        if at_high <= at_low:  # a few bright pixels on a ground of one value
            return float(pixels.min()), float(pixels.max())
        return at_low, at_high


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
class Size:
    """Sides in px that the network takes.

    Attributes:
        min: the smallest side.
        step: larger sides are longer by multiples of it; 0 for a network that takes no other side.
    """

    min: int
    step: int

    def __post_init__(self) -> None:
        """Refuse sides that no tile has; raises ValueError."""
        if self.min < 1 or self.step < 0:
            raise ValueError(
                f"size: expected a smallest side of 1 px or more and steps of 0 px or more, found {self.min} and "
                f"{self.step}"
            )

    @property
    def fixed(self) -> int | None:
        """The only side in px that the network takes; None if it takes several."""
        return None if self.step else self.min

    def below(self, side: int, stride: int) -> int:
        """Return the largest side in px up to ``side`` that the network takes in whole strides, or its smallest."""
        return self.min if self.fixed else max(self.min, side // stride * stride)


def count_channels(roles: tuple[str, ...]) -> int:
    """Number of channels of a network's input that these roles stand for."""
    return sum(_CHANNELS_OF.get(role, 1) for role in roles)


@dataclass(frozen=True)
class Input:
    """What the network takes.

    Attributes:
        channels: role of each channel: ``rgb`` for three channels of light, ``grey`` for any single one, or the name of
            a stain such as ``nuclei`` or ``membrane``.
        normalisation: how a slide's pixels become the input.
        size: height and width in px.
        pixel_size_um: µm per px that the model was trained at; None when the data do not record it.
        layout: axes of the graph's input, NCHW or NHWC.
        batch: the only batch that the graph takes; None if it takes any.
    """

    channels: tuple[str, ...]
    normalisation: Normalisation
    size: Size
    pixel_size_um: float | None = None
    layout: str = "NCHW"
    batch: int | None = None

    def __post_init__(self) -> None:
        """Refuse roles and numbers that cannot be.

        Raises:
            ValueError: there are none, one is named twice or as no `channel` can name it, or numbers are out of their
                range or do not fit their number.
        """
        _demand_one_of("input.layout", self.layout, LAYOUTS)
        if not self.channels or len(set(self.channels)) < len(self.channels) or not all(self.channels):
            raise ValueError(f"input.channels: expected one name for each channel, found {list(self.channels)}")
        if len(self.channels) > 1 and {"rgb", "grey"} & set(self.channels):
            raise ValueError(f"input.channels: rgb and grey stand alone, found {list(self.channels)}")
        if {",", "="} & set("".join(self.channels)):  # they divide the roles in `channel`
            raise ValueError(f"input.channels: expected names without , and =, found {list(self.channels)}")
        if self.pixel_size_um is not None and not 0 < self.pixel_size_um < math.inf:
            raise ValueError(f"input.pixel_size_um: expected µm per px above 0, found {self.pixel_size_um}")
        if len(self.normalisation.low) not in (1, self.count):
            raise ValueError(f"normalisation: {len(self.normalisation.low)} numbers for {self.count} channels")

    @property
    def count(self) -> int:
        """Number of channels of the network's input."""
        return count_channels(self.channels)


@dataclass(frozen=True)
class Tensor:
    """One tensor that the network gives.

    Attributes:
        channels: meaning of each of its channels, in order.
        name: its name in the graph; "" for a network of ours, which gives one.
        activation: activation that its values have passed already: none (they are logits), sigmoid or softmax.
    """

    channels: tuple[str, ...]
    name: str = ""
    activation: str = "none"

    def __post_init__(self) -> None:
        """Refuse an unknown activation; raises ValueError."""
        _demand_one_of("output.activation", self.activation, ACTIVATIONS)


@dataclass(frozen=True)
class Output:
    """What the network gives.

    Attributes:
        tensors: its tensors, in the decoder's order.
        crop: px on each side of the input for which it gives nothing.
        stride: px of the input, along y and x, for each of its values.
    """

    tensors: tuple[Tensor, ...]
    crop: int = 0
    stride: int = 1

    @property
    def channels(self) -> tuple[str, ...]:
        """Meaning of each channel of all tensors, in order."""
        return tuple(channel for tensor in self.tensors for channel in tensor.channels)


def plain_output(*channels: str) -> Output:
    """Return the output of a network that gives one tensor of logits, of the input's size."""
    return Output((Tensor(channels),))


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

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be; raises ValueError."""
        _demand_within("instances", self, border_weight=(0, 3), smoothing=(0, 16), seed_level=(-3, 1))
        _demand_within("instances", self, border_level=(-3, 1), smallest_seed=(0, 1 << 20), growth=(0, 256))


@dataclass(frozen=True)
class StarDist:
    """How the outputs of a StarDist network become instances; in px of the image that the model is shown.

    Attributes:
        overlap: pixels that two objects share, per pixel of the smaller one, above which only the better one survives;
            in [0, 1].
        longest_ray: px to which longer rays are cut.
    """

    overlap: float = 0.4
    longest_ray: int = 128

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be.

        Raises:
            ValueError: a number is out of its range.
        """
        _demand_within("stardist", self, overlap=(0, 1), longest_ray=(1, 2048))


@dataclass(frozen=True)
class Hover:
    """How the maps of HoVer-Net become instances; in px of the image that the model is shown.

    The *rise* of a pixel is the lower gradient of the horizontal map along x and the vertical map along y, from -1
    where one falls from 1 to -1 to 1 where both do the opposite.  Its high parts are the seeds.

    Attributes:
        seed_level: rise above which a foreground pixel is a seed.
        border_level: rise at or below which seeds grow into a pixel last.
        smallest_seed: px; smaller seeds are no objects.
        growth: px by which seeds grow into the other foreground, and again into the border.
    """

    seed_level: float = 0.05
    border_level: float = -0.3
    smallest_seed: int = 10
    growth: int = 8

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be; raises ValueError."""
        _demand_within("hover", self, seed_level=(-1, 1), border_level=(-1, 1), smallest_seed=(0, 1 << 20))
        _demand_within("hover", self, growth=(0, 256))


@dataclass(frozen=True)
class ModelClass:
    """A class that a model tells apart: of pixels, such as tumour, or of objects, such as a type of cells.

    Attributes:
        name: its name, which is also the meaning of its output.
        colour: its colour on screens, ``#rrggbb``.
    """

    name: str
    colour: str

    def __post_init__(self) -> None:
        """Refuse what is no name and no colour; raises ValueError."""
        if not self.name.strip() or not self.name.isprintable():
            raise ValueError(f"classes: expected names that can be read, found {self.name!r}")
        if not re.fullmatch("#[0-9a-f]{6}", self.colour):
            raise ValueError(f"the colour of a class is such as #c80000, not {self.colour!r}")


def class_colours(count: int) -> list[str]:
    """Return colours of evenly spread hues for ``count`` classes."""
    hues = (colorsys.hsv_to_rgb(number / count, 0.75, 1.0) for number in range(count))
    return ["#" + bytes(round(255 * light) for light in hue).hex() for hue in hues]


@dataclass(frozen=True)
class Card:
    """What a bundle says about its model.

    Attributes:
        name: the model's name.
        input: what the network takes.
        output: what it gives.
        decoder: how logits become masks and instances, a name in `DECODER_OUTPUTS`: ``mask`` makes an object of every
            component of the foreground, ``seeds`` tells touching objects apart by border and distance, ``hover`` by
            how far each pixel lies from the centre of its nucleus; ``classes`` gives every pixel the number of its
            likeliest class; ``stardist`` takes the probability of an object and the rays of its polygon, in px, the
            first along x and the next towards y.
        total_stride: px; tiles, cores and margins are multiples of it.
        exact_margin: px of context beyond which nothing changes a pixel's logits; None for a network that sees the
            whole tile, or whose reach is unknown.
        margin: px of context cut from each side of a tile by default.
        threshold: probability above which a pixel is foreground by default.
        architecture: ``{"name": ..., **arguments}`` of `cellseg_batch.trainer.unet.build_network`; {} for a graph.
        downscale: factor -> width of objects in px of the image downscaled by it, from which on the model is shown
            that image; see `cellseg_batch.trainer.scale`. Empty: always the image as it is.
        instances: how the decoders ``mask``, ``seeds`` and ``classes`` make instances.
        hover: how the decoder ``hover`` does.
        stardist: how the decoder ``stardist`` does.
        classes: classes of pixels of the decoder ``classes``; for others, classes of objects that the network tells
            apart, if it does.  The network has an output of each name, and for objects may have one that means
            ``no class``.
        licence: licence of the weights; "" if unknown.
        citation: what to cite; "" if unknown.
        training: data, recipe.
        metrics: what it reached, on which data.
        format: format of the file of weights: safetensors, or an ONNX graph.
        weights_sha256: SHA-256 of the file of weights; "" before it is written.
        version: version of the card's fields.
    """

    name: str
    input: Input
    output: Output
    decoder: str
    total_stride: int
    exact_margin: int | None
    margin: int
    threshold: float = 0.5
    architecture: dict[str, Any] = field(default_factory=dict)
    downscale: dict[str, float] = field(default_factory=dict)
    instances: Instances = field(default_factory=Instances)
    hover: Hover = field(default_factory=Hover)
    stardist: StarDist = field(default_factory=StarDist)
    classes: tuple[ModelClass, ...] = ()
    licence: str = ""
    citation: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    format: str = SAFETENSORS
    weights_sha256: str = ""
    version: int = VERSION

    @classmethod
    def from_json(cls, text: str) -> Card:
        """Parse a card.

        Raises:
            ValueError: it is not JSON or of another version, a field is missing or unknown, or what it says does not
                go together (`check`).
        """
        content = json.loads(text)
        if isinstance(content, dict) and "name" in content and content.get("version") != VERSION:
            raise ValueError(
                f"a card of version {content.get('version', 1)} where this version reads {VERSION}; "
                "`cellseg-batch train --out` with the model's own recipe writes it again"
            )
        try:
            card = msgspec.convert(content, cls)
            refuse_unknown(card, content)
        except (msgspec.ValidationError, ValueError) as error:
            raise ValueError(f"not a model card: {str(error).replace('`', '')}") from error
        card.check()
        return card

    def to_json(self) -> str:
        """Return the text that `from_json` reads."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def check(self) -> None:
        """Check that the parts of the card go together.

        Raises:
            ValueError: they do not.
        """
        _demand_one_of("format", self.format, FORMATS)
        _demand_one_of("decoder", self.decoder, tuple(DECODER_OUTPUTS))
        expected, found = self.decoded, self.output.channels
        names = [one.name for one in self.classes]
        if len(set(expected)) < len(expected):
            raise ValueError(f"classes: expected names of their own, found {', '.join(names)}")
        # A graph may give more, in any order; a network of ours gives what its decoder takes.
        if found != expected if self.format == SAFETENSORS else not set(expected) - {BACKGROUND} <= set(found):
            raise ValueError(
                f"outputs: expected {', '.join(expected)} for the decoder {self.decoder}, found {', '.join(found)}"
            )
        if twice := [output for output in expected if found.count(output) > 1]:
            raise ValueError(f"outputs: expected one of {', '.join(twice)}, found several in {', '.join(found)}")
        if self.decoder == "classes" and (others := [output for output in found if output not in expected]):
            raise ValueError(
                f"outputs: expected {', '.join(expected)} alone, or classes of all, found {', '.join(others)}"
            )
        if RAYS in DECODER_OUTPUTS[self.decoder] and len(expected) < 4:
            raise ValueError(f"outputs: expected {RAY}1, {RAY}2, {RAY}3 at least, found {', '.join(found)}")
        least, most = int(self.decoder == "classes"), _MOST_CLASSES * (self.decoder != "stardist")
        if len({BACKGROUND, *names}) <= len(names) or not least <= len(names) <= most:
            raise ValueError(
                f"classes: expected {least} to {most} names without background, found {names} for the decoder "
                f"{self.decoder}"
            )
        if self.total_stride < 1 or (self.exact_margin or 0) < 0:
            raise ValueError(
                f"total_stride, exact_margin: expected px from 1 and from 0 on, found {self.total_stride} and "
                f"{self.exact_margin}"
            )
        if self.decoder == "classes" and NO_CLASS in found:
            raise ValueError(f"outputs: the decoder classes has {BACKGROUND} for pixels of {NO_CLASS}")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold: expected a probability above 0 and below 1, found {self.threshold}")
        if self.margin < self.output.crop:
            raise ValueError(
                f"margin: expected at least the output's crop of {self.output.crop} px, found {self.margin}"
            )

    @property
    def notes(self) -> tuple[str, ...]:
        """What whoever runs the model should know of its results."""
        notes = []
        if self.input.normalisation.per_tile:
            notes.append(f"{self.name} was trained on tiles normalised each for itself; it gets the slide's bounds")
        if self.exact_margin is None and self.input.size.fixed:
            notes.append(f"{self.name} takes tiles of {self.input.size.fixed} px alone, so no margin is exact")
        elif self.exact_margin is None:
            notes.append(f"{self.name} sees the whole tile, so no margin is exact; verify-seams says what seams cost")
        if self.decoder == "classes" and BACKGROUND not in self.output.channels and self._applied == {"none"}:
            notes.append(f"{self.name} has no output for background, which is where no class has even odds")
        return tuple(notes)

    @property
    def decoded(self) -> tuple[str, ...]:
        """Meaning of each output that the decoder takes, in its order, then of those of the class map."""
        names = tuple(one.name for one in self.classes)
        none = (NO_CLASS,) if names and NO_CLASS in self.output.channels else ()
        outputs = (*DECODER_OUTPUTS[self.decoder], *none, *names)
        if RAYS not in outputs:
            return outputs
        return (*outputs[:-1], *(channel for channel in self.output.channels if channel.startswith(RAY)))

    @property
    def exclusive(self) -> bool:
        """Whether the probabilities of classes add up to 1, so that without background every pixel is of a class."""
        return "softmax" in self._applied

    @property
    def _applied(self) -> set[str]:
        """The activations of the tensors that have classes among their channels."""
        names = {one.name for one in self.classes}
        return {tensor.activation for tensor in self.output.tensors if names & set(tensor.channels)}

    @property
    def rule(self) -> Instances | Hover:
        """How the card's decoder grows instances."""
        return self.hover if self.decoder == "hover" else self.instances

    @property
    def grid(self) -> int:
        """Px between two of the logits that a backend gives: rays are not repeated where the output is coarser."""
        return self.output.stride if RAYS in DECODER_OUTPUTS[self.decoder] else 1


def _demand_one_of(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{what}: expected one of {', '.join(allowed)}, found {value!r}")


def _demand_within(table: str, record: Any, **limits: tuple[float, float]) -> None:
    """Check that numbers of a record lie between the limits that go by their names; a NaN does not."""
    for name, (least, most) in limits.items():
        if not least <= getattr(record, name) <= most:
            raise ValueError(f"{table}.{name} lies from {least} to {most}, found {getattr(record, name)}")


def refuse_unknown(record: Any, content: Any) -> None:
    """Check that no part of ``content`` is left out by the dataclass that was made of it.

    Raises:
        ValueError: a field is unknown.
    """
    if isinstance(record, tuple) and isinstance(content, list):
        for item, part in zip(record, content, strict=False):
            refuse_unknown(item, part)
    if not is_dataclass(record) or not isinstance(content, dict):
        return
    known = [one.name for one in fields(record)]
    if unknown := sorted(set(content) - set(known)):
        name = type(record).__name__.removesuffix("Draft").lower()
        raise ValueError(f"the unknown field {unknown[0]} of {name}, whose fields are {', '.join(known)}")
    for name, value in content.items():
        refuse_unknown(getattr(record, name), value)
