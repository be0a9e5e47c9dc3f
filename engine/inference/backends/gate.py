"""The gate: allow a fast path only if its masks agree with an fp32 reference on real tiles that it was not tuned on.

A run with a race result on disk does not call the gate, so the libraries of the gate are imported inside its functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.backend_table import KNOWN_PRECISIONS, Limits
from cellseg_batch.engine.inference.backends.protocol import Logits
from cellseg_batch.engine.inference.decoders import Decoder
from cellseg_batch.trainer.card import Card, Normalisation

TILE = 512
# Of the bytes of the gate tiles.
_MEAN, _DEVIATION = 60.0, 85.0


def limits_of(precision: str) -> Limits:
    """Return the limits of the gate at a precision."""
    return KNOWN_PRECISIONS[precision].limits


@dataclass(frozen=True)
class Parity:
    """The difference between a backend's result and the reference's on the gate tiles.

    Attributes:
        max_dp: largest difference of the probabilities of a pixel.
        mean_dp: mean difference of the probabilities.
        flipped: share of pixels whose mask changes.
        object_f1: F1 of the mask's connected components, matched with the reference's at IoU 0.5.
        object_change: (objects - reference objects) / reference objects.
        objects: number of objects in the reference.
    """

    max_dp: float
    mean_dp: float
    flipped: float
    object_f1: float
    object_change: float
    objects: int

    def within(self, limits: Limits) -> bool:
        """Whether the backend passes ``limits``; a NaN never passes."""
        close = self.flipped <= limits.flipped and self.object_f1 >= limits.object_f1
        return close and bool(np.isfinite(self.max_dp))

    def text(self, limits: Limits) -> str:
        """Return the figures that decide, with their limits, as text."""
        undefined = "" if np.isfinite(self.max_dp) else ", NaN among its logits"
        return (
            f"flips {self.flipped:.1e} of the pixels (limit {limits.flipped:.0e}), "
            f"objects match with F1 {self.object_f1:.4f} (limit {limits.object_f1}){undefined}"
        )


def real_tiles(purpose: str, channels: int) -> NDArray[np.float32]:
    """Load real tiles (N, channels, 512, 512) in [0, 1] for ``gate`` or ``calibration``, which share no image."""
    from skimage.io import imread

    folder = Path(str(files("cellseg_batch.engine"))) / "assets" / purpose
    tiles = []
    for path in sorted(folder.glob("*.png")):
        image = imread(path).astype(np.float32) / 255
        pixels = np.moveaxis(image, -1, 0) if image.ndim == 3 else image[None]
        tiles.append(pixels if pixels.shape[0] == channels else np.repeat(pixels[:1], channels, axis=0))
    return np.ascontiguousarray(np.stack(tiles))


def tiles_for(purpose: str, card: Card) -> NDArray[np.float32]:
    """Load real tiles as the network of a card takes them: of its channels and sizes, and normalised as 8-bit images.

    A network that downscales its input gets them enlarged, so that it sees what the other networks see.

    Returns:
        (N, C, side, side) float32; smaller sides give more tiles, larger ones mirror the tiles at their edges.
    """
    factor = int(card.architecture.get("factor", 1))
    tiles = real_tiles(purpose, card.input.count).repeat(factor, 2).repeat(factor, 3)
    whole, side = tiles.shape[-1], card.input.size.below(tiles.shape[-1], card.total_stride)
    if side > whole:
        tiles = np.pad(tiles, ((0, 0), (0, 0), (0, side - whole), (0, side - whole)), mode="reflect")
    starts = range(0, tiles.shape[-1] - side + 1, side)
    tiles = np.concatenate([tiles[..., y : y + side, x : x + side] for y in starts for x in starts])
    low, high = byte_bounds(card.input.normalisation, card.input.count)
    zero, span = low[:, None, None] / np.float32(255), (high - low)[:, None, None] / np.float32(255)
    return np.ascontiguousarray((tiles - zero) / span)


def byte_bounds(rule: Normalisation, channels: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the bytes that become 0 and 1 in `tiles_for`, (C,) float32 each.

    The tiles stand for slides of any depth and contrast, so only a rule that does not clip has bytes of its own in
    mind; the mean and the deviation that ``zscore`` takes are about those of the tiles.
    """
    pairs = list(zip(rule.low, rule.high, strict=True))
    if rule.kind == "zscore":
        pairs = [(_MEAN, _MEAN + _DEVIATION)]
    elif rule.clip or rule.kind == "percentile":
        pairs = [(0.0, 255.0)]
    low, high = np.array(pairs, np.float32).T
    return np.broadcast_to(low, channels), np.broadcast_to(high, channels)


def logits_of(model: Callable[[NDArray[np.float32]], Logits], tiles: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return logits (N, K, H, W) of tiles (N, C, H, W); ``model`` takes batches of one tile."""
    return np.concatenate([model(tile[None]).copy() for tile in tiles])


def measure_parity(
    logits: NDArray[np.float32], expected: NDArray[np.float32], threshold: float, decoder: Decoder
) -> Parity:
    """Compare what the model's decoder makes of logits (N, K, H, W) and of the reference's ``expected``.

    Args:
        logits, expected: (N, K, H, W).
        threshold: probability above which a pixel is foreground.
        decoder: decoder of the model.
    """
    from scipy import ndimage

    differences = np.abs(decoder.probability(logits) - decoder.probability(expected))
    masks, references = decoder.mask(logits, threshold), decoder.mask(expected, threshold)
    objects = reference_objects = matched = 0
    for mask, reference in zip(masks, references, strict=True):
        labels, count = ndimage.label(mask)
        reference_labels, reference_count = ndimage.label(reference)
        objects, reference_objects = objects + count, reference_objects + reference_count
        matched += count_matches(labels, reference_labels)
    return Parity(
        max_dp=float(differences.max()),
        mean_dp=float(differences.mean()),
        flipped=float((masks != references).mean()),
        object_f1=2 * matched / (objects + reference_objects) if objects + reference_objects else 1.0,
        object_change=(objects - reference_objects) / max(1, reference_objects),
        objects=reference_objects,
    )


def count_matches(labels: NDArray[np.int32], reference: NDArray[np.int32]) -> int:
    """Count the pairs of objects in two label images (H, W) with IoU above 0.5; each object is in at most one pair."""
    width = int(reference.max()) + 1
    pairs, common = np.unique(labels.astype(np.int64) * width + reference, return_counts=True)
    ids, reference_ids = pairs // width, pairs % width
    sizes, reference_sizes = np.bincount(labels.ravel()), np.bincount(reference.ravel())
    union = sizes[ids] + reference_sizes[reference_ids] - common
    return int(np.count_nonzero((ids > 0) & (reference_ids > 0) & (common > 0.5 * union)))
