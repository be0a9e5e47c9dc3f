"""Define recipes: everything that decides a training run except the images.  Presets are recipes in small files.

Nothing here trains; a recipe is read, changed field by field and kept in the checkpoint and in the bundle's card.
Each field has one rule beside it with its meaning and its allowed values; the checks, the reader of presets and the
flags of ``train`` are made from these rules.
"""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, get_type_hints

from cellseg_batch.trainer.card import Normalisation
from cellseg_batch.trainer.heads import HEADS
from cellseg_batch.trainer.losses import LOSSES
from cellseg_batch.trainer.unet import ARCHITECTURES

NETWORK, PICTURES, OPTIMISATION, CARD = "Network", "Training pictures", "Optimisation", "The bundle's card"

_RULE = "rule"
_TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


class RecipeError(ValueError):
    """A field of a recipe has a value that is not allowed.

    Args:
        field: name of the field.
        expected: the allowed values, in words.
        found: the value.
    """

    def __init__(self, field: str, expected: str, found: object) -> None:
        super().__init__(f"{field}: expected {expected}, found {found!r}")
        self.field = field
        self.expected = expected
        self.found = found


@dataclass(frozen=True)
class Rule:
    """Meaning and allowed values of a field of a recipe.

    Attributes:
        group: heading for fields of one subject.
        text: meaning of the field, in one line.
        choices: allowed texts; () allows any.
        summed: whether the value is a sum of choices, such as ``bce+dice``.
        least, most: bounds of a number, both included; None for no bound.
        opposite: name of the value False; "" if it has no name of its own.
    """

    group: str
    text: str
    choices: tuple[str, ...] = ()
    summed: bool = False
    least: float | None = None
    most: float | None = None
    opposite: str = ""

    @property
    def expected(self) -> str:
        """The allowed values in words; "" if every value of the type is allowed."""
        if self.choices:
            listed = ", ".join(self.choices)
            return f"a sum of {listed} such as {'+'.join(self.choices[:2])}" if self.summed else f"one of {listed}"
        if self.least is not None and self.most is not None:
            return f"{self.least:g} to {self.most:g}"
        return "" if self.least is None else f"{self.least:g} or more"

    def allows(self, value: Any) -> bool:
        """Whether a value of the right type is allowed."""
        if self.choices:
            return all(part in self.choices for part in (value.split("+") if self.summed else (value,)))
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


def _field(default: Any, group: str, text: str, choices: Iterable[str] = (), **bounds: Any) -> Any:
    """Make a field of a recipe with its rule."""
    return field(default=default, metadata={_RULE: Rule(group, text, tuple(choices), **bounds)})


