"""What every encoder has, and how published weights get into one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from pickle import UnpicklingError
from typing import ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn


class Encoder(nn.Module, ABC):
    """What all encoders have; its input is RGB pixels less ``mean``, divided by ``deviation``.

    Attributes:
        widths: channels of its features, the finest first.
        mean: of the pixels in [0, 1] that the published weights were trained on.
        deviation: likewise.
        left_out: beginnings of the names of published weights that it has no use for, its classifier's for one.
        provenance: of ImageNet's weights: who made them, and their licence.
    """

    widths: tuple[int, ...]
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    deviation: tuple[float, float, float] = (0.229, 0.224, 0.225)
    left_out: tuple[str, ...] = ("fc.", "classifier.")
    provenance: ClassVar[str]

    @staticmethod
    @abstractmethod
    def imagenet() -> dict[str, Tensor]:
        """The weights that were published, by name.

        Raises:
            OSError: they cannot be had.
        """


def load_encoder_weights(encoder: Encoder, source: str) -> None:
    """Load published weights into an encoder.

    What it has no use for, the classifier's weights for one, is left out; everything else must fit.

    Args:
        encoder: of any depth.
        source: ``imagenet`` for the published weights, or a file with these names, ``.safetensors`` or torch's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the weights are of another network, or the file is none of weights.
        OSError: the download failed.
    """
    if source == "imagenet":
        state = encoder.imagenet()
    elif not Path(source).is_file():
        raise FileNotFoundError(
            f"encoder_weights {source}: no such file; use none, imagenet, or a .pth or .safetensors file"
        )
    else:
        state = read_weights(Path(source))
    kept = {key: value for key, value in state.items() if not key.startswith(encoder.left_out)}
    # Not every publisher keeps these counters, and nothing here reads them.
    counters = {key: value for key, value in encoder.state_dict().items() if key.endswith(".num_batches_tracked")}
    try:
        encoder.load_state_dict(counters | kept, strict=True)
    except RuntimeError as error:
        raise ValueError(f"encoder_weights {source} is not of {type(encoder).__name__}: {error}") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name; nothing else in a file is unpickled."""
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"encoder_weights {path} is damaged: {error}") from error
    try:
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError) as error:
        raise ValueError(f"encoder_weights {path} is no file of weights alone: {error}") from error
    return state


def download(url: str) -> dict[str, Tensor]:
    """A file of weights, kept in torch's cache."""
    state: dict[str, Tensor] = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
    return state
