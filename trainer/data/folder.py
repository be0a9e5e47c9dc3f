"""A plain folder pair: ``images/`` and ``labels/`` (instance maps) or ``masks/`` (binary), matched by name.

An optional ``index.csv`` has the columns ``id`` and, if known, ``split`` and ``group`` (the kind of image).
"""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path

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
    binary = annotations.name == "masks"
    return [
        Entry(
            name=row["id"],
            kind=row.get("group") or row.get("cell_type") or "",
            split=row.get("split") or row.get("orig_split") or "",
            read=partial(_read, images.get(row["id"]), marks.get(row["id"]), row["id"], binary),
        )
        for row in rows
    ]


def _read(
    image: Path | None, marks: Path | None, name: str, binary: bool
) -> tuple[NDArray[np.generic], NDArray[np.int32]]:
    if image is None or marks is None:
        raise FileNotFoundError(f"no {'image' if image is None else 'annotation'} named {name}")
    labels = imread(marks)
    if labels.ndim != 2:
        raise ValueError(f"{marks.name} is no single-channel map: shape {labels.shape}")
    if binary:
        labels = ndimage.label(labels > 0)[0]
    return imread(image), labels.astype(np.int32)