@dataclass(frozen=True)
class Recipe:
    """A recipe to train a model; `rules` has the meaning and the allowed values of each field.

    Raises:
        RecipeError: a field has a value that is not allowed.
    """

    name: str = field(metadata={_RULE: Rule(CARD, "Name of the model.")})
    dataset: str = _field("", CARD, "The published training images, in words.")
    network: str = _field("unet", NETWORK, "Architecture of the network.", ARCHITECTURES)
    width: int = _field(
        32, NETWORK, "Channels of the finest layers, without a published encoder or with efficientnet-lite0.", least=1
    )
    depth: int = _field(5, NETWORK, "Number of resolutions, without a published encoder.", least=1)
    merge_convs: int = _field(2, NETWORK, "Convolutions after each merge in the decoder of stem-unet.", least=0)
    up: str = _field("transposed", NETWORK, "How the decoder enlarges.", ("transposed", "bilinear"))
    dropout: float = _field(0.0, NETWORK, "Probability with which the deepest features are dropped.", least=0, most=1)
    grey: bool = _field(
        False,
        NETWORK,
        "See the mean of the channels, or each of them; without a published encoder.",
        opposite="colour",
    )
    encoder_weights: str = _field(
        "none", NETWORK, "none, imagenet (EfficientNet: from the extra of that name; others: downloaded) or a file."
    )
    head: str = _field(
        "semantic", NETWORK, "Foreground alone, or with touching borders and distance, or classes of pixels.", HEADS
    )
    framing: str = _field("crop", PICTURES, "Random crops, or whole images resized.", ("crop", "resize"))
    size: int = _field(256, PICTURES, "Side in px, a multiple of the network's total stride.", least=1)
    normalise: str = _field(
        "percentile", PICTURES, "Meaning of low and high, for each image or for all.", ("percentile", "fixed")
    )
    low: float = _field(0.1, PICTURES, "Percentile or pixel value that becomes 0.")
    high: float = _field(99.9, PICTURES, "Percentile or pixel value that becomes 1.")
    augmentation: str = _field(
        "full", PICTURES, "Flips and quarter turns, or also shape, stain, contrast, noise.", ("none", "flips", "full")
    )
    zoom_min: float = _field(0.6, PICTURES, "Smallest magnification of fully augmented crops, above 0.", least=0)
    zoom_max: float = _field(1.7, PICTURES, "Largest magnification of fully augmented crops.", least=0)
    plain: float = _field(
        0.0, PICTURES, "Share of fully augmented pictures that are only flipped and turned.", least=0, most=1
    )
    flat: float = _field(0.0, PICTURES, "Share of the others in even colours, as if over-exposed.", least=0, most=1)
    blank: float = _field(0.0, PICTURES, "Share of the pictures that show noise alone.", least=0, most=1)
    group_power: float = _field(1.0, PICTURES, "Odds of a kind of image: its number of images to this power.")
    loss: str = _field(
        "bce+dice", OPTIMISATION, "Loss that is minimised; of classes, bce is their cross-entropy.", LOSSES, summed=True
    )
    optimiser: str = _field("adamw", OPTIMISATION, "Optimiser; sgd has a momentum of 0.9.", ("adamw", "adam", "sgd"))
    learning_rate: float = _field(1e-3, OPTIMISATION, "Learning rate at the schedule's peak.", least=0)
    weight_decay: float = _field(0.01, OPTIMISATION, "Weight decay of the optimiser.", least=0)
    schedule: str = _field("cosine", OPTIMISATION, "Course of the learning rate.", ("cosine", "one-cycle", "constant"))
    warmup: int = _field(100, OPTIMISATION, "Steps of rising learning rate (cosine and constant).", least=0)
    hold: float = _field(0.0, OPTIMISATION, "Share of the run before the cosine falls.", least=0, most=1)
    averaging: float = _field(0.0, OPTIMISATION, "Decay of the weights' moving average; 0: none.", least=0, most=1)
    batch: int = _field(8, OPTIMISATION, "Pictures per step.", least=1)
    epochs: int = _field(20, OPTIMISATION, "Scores on the val split in a full run.", least=1)
    epoch_steps: int = _field(0, OPTIMISATION, "Steps between scores; 0: each training image once.", least=0)
    patience: int = _field(0, OPTIMISATION, "Epochs without a better score before the end; 0: never.", least=0)
    metric: str = _field("dice", OPTIMISATION, "The score that keeps the best weights.", ("dice", "iou", "competition"))
    precision: str = _field("bf16", OPTIMISATION, "Precision of forward and backward pass.", ("fp32", "bf16", "fp16"))
    seed: int = _field(0, OPTIMISATION, "Seed of every random draw.", least=0)
    threshold: float = _field(0.5, CARD, "Probability above which a pixel is foreground.", least=0, most=1)
    margin: int = _field(64, CARD, "Default tile margin in px.", least=0)
    downscale_2: float = _field(
        0.0, CARD, "Width of objects in px from which images are downscaled by 2; 0, classes: never.", least=0
    )
    downscale_4: float = _field(
        0.0, CARD, "Width of objects in px from which images are downscaled by 4; 0, classes: never.", least=0
    )
    pixel_size_um: float = _field(0.0, CARD, "µm per px of the training images; 0: not recorded.", least=0)

    def __post_init__(self) -> None:
        for name, rule in rules().items():
            value, kind = getattr(self, name), types()[name]
            # A whole number is also a number, but True and False are not.
            if not isinstance(value, (int, float) if kind is float else kind) or (
                kind is not bool and isinstance(value, bool)
            ):
                raise RecipeError(name, _TYPE_NAMES[kind], value)
            if not rule.allows(value):
                raise RecipeError(name, rule.expected, value)
        if not 0 < self.zoom_min <= self.zoom_max:
            raise RecipeError("zoom_min", f"a number above 0 and up to zoom_max, {self.zoom_max:g}", self.zoom_min)

    @property
    def loss_terms(self) -> tuple[str, ...]:
        """The terms whose sum is the loss."""
        return tuple(self.loss.split("+"))

    @property
    def normalisation(self) -> Normalisation:
        """The rule by which pixel values become the network's input."""
        return Normalisation(self.normalise, (self.low,), (self.high,))

    @property
    def downscale(self) -> dict[str, float]:
        """The card's rule for large objects: factor -> their width in px from which images are downscaled by it.

        Regions of a class may have any width.
        """
        if HEADS[self.head].has_classes:
            return {}
        return {factor: width for factor, width in (("2", self.downscale_2), ("4", self.downscale_4)) if width}

    @property
    def architecture(self) -> dict[str, Any]:
        """The argument ``{"name": ..., **arguments}`` of `cellseg_batch.trainer.unet.build_network`.

        Outputs are those that the head has with any data: `architecture_of` adds those of the classes.
        """
        parameters = inspect.signature(ARCHITECTURES[self.network]).parameters
        arguments = {
            field: getattr(self, field) for field in ("width", "depth", "merge_convs", "up", "dropout", "grey")
        }
        chosen = {field: value for field, value in arguments.items() if field in parameters}
        return {"name": self.network, "outputs": len(HEADS[self.head].outputs), **chosen}

    def architecture_of(self, classes: int) -> dict[str, Any]:
        """`architecture` with an output more for each of the classes that the network tells apart."""
        return {**self.architecture, "outputs": self.architecture["outputs"] + classes}


def rules() -> dict[str, Rule]:
    """Field -> its rule, in the order of a recipe."""
    return {field.name: field.metadata[_RULE] for field in fields(Recipe)}


@cache
def types() -> dict[str, type]:
    """Field -> its type: str, int, float or bool."""
    return {name: kind for name, kind in get_type_hints(Recipe).items() if name in rules()}


def list_presets() -> dict[str, Path]:
    """The presets inside the package: name -> file."""
    folder = Path(str(files("cellseg_batch.trainer"))) / "presets"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load_preset(preset: str, **changes: Any) -> Recipe:
    """Load the recipe of a preset's name, or of a file of the same format, with some fields changed.

    Raises:
        RecipeError: a changed field has a value that is not allowed.
        ValueError: there is no such preset, or one of its fields is unknown or has a value that is not allowed.
    """
    path = list_presets().get(preset, Path(preset))
    if not path.is_file():
        raise ValueError(f"no preset {preset}; there are {', '.join(list_presets())}, or give a .toml file")
    try:
        content = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path.name} is no TOML file: {error}") from error
    unknown = content.keys() - rules().keys()
    if unknown:
        raise ValueError(f"{path.name} has fields that no recipe has: {', '.join(sorted(unknown))}")
    try:
        recipe = Recipe(**{"name": path.stem, **content})
    except RecipeError as error:
        raise ValueError(f"{path.name}: {error}") from error
    return replace(recipe, **changes)
