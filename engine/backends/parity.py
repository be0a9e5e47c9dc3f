"""The gate: no fast path is used unless its masks agree with torch fp32 on real tiles."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from skimage.io import imread

from cellseg_batch.engine.backends.backend import Backend
from cellseg_batch.engine.geometry import reflect
from cellseg_batch.kernels.gather import gather
from cellseg_batch.kernels.stitch import logit_threshold, sigmoid
from cellseg_batch.trainer.bundle import Bundle

FLIPPED_LIMIT = 5e-4
_SIDE = 512


@dataclass(frozen=True)
class Parity:
    """How far a backend's result is from the reference's on the gate tiles.

    Attributes:
        max_dp: largest difference of two probabilities.
        mean_dp: mean difference.
        flipped: share of pixels whose mask changes.
    """

    max_dp: float
    mean_dp: float
    flipped: float

    @property
    def passed(self) -> bool:
        """Whether the backend may be used; a NaN never passes."""
        return self.flipped <= FLIPPED_LIMIT and bool(np.isfinite(self.max_dp))


def gate_tiles(bundle: Bundle) -> NDArray[np.float32]:
    """Real tiles (N, C, 512, 512) in [0, 1], one from each of the demo images."""
    folder = Path(str(files("cellseg_batch.engine"))) / "assets" / "demo"
    tiles = []
    for path in sorted(folder.glob("*.png")):
        image = imread(path)
        pixels = np.moveaxis(image, -1, 0) if image.ndim == 3 else image[None]
        low, high = bundle.card.normalisation.bounds_of(pixels)
        channels = pixels if pixels.shape[0] == bundle.card.channels else pixels[:1]
        rows, columns = (reflect(0, _SIDE, length)[None] for length in channels.shape[1:])
        tile = np.empty((1, bundle.card.channels, _SIDE, _SIDE), np.float32)
        gather(channels, rows, columns, low, 1 / (high - low), tile)
        tiles.append(tile)
    return np.concatenate(tiles)


def measure_parity(backend: Backend, reference: Backend, tiles: NDArray[np.float32], threshold: float) -> Parity:
    """Compare the foreground of two backends on ``tiles``, at a probability ``threshold``."""
    limit = logit_threshold(threshold)
    model, exact = (one.compile((1, *tiles.shape[1:])) for one in (backend, reference))
    pairs = [(model(tile[None])[0, 0].copy(), exact(tile[None])[0, 0].copy()) for tile in tiles]
    differences = np.stack([np.abs(sigmoid(logits) - sigmoid(expected)) for logits, expected in pairs])
    flipped = np.stack([(logits > limit) != (expected > limit) for logits, expected in pairs])
    return Parity(float(differences.max()), float(differences.mean()), float(flipped.mean()))
