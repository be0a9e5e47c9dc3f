"""LIVECell and other COCO data: ``*.json`` with polygons beside ``images/`` (Edlund et al. 2021).

The split is in the file's name (train, val, test).  doi 10.1038/s41592-021-01249-6
"""

from __future__ import annotations

import json
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.draw import polygon2mask

from cellseg_batch.trainer.data.dsb2018 import merge_masks
from cellseg_batch.trainer.data.files import read_pixels
from cellseg_batch.trainer.data.sample import Annotation, Entry

_SPLITS = ("train", "val", "test")


def list_coco(folder: Path) -> list[Entry]:
    """Every image that a COCO file in ``folder`` lists; its kind is the first part of its name (the cell line).

    Raises:
        ValueError: a file is no COCO file.
    """
    entries = []
    files = {path.name: path for path in (folder / "images").rglob("*") if path.is_file()}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text())
            images, annotations = content["images"], content["annotations"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path.name} is no COCO file: {error}") from error
        polygons: dict[int, list[Any]] = defaultdict(list)
        # LIVECell's own files hold a dictionary of annotations, COCO's a list.
        for annotation in annotations.values() if isinstance(annotations, dict) else annotations:
            polygons[annotation["image_id"]].append(annotation["segmentation"])
        split = next((name for name in _SPLITS if name in path.stem), "")
        for image in images:
            name = image["file_name"]
            reader = partial(_read, files.get(name), name, polygons[image["id"]])
            entries.append(Entry(Path(name).stem, name.partition("_")[0], split, reader))
    return entries


def _read(path: Path | None, name: str, cells: list[Any]) -> Annotation:
    if path is None:
        raise FileNotFoundError(f"images/ holds no {name}")
    image: NDArray[np.generic] = read_pixels(path)
    shape = image.shape[:2]
    return Annotation(image, merge_masks([_fill(polygons, shape) for polygons in cells], shape))


def _fill(polygons: list[list[float]], shape: tuple[int, int]) -> NDArray[np.bool_]:
    mask = np.zeros(shape, bool)
    for flat in polygons:
        # COCO counts from the corner of a pixel, scikit-image from its centre.
        corners = np.array(flat, float).reshape(-1, 2)[:, ::-1] - 0.5
        if len(corners) < 3 or (corners.max(axis=0) < 0).any() or (corners.min(axis=0) > shape).any():
            raise ValueError("a polygon lies outside the image or has fewer than three corners")
        mask |= polygon2mask(shape, corners)
    return mask
