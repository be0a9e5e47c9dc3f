"""A sample: an image, its maps and the distance target, kept small so that a data set fits in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.transform import resize

from cellseg_batch.trainer.card import Normalisation
from cellseg_batch.trainer.data.classes import check_classes

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
        classes: (H, W) numbers of the pixels' classes, 0 is background; None if nobody told classes apart.
        has_objects: whether the instances were told apart; else they are the components of the classes' pixels.
        width: median diameter in px of disks as large as the instances; 0 without any.
    """

    name: str
    kind: str
    image: NDArray[np.generic]
    bounds: tuple[float, float]
    labels: NDArray[np.int32]
    distance: NDArray[np.uint8]
    classes: NDArray[np.integer] | None = None
    has_objects: bool = True
    width: float = 0.0

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


class Annotation(NamedTuple):
    """What the files of an annotated image hold.

    Attributes:
        image: (H, W) or (H, W, C).
        labels: (H, W) int32 instance map.
        classes: values of the class map (H, W); None if there is none.
        has_objects: as in `Sample`.
    """

    image: NDArray[np.generic]
    labels: NDArray[np.int32]
    classes: NDArray[np.generic] | None = None
    has_objects: bool = True


@dataclass(frozen=True)
class Entry:
    """An annotated image that is not read yet.

    Attributes:
        name: the image's id.
        kind: the kind of image it is, "" when unknown.
        split: train, val or test; "" when the publisher does not say.
        read: gives the annotation; raises ValueError or OSError when it is bad.
    """

    name: str
    kind: str
    split: str
    read: Callable[[], Annotation]


def make_sample(entry: Entry, rule: Normalisation, classes: int = 0) -> Sample:
    """Read an entry and derive what training needs.

    Args:
        entry: the annotated image.
        rule: how its pixels become the network's input.
        classes: number of classes that class maps may hold.

    Raises:
        ValueError: image and annotation differ in size, the image is neither grey nor in colours, or its class map
            holds something else than classes.
        OSError: a file is missing or damaged.
    """
    image, labels, class_map, has_objects = entry.read()
    if image.ndim not in (2, 3) or image.shape[:2] != labels.shape:
        raise ValueError(f"the image is {image.shape}, its labels {labels.shape}")
    if class_map is not None and class_map.shape != labels.shape:
        raise ValueError(f"the image is {image.shape}, its class map {class_map.shape}")
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
        classes=None if class_map is None else check_classes(class_map, classes),
        has_objects=has_objects,
        width=_median_width(labels),
    )


def _median_width(labels: NDArray[np.int32]) -> float:
    areas = np.bincount(labels.ravel())[1:]
    return float(2 * np.sqrt(np.median(areas[areas > 0]) / np.pi)) if areas.any() else 0.0


def rescale(sample: Sample, factor: float) -> Sample:
    """Magnify a sample by ``factor``: its image bilinearly (smoothed first if it shrinks), its maps by nearest."""
    shape = tuple(round(side * factor) for side in sample.labels.shape)

    def magnify(values: NDArray[np.integer]) -> NDArray[Any]:
        magnified: NDArray[Any] = resize(values, shape, order=0, preserve_range=True, anti_aliasing=False)
        return magnified.astype(values.dtype)

    image = resize(sample.image, shape, order=1, preserve_range=True, anti_aliasing=factor < 1)
    labels = magnify(sample.labels)
    return replace(
        sample,
        image=image.astype(np.float32),
        labels=labels,
        distance=np.round(255 * instance_distance(labels)).astype(np.uint8),
        classes=None if sample.classes is None else magnify(sample.classes),
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
