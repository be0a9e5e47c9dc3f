"""Lay out a converted image as OME-Zarr 0.5: axes in the specification's order, shards, halving levels, channel groups.

This module touches no file.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.slides.label_layout import Layout
from cellseg_batch.engine.slides.slide import Slide

_CHUNK = 512
_MOST_CHUNKS = 8  # largest number of chunks along a side of a shard
_READ_BYTES = 64 << 20  # bytes that a task reads at a time
_AXES = "tczyx"  # the order that the specification asks for


def lay_out_image(slide: Slide) -> Layout:
    """Lay out the storage of a converted slide; levels halve until a level fits into a chunk."""
    order = [slide.axes.index(axis) for axis in _AXES if axis in slide.axes]
    axes = "".join(slide.axes[i] for i in order)
    base = slide.levels[0]
    shape = [base.shape[i] for i in order]
    if "c" in axes:
        shape[axes.index("c")] = channel_count(slide)
    leading, (height, width) = tuple(shape[:-2]), shape[-2:]
    shapes: list[tuple[int, ...]] = [(*leading, height, width)]
    datasets = [(tuple(base.scale[i] for i in order), tuple(base.translation[i] for i in order))]
    while max(height, width) > _CHUNK:
        step = 2 if height > 1 else 1, 2 if width > 1 else 1
        height, width = height // step[0], width // step[1]
        shapes.append((*leading, height, width))
        scale, translation = datasets[-1]
        factors = (1,) * len(leading) + step
        # The centre of an averaged pixel lies between the centres of its source pixels.
        shifted = tuple(t + s * (f - 1) / 2 for t, s, f in zip(translation, scale, factors, strict=True))
        datasets.append((tuple(s * f for s, f in zip(scale, factors, strict=True)), shifted))
    chunks = min(_CHUNK, shapes[0][-2]), min(_CHUNK, shapes[0][-1])
    pixel_bytes = len(channel_groups(slide)[0]) * np.dtype(slide.dtype).itemsize
    most = max(1, min(_MOST_CHUNKS, math.isqrt(_READ_BYTES // pixel_bytes) // _CHUNK))
    # A shard of a coarser level is averaged from at most one full shard's area of the finer level.
    full, half = ((count * chunks[0], count * chunks[1]) for count in (most, max(1, most // 2)))
    return Layout(
        axes=axes,
        shapes=tuple(shapes),
        chunks=chunks,
        shards=(full,) + (half,) * (len(shapes) - 1),
        datasets=tuple(datasets),
        units=tuple(slide.units[i] for i in order),
        zarr_format=3,
        dtype=slide.dtype,
    )


def halve(pixels: NDArray[Any], shape: tuple[int, int]) -> NDArray[Any]:
    """Average boxes of 2 x 2 pixels, or of 2 pixels if an axis is not halved, in the same type; integers are rounded.

    Args:
        pixels: (h, w), as long as the result or at least twice as long along each axis; an odd last pixel is dropped.
        shape: (height, width) of the result in px.
    """
    step_y, step_x = (1 if length == source else 2 for length, source in zip(shape, pixels.shape, strict=True))
    corners = pixels[: shape[0] * step_y, : shape[1] * step_x].reshape(shape[0], step_y, shape[1], step_x)
    means: NDArray[Any] = corners.mean(axis=(1, 3))
    return (means if pixels.dtype.kind == "f" else np.rint(means)).astype(pixels.dtype)


def channel_count(slide: Slide) -> int:
    """Number of channels to convert; alpha is left out."""
    return slide.extent("c", 0) - slide.alpha


def channel_groups(slide: Slide) -> list[tuple[int, ...]]:
    """Group the channels that a chunk holds together; each group is read at once."""
    count = channel_count(slide)
    together = slide.levels[0].chunks[slide.axes.index("c")] if "c" in slide.axes else 1
    return [tuple(range(first, min(first + together, count))) for first in range(0, count, together)]
