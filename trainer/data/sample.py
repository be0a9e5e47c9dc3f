"""A sample: an image, its instance map and the distance target, kept small so that a data set fits in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from cellseg_batch.trainer.card import Normalisation

# Red, green, blue and the opacity.
_MOST_CHANNELS = 4


@dataclass(frozen=True)
class Sample:
    """One annotated image.

    Attributes:
        name: the image's id.
        kind: the kind of image it is, "" when unknown.
        image: (H, W, C) with C 1 or 3, as stored.
        bounds: pixel values that become 0 and 1.
        labels: (H, W) int32 instance map, 0 is background.
        distance: (H, W) uint8, distance to the instance's edge, 255 at each instance's deepest point.
    """

    name: str
    kind: str
    image: NDArray[np.generic]
    bounds: tuple[float, float]
    labels: NDArray[np.int32]
    distance: NDArray[np.uint8]

    @property
    def pixels(self) -> NDArray[np.float32]:
        """(H, W, 3) float32 in [0, 1]; a grey image three times."""
        scaled = normalise(self.image, self.bounds)
        return np.repeat(scaled, 3, axis=-1) if scaled.shape[-1] == 1 else scaled


@dataclass(frozen=True)
class Problem:
    """An image that cannot be used, and why."""

    file: str
    reason: str


@dataclass(frozen=True)
class Entry:
    """An annotated image that is not read yet.

    Attributes:
        name: the image's id.
        kind: the kind of image it is, "" when unknown.
        split: train, val or test; "" when the publisher does not say.
        read: gives the image (H, W) or (H, W, C) and its instance map (H, W); raises ValueError or OSError when the
            annotation is bad.
    """

    name: str
    kind: str
    split: str
    read: Callable[[], tuple[NDArray[np.generic], NDArray[np.int32]]]


def make_sample(entry: Entry, rule: Normalisation) -> Sample:
    """Read an entry and derive what training needs.

    Raises:
        ValueError: image and annotation differ in size, or the image is neither grey nor in colours.
        OSError: a file is missing or damaged.
    """
    image, labels = entry.read()
    if image.ndim not in (2, 3) or image.shape[:2] != labels.shape:
        raise ValueError(f"the image is {image.shape}, its labels {labels.shape}")
    if image.ndim == 3 and image.shape[-1] > _MOST_CHANNELS:
        raise ValueError(f"the image has {image.shape[-1]} channels; save one or three of them")
    channels = image[..., None] if image.ndim == 2 else image[..., : 3 if image.shape[-1] >= 3 else 1]
    if channels.shape[-1] == 3 and (channels == channels[..., :1]).all():
        channels = channels[..., :1]
    return Sample(
        name=entry.name,
        kind=entry.kind,
        image=np.ascontiguousarray(channels),
        bounds=rule.bounds_of(channels),
        labels=labels,
        distance=np.round(255 * instance_distance(labels)).astype(np.uint8),
    )


def instance_distance(labels: NDArray[np.int32]) -> NDArray[np.float32]:
    """Distance to the edge of each instance, divided by the instance's largest: (H, W) float32 in [0, 1]."""
    distance = np.zeros(labels.shape, np.float32)
    windows: list[tuple[slice, slice] | None] = ndimage.find_objects(labels)
    for index, window in enumerate(windows, start=1):
        if window is None:
            continue
        inside = labels[window] == index
        depth: NDArray[np.float64] = ndimage.distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1]
        distance[window][inside] = (depth / depth.max())[inside]
    return distance


def normalise(image: NDArray[np.generic], bounds: tuple[float, float]) -> NDArray[np.float32]:
    """``clip((image - low) / (high - low), 0, 1)`` in float32."""
    low, high = bounds
    span = high - low or 1.0
    scaled: NDArray[np.float32] = (image.astype(np.float32) - np.float32(low)) / np.float32(span)
    return np.clip(scaled, 0, 1)
