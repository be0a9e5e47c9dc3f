"""The 2018 Data Science Bowl as published: ``<id>/images/<id>.png`` and one mask file per nucleus, or run lengths.

Run lengths (``stage1_solution.csv``): column-major, counted from 1, ``ImageId, EncodedPixels, Height, Width``
(kaggle.com/c/data-science-bowl-2018).
"""

from __future__ import annotations

import csv
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.trainer.data.files import read_pixels
from cellseg_batch.trainer.data.sample import Annotation, Entry


def list_dsb2018(folder: Path) -> list[Entry]:
    """Every image folder below ``folder``, with masks as files or in any ``*.csv`` of run lengths beside them."""
    encoded = _run_lengths(folder)
    entries = []
    for path in sorted(path for path in folder.iterdir() if (path / "images").is_dir()):
        if (path / "masks").is_dir():
            entries.append(Entry(path.name, "", "", partial(_read_masks, path)))
        elif path.name in encoded:
            entries.append(Entry(path.name, "", "", partial(_read_encoded, path, encoded[path.name])))
    return entries


def decode_runs(runs: str, height: int, width: int) -> NDArray[np.bool_]:
    """The mask (H, W) of one object from its run lengths.

    Raises:
        ValueError: a run lies outside the image, or the runs are no pairs of numbers.
    """
    numbers = np.array(runs.split(), np.int64)
    if numbers.size % 2:
        raise ValueError("run lengths come in pairs")
    starts, lengths = numbers[::2] - 1, numbers[1::2]
    if numbers.size and (starts.min() < 0 or (starts + lengths).max() > height * width):
        raise ValueError(f"a run lies outside the image of {height} x {width} px")
    flat = np.zeros(height * width, bool)
    for start, length in zip(starts, lengths, strict=True):
        flat[start : start + length] = True
    return flat.reshape(width, height).T


def merge_masks(masks: list[NDArray[np.bool_]], shape: tuple[int, int]) -> NDArray[np.int32]:
    """One instance map from masks of single objects; of two that overlap the smaller one is on top.

    Raises:
        ValueError: a mask is empty, of another size, or hidden by others.
    """
    labels = np.zeros(shape, np.int32)
    for number, mask in enumerate(sorted(masks, key=np.count_nonzero, reverse=True), start=1):
        if mask.shape != shape:
            raise ValueError(f"a mask is {mask.shape} px, the image {shape}")
        if not mask.any():
            raise ValueError("a mask is empty")
        labels[mask] = number
    if len(np.unique(labels[labels > 0])) < len(masks):
        raise ValueError("overlapping masks hide one of them")
    return labels


def _read_masks(folder: Path) -> Annotation:
    image = _read_image(folder)
    files = sorted(path for path in (folder / "masks").iterdir() if not path.name.startswith("."))
    return Annotation(image, merge_masks([_read_mask(path) for path in files], image.shape[:2]))


def _read_mask(path: Path) -> NDArray[np.bool_]:
    """The mask of one object.

    Raises:
        ValueError: it has several values, so that it may show several objects.
    """
    mask: NDArray[Any] = read_pixels(path)
    if mask.ndim == 3:  # the last of two or four channels is the opacity
        mask = mask[..., : mask.shape[-1] - (mask.shape[-1] in (2, 4))].max(axis=-1)
    values = np.unique(mask[mask > 0])
    if len(values) > 1:
        raise ValueError(
            f"masks/{path.name} has {len(values)} values besides 0, where a file shows one object; save a map of "
            "several as one file of labels/, beside images/"
        )
    shown: NDArray[np.bool_] = mask > 0
    return shown


def _read_encoded(folder: Path, runs: list[str]) -> Annotation:
    image = _read_image(folder)
    height, width = image.shape[:2]
    return Annotation(
        image, merge_masks([decode_runs(mask_runs, height, width) for mask_runs in runs], (height, width))
    )


def _read_image(folder: Path) -> NDArray[np.generic]:
    files = sorted((folder / "images").glob("*.png"))
    if len(files) != 1:
        raise FileNotFoundError(f"{folder.name}/images holds {len(files)} PNG files, not one")
    image: NDArray[np.generic] = read_pixels(files[0])
    return image


def _run_lengths(folder: Path) -> dict[str, list[str]]:
    runs: dict[str, list[str]] = defaultdict(list)
    for path in sorted(folder.glob("*.csv")):
        with open(path, newline="") as stream:
            for row in csv.DictReader(stream):
                if "ImageId" in row and row.get("EncodedPixels", "").strip():
                    runs[row["ImageId"]].append(row["EncodedPixels"])
    return runs
