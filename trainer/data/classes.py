"""The classes of annotated images: named in ``classes.csv``, drawn in the maps of ``classes/`` beside ``images/``.

The columns of ``classes.csv`` are ``value``, ``name`` and, if wanted, ``colour`` (``#rrggbb``).  Values are those of
the maps' pixels, from 1 on; 0 is background.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.trainer.card import BACKGROUND, NO_CLASS, ModelClass, class_colours

CLASSES_FILE, CLASSES_FOLDER = "classes.csv", "classes"
_MOST = 255


def read_classes(folder: Path) -> tuple[ModelClass, ...]:
    """The classes that ``folder/classes.csv`` names, in the order of their values; () without such a file.

    Raises:
        ValueError: a column is missing, names repeat, a colour is none, or the values are not 1, 2, 3 and so on.
    """
    path = folder / CLASSES_FILE
    if not path.is_file():
        return ()
    with open(path, newline="") as stream:
        rows = list(csv.DictReader(stream))
    try:
        by_value = {int(row["value"]): row for row in rows}
        names = [by_value[value]["name"].strip() for value in range(1, 1 + len(rows))]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected the columns value and name, with the values 1, 2, 3, ...: {error}"
        ) from error
    if not 1 <= len(names) <= _MOST or len({"", BACKGROUND, NO_CLASS, *names}) < len(names) + 3:
        raise ValueError(
            f"{path}: expected 1 to {_MOST} names of their own, other than {BACKGROUND}, found "
            f"{', '.join(names) or 'none'}"
        )
    colours = class_colours(len(names))
    given = [(by_value[value].get("colour") or "").strip().lower() for value in range(1, 1 + len(names))]
    try:
        return tuple(map(ModelClass, names, (own or usual for own, usual in zip(given, colours, strict=True))))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check_classes(classes: NDArray[np.generic], count: int) -> NDArray[np.uint8]:
    """The class of each pixel of a map (H, W), 0 for background.

    Args:
        classes: values of the map's file.
        count: number of classes that ``classes.csv`` names.

    Raises:
        ValueError: a value is the number of no class.
    """
    if not count and classes.any():
        raise ValueError(f"it has a class map, and no {CLASSES_FILE} names the classes")
    wrong = classes[~np.isin(classes, np.arange(1 + count))]
    if wrong.size:
        raise ValueError(f"its class map holds the value {wrong[0]}, and {CLASSES_FILE} names those from 1 to {count}")
    return classes.astype(np.uint8)
