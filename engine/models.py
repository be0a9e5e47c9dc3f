"""Find a model bundle and make its network.

The engine knows a model only through its bundle; torch is imported only to build the network.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from cellseg_batch.engine.errors import ModelError
from cellseg_batch.engine.machine import is_path
from cellseg_batch.trainer.bundle import CARD_FILE, WEIGHTS_FILES, Bundle, load_bundle

if TYPE_CHECKING:
    from torch import nn


def shipped_models() -> dict[str, Path]:
    """The models inside the package: name -> folder of the bundle."""
    folder = Path(str(files("cellseg_batch.engine"))) / "assets" / "models"
    return {card.parent.name: card.parent for card in sorted(folder.glob(f"*/{CARD_FILE}"))}


def load_model(model: str) -> Bundle:
    """Load the bundle of a shipped model's name, or of a folder.

    Raises:
        ModelError: there is no such model, or its files are damaged.
    """
    if not is_path(model):
        raise _missing(ascii(model), "a text that can be neither")
    folder = shipped_models().get(model, Path(model))
    try:
        return load_bundle(folder)
    except FileNotFoundError as error:
        found = f"no {Path(error.filename or folder).name}" if folder.exists() else "neither"
        raise _missing(model, found) from error
    except (OSError, ValueError) as error:
        raise ModelError(
            f"`model={model}`",
            expected="a readable bundle",
            found=str(error),
            cause="an incomplete copy, a card written by hand, or a bundle of another version",
            remedy="copy the bundle again, or write it with this version",
        ) from error


def _missing(model: str, found: str) -> ModelError:
    return ModelError(
        f"`model={model}`",
        expected=f"a shipped model ({', '.join(shipped_models())}) or a folder with {CARD_FILE} "
        f"and {' or '.join(WEIGHTS_FILES.values())}",
        found=found,
        remedy="check the name or the path",
    )


def build_torch_network(bundle: Bundle) -> nn.Module:
    """Build the bundle's network in float32, in evaluation mode, with its weights loaded strictly.

    Raises:
        ModelError: the architecture is unknown, or the weights belong to another architecture.
    """
    from cellseg_batch.trainer.unet import ARCHITECTURES, load_network

    architecture = bundle.card.architecture
    if bundle.graph is not None:
        raise ModelError(
            f"model {bundle.card.name}",
            expected="a network of ours, whose layers torch can build",
            found="an ONNX graph",
            remedy="use what runs graphs: run, check-model, compile",
        )
    try:
        return load_network(bundle)
    except (KeyError, TypeError) as error:
        raise ModelError(
            f"model {bundle.card.name}",
            expected=f"an architecture of this version ({', '.join(ARCHITECTURES)})",
            found=f"{architecture}",
            cause="a bundle of a newer version",
            remedy="update cellseg-batch",
        ) from error
    except RuntimeError as error:
        raise ModelError(
            f"model {bundle.card.name}",
            expected=f"the weights of {architecture}",
            found=str(error).splitlines()[1].strip() if "\n" in str(error) else str(error),
            cause="weights of another architecture beside this card",
            remedy="keep card.json and weights.safetensors of one bundle together",
        ) from error
