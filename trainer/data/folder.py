"""A plain folder pair: ``images/`` and ``labels/`` (instance maps) or ``masks/`` (binary or instance maps), by name.

An optional ``index.csv`` has the columns ``id`` and, if known, ``split`` and ``group`` (the kind of image).
"""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.io import imread

from cellseg_batch.trainer.data.sample import Entry

_SUFFIXES = (".png", ".tif", ".tiff", ".jpg", ".jpeg")


def list_folder(folder: Path) -> list[Entry]:
    """Every image of ``folder/images``, in the order of the index or by name.

    Raises:
        FileNotFoundError: there is no folder of labels or masks.
    """
    annotations = folder / "labels" if (folder / "labels").is_dir() else folder / "masks"
    if not annotations.is_dir():
        raise FileNotFoundError(f"{folder} has images/ but neither labels/ nor masks/")
    images = {path.stem: path for path in sorted((folder / "images").iterdir()) if path.suffix.lower() in _SUFFIXES}
    marks = {path.stem: path for path in sorted(annotations.iterdir()) if path.suffix.lower() in _SUFFIXES}
    index = folder / "index.csv"
    if index.exists():
        with open(index, newline="") as stream:
            rows = list(csv.DictReader(stream))
    else:
        rows = [{"id": name} for name in images]
    masks = annotations.name == "masks"
    return [
        Entry(
            name=row["id"],
            kind=row.get("group") or row.get("cell_type") or "",
            split=row.get("split") or row.get("orig_split") or "",
            read=partial(_read, images.get(row["id"]), marks.get(row["id"]), row["id"], masks),
        )
        for row in rows
    ]


def _read(
    image: Path | None, marks: Path | None, name: str, masks: bool
) -> tuple[NDArray[np.generic], NDArray[np.int32]]:
    if image is None or marks is None:
        raise FileNotFoundError(f"no {'image' if image is None else 'annotation'} named {name}")
    labels = imread(marks)
    if labels.ndim != 2:
        raise ValueError(f"{marks.name} is no single-channel map: shape {labels.shape}")
    return imread(image), _instances_of_mask(labels, f"masks/{marks.name}") if masks else labels.astype(np.int32)


def _instances_of_mask(mask: NDArray[Any], name: str) -> NDArray[np.int32]:
    """The instance map of a file in ``masks/``: the components of a binary mask; the values of others are ids.

    Raises:
        ValueError: the mask is binary but for soft edges, as JPEG and resizing leave them, whose values are no ids.
    """
    values, counts = np.unique(mask[mask > 0], return_counts=True)
    if len(values) <= 1:
        components: NDArray[np.int32] = ndimage.label(mask > 0)[0]
        return components.astype(np.int32)
    full = np.iinfo(mask.dtype).max if mask.dtype.kind in "iu" else 1
    if 2 * counts[values == full].sum() > counts.sum():
        raise ValueError(
            f"{name} is a mask with soft edges: {len(values)} values, most pixels {full}; set a threshold, and save it "
            "without loss"
        )
    return mask.astype(np.int32)
