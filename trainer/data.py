"""Annotated images: an ``images/`` + ``labels/`` folder pair with an ``index.csv`` that fixes the split.

A sample is an image scaled to [0, 1] by the normalisation rule, its instance map and the distance target.
This module knows files and arrays; it does not know networks, losses or augmentation.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.io import imread

from cellseg_batch.trainer.bundle import Normalisation


@dataclass(frozen=True)
class Sample:
    """One annotated image.

    Attributes:
        name: the image's id.
        kind: the kind of image it is (``group`` in the index), "" when unknown.
        pixels: (H, W, 3) float32 in [0, 1].
        labels: (H, W) int32 instance map, 0 is background.
        distance: (H, W) float32, distance to the instance's edge, 1 at each instance's deepest point.
    """

    name: str
    kind: str
    pixels: NDArray[np.float32]
    labels: NDArray[np.int32]
    distance: NDArray[np.float32]


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


def normalise(image: NDArray[np.generic], rule: Normalisation) -> NDArray[np.float32]:
    """Scale a whole image to [0, 1] by the model card's rule, the same for all its channels."""
    pixels: NDArray[np.float32] = image.astype(np.float32)
    low, high = rule.bounds_of(pixels)
    span = high - low or 1.0
    scaled: NDArray[np.float32] = np.clip((pixels - np.float32(low)) / np.float32(span), 0, 1)
    return scaled


def load_samples(folder: Path, split: str, rule: Normalisation) -> list[Sample]:
    """Every image of ``split`` in ``folder``, in the order of its ``index.csv``.

    The index has the columns ``id``, ``split`` and, optionally, ``group``; pixels lie in
    ``images/<id>.png`` (RGB or grey), instance maps in ``labels/<id>.png``.

    Raises:
        FileNotFoundError: the index or a listed file is missing.
        ValueError: an image and its instance map differ in size.
    """
    with open(folder / "index.csv", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["split"] == split]
    samples = []
    for row in rows:
        image = imread(folder / "images" / f"{row['id']}.png")
        labels = imread(folder / "labels" / f"{row['id']}.png").astype(np.int32)
        if image.shape[:2] != labels.shape:
            raise ValueError(f"{row['id']}: the image is {image.shape[:2]} px, its labels {labels.shape} px")
        colour = np.repeat(image[..., None], 3, axis=-1) if image.ndim == 2 else image[..., :3]
        samples.append(
            Sample(row["id"], row.get("group", ""), normalise(colour, rule), labels, instance_distance(labels))
        )
    return samples
