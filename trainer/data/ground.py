"""Ground: boxes of images that show no nucleus, such as glass, ink and torn keratin, listed in ``ground.csv``.

Its columns are ``image`` (a path from the file's folder), ``y0``, ``x0``, ``y1`` and ``x1`` (px, half-open), and
``kind``: the kind of image that the box is drawn together with; ``ground`` without.  All of it is for training: scores
on pictures without nuclei say little.
"""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path

import numpy as np

from cellseg_batch.trainer.data.files import read_pixels
from cellseg_batch.trainer.data.sample import Annotation, Entry

GROUND_FILE = "ground.csv"


def list_ground(folder: Path) -> list[Entry]:
    """Every box of ``folder/ground.csv``, in its order.

    Raises:
        ValueError: a column is missing, or a bound is no number.
    """
    with open(folder / GROUND_FILE, newline="") as stream:
        rows = list(csv.DictReader(stream))
    entries = []
    for number, row in enumerate(rows, 1):
        try:
            image, (y0, x0, y1, x1) = row["image"], (int(row[bound]) for bound in ("y0", "x0", "y1", "x1"))
        except (KeyError, TypeError, ValueError) as error:
            where = f"{folder / GROUND_FILE}, row {number}"
            raise ValueError(f"{where}: expected image, y0, x0, y1, x1: {error}") from error
        read = partial(_read, folder / image, (slice(y0, y1), slice(x0, x1)))
        entries.append(Entry(f"{image} {y0}-{y1}, {x0}-{x1}", row.get("kind") or "ground", "train", read))
    return entries


def _read(path: Path, box: tuple[slice, slice]) -> Annotation:
    image = read_pixels(path)
    part = image[box]
    if part.shape[:2] != tuple(side.stop - side.start for side in box):
        raise ValueError(f"the box reaches beyond the image of {image.shape[0]} x {image.shape[1]} px")
    nothing = np.zeros(part.shape[:2], np.int32)
    return Annotation(part, nothing, classes=nothing)
