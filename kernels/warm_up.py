"""Compile the kernels, or load them from their cache, before the first block, by calling each on a few pixels.

A kernel is compiled for the types of its arguments, so the calls here use the types of a run.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import DTypeLike

from cellseg_batch.kernels._compiling import telling
from cellseg_batch.kernels.expand import expand
from cellseg_batch.kernels.gather import gather
from cellseg_batch.kernels.instances import grow, label_seeds, reach, renumber
from cellseg_batch.kernels.moments import HALO, measure
from cellseg_batch.kernels.quality import survey
from cellseg_batch.kernels.stardist import OPEN, Stars, draw, suppress
from cellseg_batch.kernels.stitch import blend_mask, stitch_classes, stitch_probability
from cellseg_batch.kernels.tiling import TileGrid

_SIDE = 8


def compile_kernels(
    dtype: DTypeLike,
    *,
    probability: bool,
    blend: bool,
    classes: bool,
    instances: bool,
    stars: bool,
    cells: bool,
    objects: bool,
    compiling: Callable[[], None] = lambda: None,
) -> None:
    """Compile the kernels of a run; a plain mask of uint8 pixels needs none, so Numba is not imported for it.

    Args:
        dtype: dtype of the pixels as they are read, in native byte order.
        probability: whether the run makes the probability.
        blend: whether the run blends tiles.
        classes: whether the run tells classes of pixels apart.
        instances: whether the run grows instances.
        stars: whether the run makes stars.
        cells: whether the run expands nuclei into cells.
        objects: whether the run measures objects.
        compiling: called before each kernel that is not in the cache.
    """
    with telling(compiling):
        if np.dtype(dtype) != np.uint8:
            _gather(dtype)
        if probability:
            stitch_probability(_logits(), np.zeros((1, 6), np.int64), np.zeros((_SIDE, _SIDE), np.uint8))
        if blend:
            blend_mask(_logits(), TileGrid(1, 1, 2, 1, 1, 2, 2), 0.0, np.zeros((2, 2), np.uint8))
        if classes:
            stitch_classes(
                np.zeros((1, 2, 2, 2), np.float32), np.zeros((1, 6), np.int64), 0.0, np.zeros((2, 2), np.uint8)
            )
        if instances:
            _number_and_grow()
        if stars:
            _suppress_and_draw()
        if cells:
            expand(np.ones((_SIDE, _SIDE), np.uint32), 1.0)
        if objects:
            _measure(dtype)


def _logits() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.zeros((1, 1, _SIDE, _SIDE), np.float32)


def _gather(dtype: DTypeLike) -> None:
    indices = np.arange(_SIDE)[None]
    gather(np.zeros((1, _SIDE, _SIDE), dtype), indices, indices, 0.0, 1.0, _logits())


def _number_and_grow() -> None:
    pixel_codes, codes, steps = np.zeros((_SIDE, _SIDE), np.uint8), np.empty((_SIDE, _SIDE), np.uint32), 1
    label_seeds(pixel_codes, (_SIDE, _SIDE), 1, (False, False, False, False), codes)
    frame = reach(steps)
    around = np.pad(codes, frame)
    stored = codes.view()
    stored.flags.writeable = False  # like codes read from a file; Numba compiles for read-only arrays separately
    renumber(stored, np.arange(codes.max() + 1, dtype=np.uint32), around[frame:-frame, frame:-frame])
    grow(around, steps, codes)


def _suppress_and_draw() -> None:
    places, logits = np.arange(2, dtype=np.int32), np.zeros(2, np.float32)
    stars = Stars(places, places, logits, np.ones((2, 4), np.float32))
    suppress(stars, np.full(2, OPEN, np.uint8), np.zeros(2, np.bool_), 0.5)
    draw(stars, np.ones(2, np.uint32), np.zeros((_SIDE, _SIDE), np.uint32))


def _measure(dtype: DTypeLike) -> None:
    labels = np.ones((_SIDE + 2 * HALO, _SIDE + 2 * HALO), np.uint32)
    pixels = np.zeros((1, _SIDE, _SIDE), dtype)
    measure(labels, pixels, np.zeros((_SIDE, _SIDE), np.uint8), (0, 0))
    survey(pixels[0], (slice(0, _SIDE), slice(0, _SIDE)))
