"""Write slides to measure on from real pictures of nuclei, with the same pixels on every machine."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from skimage.io import imread

_PIECE = 256
PATTERN = 4096
_FIELD = 1080

Pieces = list[tuple[NDArray[np.uint8], NDArray[np.integer[Any]] | None]]
"""Square pictures (n, n, 3) of equal size, each with its true instance map (n, n), or None if that is unknown."""


@dataclass(frozen=True)
class Form:
    """Size, storage and content of a square slide.

    Attributes:
        side: side of the slide in px.
        dtype: uint8 means three channels, red, green and blue; uint16 means a single channel.
        chunk: side of a chunk in px.
        shard: side of a shard in px; 0 writes no shards.
        levels: number of levels of the pyramid.
        tissue: share of the slide that shows cells, a square in its middle; the rest is background.
    """

    side: int
    dtype: str = "uint8"
    chunk: int = 512
    shard: int = 0
    levels: int = 1
    tissue: float = 1.0


def shipped_pieces() -> Pieces:
    """Pieces of the fluorescence pictures that ship with the package; their truth is unknown."""
    folder = Path(str(files("cellseg_batch.engine"))) / "assets" / "gate"
    pictures = [imread(path) for path in sorted(folder.glob("fluorescence_small_*.png"))]
    return [
        (np.repeat(picture[y : y + _PIECE, x : x + _PIECE, None], 3, axis=2), None)
        for picture in pictures
        for y in range(0, picture.shape[0], _PIECE)
        for x in range(0, picture.shape[1], _PIECE)
    ]


def write_slide(path: Path, form: Form, pieces: Pieces) -> Path:
    """Write an OME-Zarr 0.5 image of ``form`` to ``path``, and its true objects, if known, to ``labels/truth``.

    The pieces fill a pattern of 4096 px at random, with a fixed seed. A larger slide repeats the pattern, each repeat
    with ids of its own.
    """
    pixels, truth = _pattern(min(form.side, PATTERN), pieces)
    group = zarr.open_group(str(path), mode="w", zarr_format=3)
    images = _create_levels(group, form)
    if truth is not None:
        square = (form.side, form.side)
        _repeat(
            truth, group.create_array("labels/truth", shape=square, dtype="uint32", chunks=(form.chunk, form.chunk))
        )
    for y in range(0, form.side, PATTERN):
        height = min(PATTERN, form.side - y)
        band = np.tile(pixels, (1, 1, -(-form.side // pixels.shape[2])))[:, :height, : form.side]
        _clear_background(band, y, form)
        for level, image in enumerate(images):
            step = 2**level
            image[:, y // step : (y + height) // step] = _stored(band, form.dtype)[:, ::step, ::step]
    return path


def write_plate(path: Path, fields: int, pieces: Pieces) -> Path:
    """Write an HCS plate of ``fields`` uint16 fields of 1080 x 1080 px, ten fields per well."""
    pixels, _ = _pattern(PATTERN, pieces)
    wells = [(chr(ord("A") + well // 10), str(well % 10 + 1)) for well in range(-(-fields // 10))]
    plate = zarr.open_group(str(path), mode="w", zarr_format=3)
    rows, columns = sorted({row for row, _ in wells}), sorted({column for _, column in wells}, key=int)
    plate.attrs["ome"] = {
        "version": "0.5",
        "plate": {
            "name": path.stem,
            "rows": [{"name": row} for row in rows],
            "columns": [{"name": column} for column in columns],
            "wells": [
                {"path": f"{row}/{column}", "rowIndex": rows.index(row), "columnIndex": columns.index(column)}
                for row, column in wells
            ],
        },
    }
    form = Form(_FIELD, "uint16", chunk=_FIELD)
    rng = np.random.default_rng(0)
    for number, (row, column) in enumerate(wells):
        count = min(10, fields - 10 * number)
        well = plate.create_group(f"{row}/{column}")
        well.attrs["ome"] = {"version": "0.5", "well": {"images": [{"path": str(i)} for i in range(count)]}}
        for field in range(count):
            y, x = rng.integers(0, PATTERN - _FIELD, 2)
            (image,) = _create_levels(well.create_group(str(field)), form)
            image[...] = _stored(pixels[:, y : y + _FIELD, x : x + _FIELD], form.dtype)
    return path


def _repeat(truth: NDArray[np.uint32], out: zarr.Array[Any]) -> None:
    """Fill ``out`` with repeats of the pattern's objects, each repeat with ids of its own."""
    side, highest = out.shape[0], truth.max()
    for number, (y, x) in enumerate(product(range(0, side, PATTERN), repeat=2)):
        part = truth[: side - y, : side - x]
        out[y : y + PATTERN, x : x + PATTERN] = np.where(part > 0, part + np.uint32(number) * highest, 0)


