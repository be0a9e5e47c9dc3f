"""Pixels that say where they are, and short ways to find and read them."""

import numpy as np

from cellseg_batch.engine.slides.discover import find_images
from cellseg_batch.engine.slides.reader import SlideReader


def coordinates(axes, shape, dtype="uint16"):
    """Pixels whose value says where they are: 1000 * (t or z) + 100 * c + 10 * y + x."""
    weight = {"t": 3000, "z": 1000, "c": 100, "y": 10, "x": 1}
    grids = np.meshgrid(*(np.arange(length) for length in shape), indexing="ij")
    return sum(weight[axis] * grid for axis, grid in zip(axes, grids, strict=True)).astype(dtype)


def read(slide, level, channels, plane, box):
    """The pixels (C, h, w) of a box."""
    with SlideReader(slide, level, channels) as reader:
        return reader.read(plane, box)


def only(path, **options):
    """The one image that a path holds."""
    (slide,) = find_images(path, **options)
    return slide
