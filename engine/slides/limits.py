"""Shapes that no microscope makes: a few bytes of metadata may claim any number of pixels, so they are held to bounds.

It looks at what metadata say and reads no pixel.
"""

from __future__ import annotations

import math

import numpy as np

from cellseg_batch.engine.slides.slide import Slide

# A whole slide of 15 x 15 cm at 0.25 µm per pixel.
MOST_PLANE_PIXELS = 600_000**2
MOST_PIXELS = 10**15
# Decoded whole by whoever reads a single pixel of it.
MOST_CHUNK_BYTES = 4 << 30


def absurdity(slide: Slide) -> str | None:
    """Why ``slide`` cannot be what it says it is, in one line with the numbers; None if it can."""
    itemsize = np.dtype(slide.dtype).itemsize
    for index, level in enumerate(slide.levels):
        height, width = slide.plane_shape(index)
        chunk = math.prod(level.chunks) * itemsize
        for found, most, what in (
            (height * width, MOST_PLANE_PIXELS, f"px in a plane of {height} x {width}"),
            (math.prod(level.shape), MOST_PIXELS, f"px in shape {level.shape}"),
            (chunk, MOST_CHUNK_BYTES, f"bytes in one chunk of {' x '.join(map(str, level.chunks))} once decoded"),
        ):
            if found > most:
                return (
                    f"expected at most {most} {what}, found {found} (likely damaged metadata or a decompression bomb); "
                    f"write level {level.path or index} again in smaller pieces"
                )
    return None
