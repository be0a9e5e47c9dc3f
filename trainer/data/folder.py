"""A plain folder pair: ``images/`` and ``labels/`` (instance maps) or ``masks/`` (binary or instance maps), by name.

``classes/`` (class maps) may stand beside them or instead of them; then instances are the components of the classes'
pixels.

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

from cellseg_batch.trainer.data.classes import CLASSES_FOLDER
from cellseg_batch.trainer.data.files import files_by_stem, read_map, read_pixels
from cellseg_batch.trainer.data.sample import Annotation, Entry

ANNOTATIONS = ("labels", "masks", CLASSES_FOLDER)
"""Folders of annotations; the first that is there says what the objects are."""


def list_folder(folder: Path) -> list[Entry]:
    """Every image of ``folder/images``, in the order of the index; without one by name, then annotations alone.

    Raises:
        FileNotFoundError: there is no folder of labels, masks or classes.
    """
    kind = next((name for name in ANNOTATIONS if (folder / name).is_dir()), None)
    if kind is None:
        raise FileNotFoundError(f"{folder} has images/ but neither labels/ nor masks/ nor {CLASSES_FOLDER}/")
    images, marks = files_by_stem(folder / "images"), files_by_stem(folder / kind)
    class_maps = files_by_stem(folder / CLASSES_FOLDER) if (folder / CLASSES_FOLDER).is_dir() else {}
    index = folder / "index.csv"
    if index.exists():
        with open(index, newline="") as stream:
            rows = list(csv.DictReader(stream))
    else:
        rows = [{"id": name} for name in images | marks | class_maps]
    return [
        Entry(
            name=row["id"],
            kind=row.get("group") or row.get("cell_type") or "",
            split=row.get("split") or row.get("orig_split") or "",
            read=partial(
                _read,
                images.get(row["id"], []),
                marks.get(row["id"], []),
                class_maps.get(row["id"], []),
                row["id"],
                kind,
            ),
        )
        for row in rows
    ]


def _read(images: list[Path], marks: list[Path], class_maps: list[Path], name: str, kind: str) -> Annotation:
    image, mark = _only(images, "image", name), _only(marks, "annotation", name)
    values = read_map(mark)
    if kind == CLASSES_FOLDER:
        return Annotation(read_pixels(image), _components(values), values, has_objects=False)
    where = f"{mark.parent.name}/{mark.name}"
    labels = _instances_of_mask(values, where) if kind == "masks" else _ids(values, where)
    class_map = read_map(_only(class_maps, "class map", name)) if class_maps else None
    return Annotation(read_pixels(image), labels, class_map)


def _only(files: list[Path], kind: str, name: str) -> Path:
    """The only file of a name.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are several.
    """
    if not files:
        raise FileNotFoundError(f"no {kind} named {name}")
    if len(files) > 1:
        raise ValueError(f"several files are the {kind} named {name}: {', '.join(file.name for file in files)}")
    return files[0]


def _ids(labels: NDArray[Any], name: str) -> NDArray[np.int32]:
    """The instance map whose ids are the values of a file; ids that are large beside its size are numbered anew.

    Raises:
        ValueError: a value is no id.
    """
    wrong = labels[~(labels >= 0) | (labels != np.floor(labels))]
    if wrong.size:
        raise ValueError(f"{name} is no instance map: ids are whole numbers from 0, and it holds {wrong[0]}")
    if labels.max(initial=0) > labels.size:
        values, places = np.unique(labels, return_inverse=True)
        labels = places.reshape(labels.shape) + (values[0] > 0)
    return labels.astype(np.int32)


def _instances_of_mask(mask: NDArray[Any], name: str) -> NDArray[np.int32]:
    """The instance map of a file in ``masks/``: the components of a binary mask; the values of others are ids.

    Raises:
        ValueError: a value is no id, as in a mask that is binary but for the soft edges that JPEG and resizing leave.
    """
    values, counts = np.unique(mask[mask > 0], return_counts=True)
    if len(values) <= 1:
        return _components(mask)
    full = np.iinfo(mask.dtype).max if mask.dtype.kind in "iu" else 1
    if 2 * counts[values == full].sum() > counts.sum():
        raise ValueError(
            f"{name} is a mask with soft edges: {len(values)} values, most pixels {full}; set a threshold, and save it "
            "without loss"
        )
    return _ids(mask, name)


def _components(mask: NDArray[Any]) -> NDArray[np.int32]:
    components: NDArray[np.int32] = ndimage.label(mask > 0)[0]
    return components.astype(np.int32)
