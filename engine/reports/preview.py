"""Draw a slide with the outlines of its labels as a picture about a screen wide, whatever the slide's size.

It reads the lowest resolution that is still large enough, strip by strip, so memory does not grow with the slide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cellseg_batch.engine.errors import ReadError, UsageError, writing_to
from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.run.output_paths import output_paths
from cellseg_batch.engine.slides.discover import find_images, first_slide
from cellseg_batch.engine.slides.level_and_channels import choose_channels
from cellseg_batch.engine.slides.ome_zarr import open_written
from cellseg_batch.engine.slides.reader import SlideReader
from cellseg_batch.engine.slides.slide import Slide
from cellseg_batch.trainer.outlines import outlined

_LONGEST = 1600
_STRIP_PIXELS = 1 << 24
# Percentiles of the shown pixels that become black and white, in images other than 8-bit RGB.
_BLACK, _WHITE = 0.5, 99.8


@dataclass(frozen=True)
class Preview:
    """Part and scale of the slide that a picture shows.

    Attributes:
        box: the part, in px of the labels' full resolution.
        level: level of the labels that was read.
        zoom: px of the picture per px of the labels' full resolution.
        shape: (height, width) of the picture in px.
    """

    box: Box
    level: int
    zoom: float
    shape: tuple[int, int]


def write_preview(
    path: Path,
    out: Path,
    sides: tuple[int, int, int, int] | None,
    name: str,
    output: Path | None,
    channel: str | None,
    axes: str | None,
) -> Preview:
    """Draw the middle t/z plane of the first image below ``path``, with its labels.

    Args:
        path: a path that holds a slide.
        out: the PNG to write.
        sides: y0, x0, y1, x1 of the part to show, in px of the labels' full resolution; None shows everything.
        name, output, channel, axes: as in the settings of the run that wrote the labels.

    Raises:
        UsageError: there is no image, or the box lies outside it.
        SlideError: the image or its labels cannot be read, or the picture cannot be written.
    """
    slide = first_slide(find_images(path, axes))
    paths = output_paths(slide, name, output)
    labels = open_written(paths.store, paths.labels)
    height, width = labels.plane_shape(0)
    box = Box(*sides or (0, 0, height, width))
    if not (0 <= box.y0 < box.y1 <= height and 0 <= box.x0 < box.x1 <= width):
        raise UsageError(
            f"`box={box.y0},{box.x0},{box.y1},{box.x1}`",
            expected=f"y0,x0,y1,x1 within 0,0,{height},{width} px",
            found="a box that is empty or sticks out",
            remedy="leave `box` out to see everything",
        )
    level = _pick_level(labels, box)
    shape = labels.plane_shape(level)
    window = Box(
        box.y0 * shape[0] // height,
        box.x0 * shape[1] // width,
        -(-box.y1 * shape[0] // height),
        -(-box.x1 * shape[1] // width),
    )
    step = -(-max(window.shape) // _LONGEST)
    steps = min(step, window.shape[0]), min(step, window.shape[1])
    channels = choose_channels(slide, channel).indices
    pixels = _read_thinned(slide, _matching_level(slide, shape), channels, window, steps, _mean)
    ids = _read_thinned(labels, level, (0,), window, steps, _nearest)[0]
    enlarge = max(1, _LONGEST // max(ids.shape))
    picture = np.repeat(_displayable(pixels, slide.rgb), 3 // len(pixels), axis=-1)
    picture, ids = (np.repeat(np.repeat(array, enlarge, 0), enlarge, 1) for array in (picture, ids))
    with writing_to(out, "a picture"):
        Image.fromarray(outlined(picture, ids)).save(out, format="PNG")
    return Preview(box, level, ids.shape[1] / (box.x1 - box.x0), (ids.shape[0], ids.shape[1]))


def _pick_level(labels: Slide, box: Box) -> int:
    """The lowest resolution at which ``box`` still fills the picture; the full resolution if none does."""
    height, width = labels.plane_shape(0)

    def longest(level: int) -> float:
        shape = labels.plane_shape(level)
        return max(box.shape[0] * shape[0] / height, box.shape[1] * shape[1] / width)

    return max((level for level in range(len(labels.levels)) if longest(level) >= _LONGEST / 2), default=0)


def _matching_level(slide: Slide, shape: tuple[int, int]) -> int:
    """The level of the image whose pixels match labels of ``shape`` one to one.

    Raises:
        ReadError: no level has this shape.
    """
    for level in range(len(slide.levels)):
        if slide.plane_shape(level) == shape:
            return level
    raise ReadError(
        slide.location,
        expected=f"a level of {shape[0]} x {shape[1]} px like that of the labels",
        found=", ".join("{} x {}".format(*slide.plane_shape(level)) for level in range(len(slide.levels))),
        cause="labels of another image",
        remedy="choose another `name`",
    )


def _read_thinned(
    slide: Slide,
    level: int,
    channels: tuple[int, ...],
    window: Box,
    steps: tuple[int, int],
    thin: Callable[[NDArray[Any], tuple[int, int]], NDArray[Any]],
) -> NDArray[Any]:
    """Read a window (C, h, w) with a pixel for each box of ``steps`` px; incomplete last boxes are dropped."""
    height, width = (side // step * step for side, step in zip(window.shape, steps, strict=True))
    rows = max(1, _STRIP_PIXELS // (width * steps[0])) * steps[0]
    strips = []
    with SlideReader(slide, level, channels) as reader:
        for y in range(window.y0, window.y0 + height, rows):
            strip = Box(y, window.x0, min(y + rows, window.y0 + height), window.x0 + width)
            strips.append(thin(reader.read(slide.planes(level) // 2, strip), steps))
    return np.concatenate(strips, axis=1)


def _mean(pixels: NDArray[Any], steps: tuple[int, int]) -> NDArray[Any]:
    if steps == (1, 1):
        return pixels
    (rows, columns), (channels, height, width) = steps, pixels.shape
    boxes = pixels.reshape(channels, height // rows, rows, width // columns, columns)
    return np.asarray(boxes.mean((2, 4), dtype=np.float32))


def _nearest(pixels: NDArray[Any], steps: tuple[int, int]) -> NDArray[Any]:
    return pixels[:, steps[0] // 2 :: steps[0], steps[1] // 2 :: steps[1]]


def _displayable(pixels: NDArray[Any], rgb: bool) -> NDArray[np.uint8]:
    """Turn pixels (C, h, w) into uint8 (h, w, C): 8-bit RGB unchanged, others scaled between two percentiles."""
    pixels = np.moveaxis(np.nan_to_num(pixels.astype(np.float32)), 0, -1)
    low, high = (0.0, 255.0) if rgb and pixels.max() <= 255 else np.percentile(pixels, (_BLACK, _WHITE))
    return np.round(255 * np.clip((pixels - low) / max(high - low, 1e-9), 0, 1)).astype(np.uint8)
