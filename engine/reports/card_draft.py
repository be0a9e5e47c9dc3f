"""What a person or a package says about a model before its graph was looked at: a card with parts left out."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TypeVar

import msgspec

from cellseg_batch.engine.errors import ModelError, brief
from cellseg_batch.trainer.card import DECODER_OUTPUTS, Hover, Instances, Size, StarDist, refuse_unknown

Numbers = float | tuple[float, ...]
# Missing field -> line that says it.
EXAMPLES = {
    "input.channels": 'channels = ["rgb"]  # or ["grey"], or names of stains such as ["nuclei", "membrane"]',
    "input.normalisation": 'normalisation = {kind = "linear", low = 0, high = 255}  # or percentile, zscore, fixed',
    "output.decoder": 'decoder = "mask"  # ' + " or ".join(DECODER_OUTPUTS),
    "output.channels": 'channels = ["background", "foreground"]  # the meaning of each channel, in order',
    "output.activation": 'activation = "sigmoid"  # or softmax; none for logits; in its line where tensors are named',
    "output.classes": 'classes = ["tumour", "stroma"]  # names without background',
    "input.layout": 'layout = "NCHW"  # or "NHWC"',
    "input.size": "size = {min = 128, step = 16}  # sides in px that it takes",
    "output.margin": "margin = 64  # px of context cut from each side of a tile",
}


@dataclass(frozen=True)
class NormalisationDraft:
    """As `Normalisation`; one number may stand for all channels, and clip for what is usual."""

    kind: str
    low: Numbers | None = None
    high: Numbers | None = None
    joint: bool = True
    clip: bool | None = None
    per_tile: bool = False


@dataclass(frozen=True)
class InputDraft:
    """What is said about the input; the rest is read from the graph."""

    channels: tuple[str, ...] = ()
    normalisation: NormalisationDraft | None = None
    size: int | Size | None = None
    pixel_size_um: float | None = None
    layout: str = ""


@dataclass(frozen=True)
class TensorDraft:
    """What is said about one of several tensors that a graph gives."""

    name: str
    channels: tuple[str, ...]
    activation: str | None = None


@dataclass(frozen=True)
class OutputDraft:
    """What is said about the output; the rest is read from the graph.

    Attributes:
        decoder: how logits become masks and instances.
        channels: meaning of each channel, if the graph gives one tensor.
        activation: activation that the graph applies to it; None: the one that makes the output, if it is one.
        tensors: the tensors to take, if the graph gives several.
        margin: default margin in px.
        threshold: probability above which a pixel is foreground.
        classes: names of the classes, without background.
    """

    decoder: str = ""
    channels: tuple[str, ...] = ()
    activation: str | None = None
    tensors: tuple[TensorDraft, ...] = ()
    margin: int | None = None
    threshold: float | None = None
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CardDraft:
    """What is said about a model; the fields are those of `Card`, and None or empty where nothing is said."""

    input: InputDraft = field(default_factory=InputDraft)
    output: OutputDraft = field(default_factory=OutputDraft)
    instances: Instances | None = None
    hover: Hover | None = None
    stardist: StarDist | None = None
    name: str = ""
    licence: str = ""
    citation: str = ""
    training: dict[str, str] = field(default_factory=dict)

    def completed_by(self, other: CardDraft) -> CardDraft:
        """Return this draft with what another one says wherever this one says nothing."""
        return _completed(self, other)


_Draft = TypeVar("_Draft", CardDraft, InputDraft, OutputDraft)


def _completed(draft: _Draft, other: _Draft) -> _Draft:
    said = {}
    for one in fields(draft):
        mine, theirs = getattr(draft, one.name), getattr(other, one.name)
        if isinstance(mine, InputDraft | OutputDraft):
            said[one.name] = _completed(mine, theirs)
        else:
            said[one.name] = theirs if mine in (None, "", (), {}) else mine
    return replace(draft, **said)


def read_draft(path: Path | None) -> CardDraft:
    """Read a ``card.toml``; an empty draft without one.

    Raises:
        ModelError: it cannot be read, or has fields that no card has.
    """
    if path is None:
        return CardDraft()
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        draft = msgspec.convert(content, CardDraft)
        refuse_unknown(draft, content)
    except OSError as error:
        raise _unreadable(path, brief(error), "check the path") from error
    except msgspec.ValidationError as error:
        # msgspec's words for types are those of JSON.
        found, _, place = str(error).replace("`", "").replace("object", "table").partition(" - at $.")
        example = EXAMPLES.get(place, f"[input] and {EXAMPLES['input.channels']}")
        raise _unreadable(path, f"{place}: {found}" if place else found, f"correct it, such as {example}") from error
    except ValueError as error:  # no UTF-8, no TOML, unknown fields, impossible numbers
        begins = f"correct it; a card begins with [input] and {EXAMPLES['input.channels']}"
        raise _unreadable(path, brief(error).replace("`", ""), begins) from error
    return draft


def _unreadable(path: Path, found: str, remedy: str) -> ModelError:
    return ModelError(
        str(path), expected="a card in TOML, with the tables input and output", found=found, remedy=remedy
    )
