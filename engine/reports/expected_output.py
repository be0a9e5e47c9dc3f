"""What a model's authors got for a test input, kept in its bundle, and what its network gives here."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, softmax

from cellseg_batch.engine.inference.normalise import bounds_of_sample
from cellseg_batch.trainer.bundle import Bundle
from cellseg_batch.trainer.card import LAYOUTS

_FILE = "test.safetensors"
_INPUT, _OUTPUT, _ENDINGS = "input", "output ", "endings"
# What the specification of bioimage.io allows by default: differences of values, and the share of values that may
# differ more, without and with a threshold.
_RELATIVE, _ABSOLUTE, _FEW, _FEW_AT_THRESHOLD = 1e-3, 1e-3, 1e-4, 1e-3


@dataclass(frozen=True)
class Ending:
    """What is done behind the network to one of its tensors before it is compared.

    Attributes:
        tensor: its name in the graph.
        activation: none, sigmoid or softmax.
        threshold: above which a value then becomes 1 and others 0; None leaves them.
    """

    tensor: str
    activation: str = "none"
    threshold: float | None = None


@dataclass(frozen=True)
class Agreement:
    """How a tensor of the network compares with the expected one.

    Attributes:
        tensor: its name in the graph.
        largest: largest difference.
        differing: share of the values that differ by more than the specification allows.
        agrees: whether these are as few as it allows.
    """

    tensor: str
    largest: float
    differing: float
    agrees: bool

    def __str__(self) -> str:
        """The comparison in words."""
        if self.agrees:
            return f"test tensors: {self.tensor} is as expected; the largest difference is {self.largest:.2g}"
        return (
            f"test tensors: {self.tensor} differs from what is expected in {self.differing:.2%} of its values, by up "
            f"to {self.largest:.2g}; its normalisation may be another one than the card's"
        )


@dataclass(frozen=True)
class ExpectedOutput:
    """A test input and the expected outputs.

    Attributes:
        pixels: test input, four axes in the graph's layout, not normalised.
        outputs: how each tensor is made comparable, and the expected values.
    """

    pixels: NDArray[Any]
    outputs: tuple[tuple[Ending, NDArray[Any]], ...]

    def save(self, folder: Path) -> None:
        """Write it into a bundle."""
        from safetensors.numpy import save_file

        arrays = {_INPUT: self.pixels, **{f"{_OUTPUT}{i}": values for i, (_, values) in enumerate(self.outputs)}}
        endings = json.dumps([asdict(ending) for ending, _ in self.outputs])
        path = folder / _FILE
        save_file({name: np.ascontiguousarray(values) for name, values in arrays.items()}, path, {_ENDINGS: endings})
        path.chmod(0o644)

    def compare(self, bundle: Bundle, threads: int) -> tuple[Agreement, ...]:
        """Compare what the bundle's graph gives; each image of the test input is normalised as a slide would be.

        Raises:
            ValueError: the graph does not run on the test input, or gives other shapes or what is no number.
        """
        from cellseg_batch.engine.inference.backends.onnxruntime_cpu import run_graph

        assert bundle.graph is not None
        graph, layout = bundle.graph.read_bytes(), bundle.card.input.layout
        try:
            images = [run_graph(graph, self._normalised(image, bundle), threads) for image in self.pixels]
        except Exception as error:  # the library's own errors
            raise ValueError(f"the graph does not run on the test input of shape {self.pixels.shape}") from error
        agreements = []
        for ending, expected in self.outputs:
            given = np.concatenate([image[ending.tensor] for image in images]).astype(np.float64)
            given = _cropped(_after(ending, given, channel_axis=layout.index("C")), expected)
            if not np.isfinite(given).all():
                raise ValueError(f"the graph gives NaN or infinite values in {ending.tensor} for the test input")
            wanted = expected.astype(np.float64)
            differences = np.abs(given - wanted)
            differing = float(np.mean(~(differences <= _ABSOLUTE + _RELATIVE * np.abs(wanted))))
            few = _FEW if ending.threshold is None else _FEW_AT_THRESHOLD
            agreements.append(Agreement(ending.tensor, float(differences.max()), differing, differing <= few))
        return tuple(agreements)

    def _normalised(self, image: NDArray[Any], bundle: Bundle) -> NDArray[np.float32]:
        """One image (1, C, H, W) or (1, H, W, C), normalised as a slide of its pixels."""
        last = bundle.card.input.layout == LAYOUTS[1]
        channels = np.moveaxis(image, -1, 0) if last else image
        bounds = bounds_of_sample([channels], bundle.card.input.normalisation)
        low, scale = (np.array(numbers, np.float32).reshape(-1, 1, 1) for numbers in (bounds.low, bounds.scale))
        pixels = (channels.astype(np.float32) - low) * scale
        if bounds.clip:
            pixels = pixels.clip(0, 1)
        return np.ascontiguousarray(np.moveaxis(pixels, 0, -1) if last else pixels)[None]


def read_expected_output(folder: Path) -> ExpectedOutput | None:
    """Read the expected output of a bundle; None if it has none.

    Raises:
        ValueError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not (folder / _FILE).exists():
        return None
    try:
        with safe_open(folder / _FILE, framework="numpy") as file:
            endings = [Ending(**one) for one in json.loads(file.metadata()[_ENDINGS])]
            outputs = tuple((one, file.get_tensor(f"{_OUTPUT}{i}")) for i, one in enumerate(endings))
            return ExpectedOutput(file.get_tensor(_INPUT), outputs)
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{_FILE} is damaged: {error}") from error


def _after(ending: Ending, values: NDArray[np.float64], channel_axis: int) -> NDArray[np.float64]:
    if ending.activation == "sigmoid":
        values = expit(values)
    elif ending.activation == "softmax":
        values = softmax(values, axis=channel_axis)
    return values if ending.threshold is None else (values > ending.threshold).astype(np.float64)


def _cropped(given: NDArray[np.float64], expected: NDArray[Any]) -> NDArray[np.float64]:
    """The middle of what is given, of the expected shape: some packages cut the halo off their test tensors.

    Raises:
        ValueError: it is none.
    """
    pairs = list(zip(given.shape, expected.shape, strict=False))
    if given.ndim != expected.ndim or any(have < want or (have - want) % 2 for have, want in pairs):
        raise ValueError(f"the graph gives {given.shape} for the test input, where {expected.shape} is expected")
    return given[tuple(slice((have - want) // 2, (have + want) // 2) for have, want in pairs)]
