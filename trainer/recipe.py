"""A recipe: everything that decides a training run except the images.  Presets are recipes in small files.

Nothing here trains; a recipe is read, changed field by field and kept in the checkpoint and in the bundle's card.
"""

from __future__ import annotations

import inspect
import tomllib
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from cellseg_batch.trainer.bundle import Normalisation
from cellseg_batch.trainer.unet import ARCHITECTURES

HEADS = {"semantic": ("foreground",), "instance": ("foreground", "border", "distance")}
_CHOICES = {
    "network": tuple(ARCHITECTURES),
    "up": ("transposed", "bilinear"),
    "head": tuple(HEADS),
    "framing": ("crop", "resize"),
    "normalise": ("percentile", "fixed"),
    "augmentation": ("none", "flips", "full"),
    "optimiser": ("adamw", "adam", "sgd"),
    "schedule": ("cosine", "one-cycle", "constant"),
    "metric": ("dice", "iou", "competition"),
    "precision": ("fp32", "bf16", "fp16"),
}
LOSS_TERMS = ("bce", "dice", "focal")


@dataclass(frozen=True)
class Recipe:
    """One way to train a model.

    Attributes:
        name: of the model.
        dataset: the published images it is meant for, in words.
        network: an architecture of `cellseg_batch.trainer.unet`.
        width: channels of its finest layers (networks without a published encoder, and unet-efficientnet-lite0).
        depth: its number of resolutions (likewise).
        merge_convs: convolutions after each merge in the decoder (stem-unet).
        up: ``transposed`` convolutions or ``bilinear`` interpolation in the decoder.
        dropout: probability with which the deepest features are dropped.
        grey: show the network the mean of the channels (networks without a published encoder).
        encoder_weights: ``none``, ``imagenet`` (EfficientNet's are in the extra of that name, torchvision's are
            downloaded) or a file of that format.
        head: ``semantic`` (foreground) or ``instance`` (foreground, touching border, distance).
        framing: what a training picture is: a random ``crop``, or the whole image by ``resize``.
        size: its side in px, a multiple of the network's total stride.
        normalise: how pixel values become [0, 1]: per-image ``percentile``s, or ``fixed`` values.
        low: percentile or pixel value that becomes 0.
        high: percentile or pixel value that becomes 1.
        augmentation: ``none``, ``flips`` (and quarter turns), or ``full`` (geometry, stain, contrast, noise).
        zoom_min: smallest magnification of a fully augmented crop.
        zoom_max: largest magnification of a fully augmented crop.
        plain: share of fully augmented pictures that are only flipped and turned by quarters.
        flat: share of the others whose objects and ground are nearly of one colour each, as over-exposed ones are.
        group_power: a kind of image is drawn in proportion to (its number of images) ** group_power.
        loss: a sum of ``bce``, ``dice`` and ``focal``, such as ``bce+dice``.
        optimiser: ``adamw``, ``adam`` or ``sgd`` (momentum 0.9).
        learning_rate: the schedule's peak.
        weight_decay: the optimiser's.
        schedule: ``cosine`` to zero, ``one-cycle``, or ``constant``; see `cellseg_batch.trainer.schedule`.
        warmup: steps over which the learning rate rises (cosine and constant).
        hold: share of the run before the cosine begins to fall.
        averaging: decay of the exponential moving average of the weights that is scored and saved; 0 for none.
        batch: pictures per step.
        epochs: scores on the val split in a full run.
        epoch_steps: steps between scores; 0: as many as show every training image once.
        patience: epochs without a better score after which training stops; 0 for never.
        metric: the score that decides which weights are kept: mean ``dice``, ``iou`` or the ``competition`` metric.
        precision: of the forward and backward pass: ``fp32``, or autocast to ``bf16`` or ``fp16``.
        seed: of every random draw.
        threshold: of the foreground's probability, for the card.
        margin: px of context cut from each side of a tile by default, for the card.
        shrink_2: width of objects, in px of the image shrunk by 2, from which on it is shown to the model; 0: never.
        shrink_4: likewise for 4.
        pixel_size_um: µm per px of the training images, for the card; 0 when they do not record it.
    """

    name: str
    dataset: str = ""
    network: str = "unet"
    width: int = 32
    depth: int = 5
    merge_convs: int = 2
    up: str = "transposed"
    dropout: float = 0.0
    grey: bool = False
    encoder_weights: str = "none"
    head: str = "semantic"
    framing: str = "crop"
    size: int = 256
    normalise: str = "percentile"
    low: float = 0.1
    high: float = 99.9
    augmentation: str = "full"
    zoom_min: float = 0.6
    zoom_max: float = 1.7
    plain: float = 0.0
    flat: float = 0.0
    group_power: float = 1.0
    loss: str = "bce+dice"
    optimiser: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    schedule: str = "cosine"
    warmup: int = 100
    hold: float = 0.0
    averaging: float = 0.0
    batch: int = 8
    epochs: int = 20
    epoch_steps: int = 0
    patience: int = 0
    metric: str = "dice"
    precision: str = "bf16"
    seed: int = 0
    threshold: float = 0.5
    margin: int = 64
    shrink_2: float = 0.0
    shrink_4: float = 0.0
    pixel_size_um: float = 0.0

    def __post_init__(self) -> None:
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                raise ValueError(f"{field} is one of {', '.join(choices)}, not {getattr(self, field)!r}")
        unknown = [term for term in self.loss_terms if term not in LOSS_TERMS]
        if unknown:
            raise ValueError(f"loss is a sum of {', '.join(LOSS_TERMS)} such as bce+dice, not {self.loss!r}")
        for field in ("width", "depth", "size", "batch", "epochs"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is at least 1, not {getattr(self, field)}")
        if not 0 < self.zoom_min <= self.zoom_max:
            raise ValueError(f"zoom-min {self.zoom_min} is above zoom-max {self.zoom_max}, or not above 0")

    @property
    def outputs(self) -> tuple[str, ...]:
        """What each logit means."""
        return HEADS[self.head]

    @property
    def loss_terms(self) -> tuple[str, ...]:
        """The terms that the loss is a sum of."""
        return tuple(self.loss.split("+"))

    @property
    def normalisation(self) -> Normalisation:
        """How pixel values become the network's input."""
        return Normalisation(self.normalise, self.low, self.high)

    @property
    def shrink(self) -> dict[str, float]:
        """The card's rule for large objects."""
        return {factor: width for factor, width in (("2", self.shrink_2), ("4", self.shrink_4)) if width}

    @property
    def architecture(self) -> dict[str, Any]:
        """``{"name": ..., **arguments}`` of `cellseg_batch.trainer.unet.build_network`."""
        taken = inspect.signature(ARCHITECTURES[self.network]).parameters
        arguments = {
            field: getattr(self, field) for field in ("width", "depth", "merge_convs", "up", "dropout", "grey")
        }
        chosen = {field: value for field, value in arguments.items() if field in taken}
        return {"name": self.network, "outputs": len(self.outputs), **chosen}


def list_presets() -> dict[str, Path]:
    """Name -> file of the presets inside the package."""
    folder = Path(str(files("cellseg_batch.trainer"))) / "presets"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load_preset(preset: str, **changes: Any) -> Recipe:
    """The recipe of a preset's name, or of a file like one, with some fields changed.

    Raises:
        ValueError: there is no such preset, or a field is unknown or has an impossible value.
    """
    path = list_presets().get(preset, Path(preset))
    if not path.is_file():
        raise ValueError(f"no preset {preset}; there are {', '.join(list_presets())}, or give a .toml file")
    try:
        content = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path.name} is no TOML file: {error}") from error
    unknown = content.keys() - {field.name for field in fields(Recipe)}
    if unknown:
        raise ValueError(f"{path.name} has fields that no recipe has: {', '.join(sorted(unknown))}")
    return replace(Recipe(**{"name": path.stem, **content}), **changes)
