"""Settle a slide's normalisation before its first block: once per slide, never per tile.

The pixels are sampled from a low level of the pyramid, or from a fixed grid of windows where there is none, so
that the cost does not grow with the slide and the same slide always gives the same bounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.reader import SlideReader
from cellseg_batch.engine.slides.slide import Slide
from cellseg_batch.trainer.bundle import Normalisation

_ENOUGH_PIXELS = 1 << 20
_WHOLE_PLANES_LIMIT = 1 << 22
_WINDOW = 256
_WINDOWS_PER_AXIS = 12
_PLANES = 8


@dataclass(frozen=True)
class Bounds:
    """Pixel values that become 0 and 1 of a slide; ``clip((x - low) / (high - low), 0, 1)`` in float32."""

    low: float
    high: float

    @property
    def scale(self) -> float:
        """1 / (high - low); 0 for a slide of one value, which becomes all 0."""
        return 1.0 / (self.high - self.low) if self.high > self.low else 0.0


def settle_bounds(slide: Slide, channels: tuple[int, ...], level: int, rule: Normalisation) -> Bounds:
    """The bounds of a slide by the model card's rule, the same for all channels and planes.

    Raises:
        ReadError: the sampled pixels cannot be read.
    """
    if rule.rule == "fixed":
        return Bounds(rule.low, rule.high)
    sampled = _sampling_level(slide, level)
    height, width = slide.plane_shape(sampled)
    count = slide.planes(sampled)
    planes = sorted({round(i * (count - 1) / max(1, min(count, _PLANES) - 1)) for i in range(min(count, _PLANES))})
    boxes = _sample_boxes(height, width, _WHOLE_PLANES_LIMIT // len(planes))
    with SlideReader(slide, sampled, channels) as reader:
        pixels = [_finite(reader.read(plane, box)) for plane in planes for box in boxes]
    return Bounds(*rule.bounds_of(np.concatenate(pixels)))


def _sampling_level(slide: Slide, level: int) -> int:
    """The lowest resolution at or below ``level`` that still has enough pixels."""
    enough = [i for i in range(level, len(slide.levels)) if np.prod(slide.plane_shape(i)) >= _ENOUGH_PIXELS]
    return max(enough, default=level)


def _sample_boxes(height: int, width: int, limit: int) -> list[Box]:
    if height * width <= limit:
        return [Box(0, 0, height, width)]
    corners = [
        sorted({round(i * max(0, length - _WINDOW) / (_WINDOWS_PER_AXIS - 1)) for i in range(_WINDOWS_PER_AXIS)})
        for length in (height, width)
    ]
    return [Box(y, x, min(y + _WINDOW, height), min(x + _WINDOW, width)) for y in corners[0] for x in corners[1]]


def _finite(pixels: NDArray[np.generic]) -> NDArray[np.float32]:
    values = pixels.astype(np.float32).ravel()
    return values[np.isfinite(values)]
