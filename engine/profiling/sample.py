"""Take a bounded sample for a profile: the middle of a large slide, or the first of many small slides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.slides.discover import find_images, first_slide
from cellseg_batch.engine.slides.level_and_channels import choose_level
from cellseg_batch.engine.slides.slide import Slide, UnreadableImage

SIDE = 8192
_PIXELS = SIDE * SIDE


def take_sample(path: Path, settings: Settings, model_um: float | None) -> list[Slide]:
    """Take parts of the images below ``path``, about 67 Mpx in all at the level that a run would process.

    Args:
        path: a path that holds images.
        settings: settings of the run.
        model_um: µm per px that the model was trained at; None if unknown.

    Raises:
        NoImageError: there is no image.
        ReadError: the first image cannot be used.
    """
    images = find_images(path, settings.axes)
    first_slide(images)  # raises if it cannot be used
    sample: list[Slide] = []
    left = _PIXELS
    for image in images:
        if isinstance(image, UnreadableImage):
            continue
        level = choose_level(image, settings.level, settings.pixel_size, model_um).level
        part = _first_planes(image.cropped(level, _middle(image, level)), level, left)
        height, width = part.plane_shape(level)
        left -= height * width * part.planes(level)
        if sample and left < 0:
            break
        sample.append(part)
    return sample


def _middle(slide: Slide, level: int) -> Box:
    """A box of at most `SIDE` px a side in the middle of a plane, which begins at the corner of a chunk."""
    chunk = dict(zip(slide.axes, slide.levels[level].chunks, strict=True))
    height, width = slide.plane_shape(level)
    y, x = (
        max(0, length - SIDE) // 2 // chunk[axis] * chunk[axis]
        for axis, length in zip("yx", (height, width), strict=True)
    )
    return Box(y, x, min(y + SIDE, height), min(x + SIDE, width))


def _first_planes(slide: Slide, level: int, pixels: int) -> Slide:
    """The first t/z planes of ``slide``, as many as fit into ``pixels`` at ``level``, at least one."""
    height, width = slide.plane_shape(level)
    most_planes = max(1, pixels // (height * width))
    for axis in slide.plane_axes:
        index = slide.axes.index(axis)
        count = min(most_planes, slide.extent(axis, level))
        most_planes //= count
        levels = []
        for resolution in slide.levels:
            shape = list(resolution.shape)
            shape[index] = min(count, shape[index])
            levels.append(replace(resolution, shape=tuple(shape)))
        slide = replace(slide, levels=tuple(levels))
    return slide