def _pattern(side: int, pieces: Pieces) -> tuple[NDArray[np.uint8], NDArray[np.uint32] | None]:
    """Compose pixels (3, side, side) and true objects (side, side) from pieces, turned and mirrored at random."""
    rng = np.random.default_rng(1)
    pixels = np.empty((3, side, side), np.uint8)
    truth = np.zeros((side, side), np.uint32) if all(labels is not None for _, labels in pieces) else None
    piece = len(pieces[0][0])
    highest = 0
    for y, x in product(range(0, side, piece), repeat=2):
        picture, labels = pieces[int(rng.integers(len(pieces)))]
        turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))
        window = np.s_[y : y + piece, x : x + piece]
        target = pixels[:, *window]
        target[...] = np.moveaxis(_turned(picture, turns, mirrored), -1, 0)[:, : target.shape[1], : target.shape[2]]
        if truth is not None and labels is not None:
            turned = _turned(labels, turns, mirrored)[: target.shape[1], : target.shape[2]]
            truth[window] = np.where(turned > 0, turned + highest, 0)
            highest += int(labels.max())
    return pixels, truth


def _turned(picture: NDArray[Any], turns: int, mirrored: bool) -> NDArray[Any]:
    return np.rot90(picture[:, ::-1] if mirrored else picture, turns)


def _clear_background(band: NDArray[np.uint8], y: int, form: Form) -> None:
    """Make everything outside the tissue dark, with a little noise.

    Args:
        band: (3, h, w) rows of the slide; changed in place.
        y: first row of the band in px of the slide.
        form: size and tissue of the slide.
    """
    edge = round(form.side * (1 - form.tissue**0.5) / 2)
    if not edge:
        return
    noise = np.random.default_rng(y).normal(np.percentile(band, 1), 1, band.shape[1:]).clip(0, 255).astype(np.uint8)
    outside = np.ones(band.shape[1:], np.bool_)
    outside[max(0, edge - y) : max(0, form.side - edge - y), edge : form.side - edge] = False
    band[:, outside] = noise[outside]


def _stored(band: NDArray[np.uint8], dtype: str) -> NDArray[Any]:
    return band if dtype == "uint8" else band[:1].astype(np.uint16) * 257


def _create_levels(group: zarr.Group, form: Form) -> list[zarr.Array[Any]]:
    """Create the empty arrays of an image, a level each, and its metadata."""
    arrays, datasets = [], []
    for level in range(form.levels):
        side = form.side // 2**level
        chunk = min(form.chunk, side)
        array = group.create_array(
            str(level),
            shape=(3 if form.dtype == "uint8" else 1, side, side),
            dtype=form.dtype,
            chunks=(1, chunk, chunk),
            shards=(1, form.shard, form.shard) if form.shard else None,
            dimension_names=("c", "y", "x"),
        )
        arrays.append(array)
        scale = [1.0, 0.5 * 2**level, 0.5 * 2**level]
        datasets.append({"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
    axes = [{"name": "c", "type": "channel"}]
    axes += [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "yx"]
    multiscale: Any = {"name": "bench", "axes": axes, "datasets": datasets}
    group.attrs["ome"] = {"version": "0.5", "multiscales": [multiscale]}
    return arrays
