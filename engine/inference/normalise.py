"""Settle a slide's normalisation before its first block: once per slide, never per tile.

The pixels are sampled from a low level of the pyramid, or from a fixed grid of windows if it has none, so that
the cost does not grow with the slide and the same slide always gives the same bounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.errors import ReadError
from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.slides.reader import SlideReader
from cellseg_batch.engine.slides.slide import Slide
from cellseg_batch.trainer.card import Normalisation

_ENOUGH_PIXELS = 1 << 20
_MAX_VALUES = 1 << 22
_WINDOW = 128
_PLANES = 8


@dataclass(frozen=True)
class Bounds:
    """Pixel values of a slide that become 0 and 1 by ``(x - low) / (high - low)`` in float32.

    Attributes:
        low: value that becomes 0; one for all channels or one for each.
        high: value that becomes 1; as low.
        clip: whether the result is clipped to [0, 1].
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    clip: bool = True

    @property
    def scale(self) -> tuple[float, ...]:
        """1 / (high - low); 0 for a channel of a single value, all of whose pixels become 0."""
        pairs = zip(self.low, self.high, strict=True)
        return tuple(1.0 / (high - low) if high > low else 0.0 for low, high in pairs)

    def __str__(self) -> str:
        """The values in words."""
        return ", ".join(f"{low:g}-{high:g}" for low, high in zip(self.low, self.high, strict=True))


def sample_slide(reader: SlideReader) -> list[NDArray[Any]]:
    """Return parts (C, h, w) that represent a whole slide, in the stored dtype, of the reader's level or a lower one.

    Raises:
        ReadError: none of the sampled pixels can be read.
    """
    slide, channels = reader.slide, reader.channels
    level = _sampling_level(slide, reader.level)
    count = slide.planes(level)
    planes = sorted({round(i) for i in np.linspace(0, count - 1, min(count, _PLANES))})
    limit = _MAX_VALUES // len(channels) // len(planes)
    boxes = list(product(planes, _boxes_of_plane(*slide.plane_shape(level), limit=limit)))
    with nullcontext(reader) if level == reader.level else SlideReader(slide, level, channels) as sampled:
        parts = [part for plane, box in boxes for part in _readable(sampled, plane, box)]
        if not parts:
            sampled.read(*boxes[0])  # raises the reason
    return parts


def settle_bounds(reader: SlideReader, rule: Normalisation) -> Bounds:
    """Return a slide's bounds by the model card's rule, shared by all planes.

    Raises:
        ReadError: see `sample_slide`.
    """
    return bounds_of_sample(sample_slide(reader) if rule.asks_slide else [], rule)


def bounds_of_sample(sample: list[NDArray[Any]], rule: Normalisation) -> Bounds:
    """Return the bounds of parts (C, h, w) that represent a slide by the model card's rule."""
    if not rule.asks_slide:
        return Bounds(rule.low, rule.high, rule.clip)
    sources = sample[0].shape[0]
    count = len(rule.low) if rule.joint or len(rule.low) > 1 else sources

    def values_of(channel: int) -> NDArray[Any]:
        """Finite pixels of a channel, or of all; one channel stands for all of the model's."""
        chosen = slice(None) if rule.joint else slice(min(channel, sources - 1), min(channel, sources - 1) + 1)
        return np.concatenate([_finite(part[chosen]) for part in sample])

    pairs = [rule.bounds_of(values_of(channel), channel) for channel in range(count)]
    return Bounds(tuple(low for low, _ in pairs), tuple(high for _, high in pairs), rule.clip)


def _readable(reader: SlideReader, plane: int, box: Box) -> Iterator[NDArray[Any]]:
    """Yield the pixels of ``box``; if it is damaged, read its quarters, so that a bad chunk does not fail the slide."""
    try:
        yield reader.read(plane, box)
    except ReadError:
        height, width = box.shape
        if max(height, width) > _WINDOW // 2:
            middle_y, middle_x = box.y0 + (height + 1) // 2, box.x0 + (width + 1) // 2
            for y0, y1 in ((box.y0, middle_y), (middle_y, box.y1)):
                for x0, x1 in ((box.x0, middle_x), (middle_x, box.x1)):
                    if y0 < y1 and x0 < x1:
                        yield from _readable(reader, plane, Box(y0, x0, y1, x1))


def _sampling_level(slide: Slide, level: int) -> int:
    """Return the lowest resolution, from ``level`` downwards, that still has enough pixels."""
    large_enough = [i for i in range(level, len(slide.levels)) if np.prod(slide.plane_shape(i)) >= _ENOUGH_PIXELS]
    return max(large_enough, default=level)


def _boxes_of_plane(height: int, width: int, limit: int) -> list[Box]:
    """Return one box for a plane of up to ``limit`` px, or windows spread evenly over a larger plane.

    Windows begin at multiples of their side, so that each lies in one chunk of the usual sizes.
    """
    if height * width <= limit:
        return [Box(0, 0, height, width)]
    count = max(2, math.isqrt(limit // _WINDOW**2))

    def starts(length: int) -> list[int]:
        return sorted({round(i / _WINDOW) * _WINDOW for i in np.linspace(0, max(0, length - _WINDOW), count)})

    return [
        Box(y, x, min(y + _WINDOW, height), min(x + _WINDOW, width)) for y, x in product(starts(height), starts(width))
    ]


def _finite(pixels: NDArray[Any]) -> NDArray[Any]:
    """Return the finite pixels as a flat array, as float32 unless they are integers of at most 16 bits."""
    if pixels.dtype.kind in "iu" and pixels.dtype.itemsize <= 2:
        return pixels.ravel()
    values = pixels.astype(np.float32).ravel()
    return values[np.isfinite(values)]
