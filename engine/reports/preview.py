"""Draw a slide with the outlines of its labels and cells as a picture about a screen wide, whatever the slide's size.

Where outlines would hide the objects, these are tinted, and a part at full resolution is shown beside the overview.
Classes are tinted in their colours.  It reads the lowest resolution that is still large enough, strip by strip, so
memory does not grow with the slide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cellseg_batch.engine.errors import ReadError, SlideError, UsageError, writing_to
from cellseg_batch.engine.geometry import Box, count_in_spans
from cellseg_batch.engine.run.output_paths import OutputPaths, output_paths
from cellseg_batch.engine.run.records import Manifest
from cellseg_batch.engine.slides.discover import find_images, first_slide
from cellseg_batch.engine.slides.image_format import WRITTEN_BY
from cellseg_batch.engine.slides.level_and_channels import choose_channels
from cellseg_batch.engine.slides.ome_zarr import colours_of_classes, open_written
from cellseg_batch.engine.slides.reader import SlideReader
from cellseg_batch.engine.slides.region import open_region
from cellseg_batch.engine.slides.slide import Slide
from cellseg_batch.engine.storage.journal import Journal
from cellseg_batch.engine.storage.paths import locate
from cellseg_batch.trainer.outlines import borders, outlined, tinted, too_small_to_outline

_LONGEST = 1600
_STRIP_PIXELS = 1 << 24
# Between overview and detail: px, and grey that is told from black and white grounds.
_GAP, _GROUND = 12, 128
# Colours of the outlines of a region and of cells, unlike those of objects.
_REGION, _CELL = (0, 229, 255), (64, 220, 90)
# Percentiles of the shown pixels that become black and white, in images other than 8-bit RGB.
_BLACK, _WHITE = 0.5, 99.8


@dataclass(frozen=True)
class Preview:
    """A picture of a slide and its labels.

    Attributes:
        path: the image.
        box: the part that is shown, in px of the labels' full resolution.
        zoom: px of the picture per px of the labels' full resolution.
        overview: uint8 (h, w, 3) picture of the part.
        detail_box: the part of it with most objects, framed in the overview, in px of the labels' full resolution; None
            if the objects can be seen in the overview.
        detail: uint8 (h, w, 3) picture of that part at full resolution; None without one.
        note: why the outline of the region is missing; "" if it is there, or there is no region.
        images: number of images below the path, of which this is the first.
    """

    path: str
    box: Box
    zoom: float
    overview: NDArray[np.uint8]
    detail_box: Box | None = None
    detail: NDArray[np.uint8] | None = None
    note: str = ""
    images: int = 1

    def side_by_side(self) -> NDArray[np.uint8]:
        """The overview, and right of it the detail, on a grey ground: uint8 (h, w, 3)."""
        if self.detail is None:
            return self.overview
        height = max(self.overview.shape[0], self.detail.shape[0])
        gap = np.full((height, _GAP, 3), _GROUND, np.uint8)
        return np.concatenate([_padded(self.overview, height), gap, _padded(self.detail, height)], axis=1)


def write_preview(
    path: Path,
    out: Path,
    sides: tuple[int, int, int, int] | None,
    name: str,
    output: Path | None,
    channel: str | None,
    axes: str | None,
) -> Preview:
    """Draw the middle t/z plane of the first image below ``path``, with its labels, and write it to ``out`` as PNG.

    Raises:
        UsageError, SlideError: as `draw_preview`; the picture cannot be written.
    """
    preview = draw_preview(path, _LONGEST, sides, name, output, channel, axes)
    with writing_to(out, "a picture"):
        written_by = PngInfo()
        written_by.add_text("Software", WRITTEN_BY)
        Image.fromarray(preview.side_by_side()).save(out, format="PNG", pnginfo=written_by)
    return preview


def draw_preview(
    path: Path,
    longest: int,
    sides: tuple[int, int, int, int] | None,
    name: str,
    output: Path | None,
    channel: str | None = None,
    axes: str | None = None,
) -> Preview:
    """Draw the middle t/z plane of the first image below ``path``, with its labels and the outline of its region.

    Args:
        path: a path that holds a slide.
        longest: most px of the overview's longer side.
        sides: y0, x0, y1, x1 of the part to show, in px of the labels' full resolution; None shows everything.
        name, output, channel, axes: as in the settings of the run that wrote the labels.

    Raises:
        UsageError: there is no image, or the box lies outside it.
        SlideError: the image or its labels cannot be read.
    """
    images = find_images(path, axes)
    slide = first_slide(images)
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
    channels = choose_channels(slide, channel).indices
    manifest = Journal(paths.journal).manifest(Manifest)
    has_cells = manifest is not None and manifest.decisions.cells is not None
    cells = open_written(paths.store, paths.cells) if has_cells else None
    preview = _draw_labels(slide, labels, cells, paths, channels, box, longest)
    return replace(_with_region(preview, slide, labels, manifest), images=len(images))


def _with_region(preview: Preview, slide: Slide, labels: Slide, manifest: Manifest | None) -> Preview:
    """The preview with the outline of the region that the labels were made for, if there is one."""
    if manifest is None or manifest.decisions.region is None:
        return preview
    identity, (height, width) = manifest.decisions.region, preview.overview.shape[:2]
    top, left = round(preview.box.y0 * preview.zoom), round(preview.box.x0 * preview.zoom)
    window = Box(top, left, top + height, left + width)
    sides = (round(side * preview.zoom) for side in labels.plane_shape(0))
    rows, columns = (max(side, end) for side, end in zip(sides, (window.y1, window.x1), strict=True))
    try:
        with open_region(locate(manifest.mask), slide, (rows, columns), identity.mask_class) as region:
            if region.sha256 != identity.mask_sha256:
                return replace(preview, note=f"{manifest.mask} has changed since the run")
            preview.overview[borders(region.inside(window).astype(np.uint8))] = _REGION
    except SlideError as error:
        return replace(preview, note=str(error))
    return preview


def _draw_labels(
    slide: Slide,
    labels: Slide,
    cells: Slide | None,
    paths: OutputPaths,
    channels: tuple[int, ...],
    box: Box,
    longest: int,
) -> Preview:
    """Draw a box of a slide with its labels; arguments as in `draw_preview` and `_draw`."""
    level = _pick_level(labels, box, longest)
    bounds, picture, ids = _draw(slide, labels, cells, channels, level, box, longest, None)
    zoom = ids.shape[1] / box.shape[1]
    colours = colours_of_classes(paths.store, paths.labels)
    if colours:
        return Preview(slide.location, box, zoom, tinted(picture, ids, colours))
    overview = outlined(picture, ids)
    if not (ids.any() and too_small_to_outline(ids) and zoom <= 1 / 2):
        return Preview(slide.location, box, zoom, overview)
    detail_box = _fullest(ids, box, zoom, longest // 2)
    _, picture, ids = _draw(slide, labels, cells, channels, 0, detail_box, longest, bounds)
    _frame(overview, detail_box, box, zoom)
    return Preview(slide.location, box, zoom, overview, detail_box, outlined(picture, ids))


def _draw(
    slide: Slide,
    labels: Slide,
    cells: Slide | None,
    channels: tuple[int, ...],
    level: int,
    box: Box,
    longest: int,
    bounds: tuple[float, float] | None,
) -> tuple[tuple[float, float], NDArray[np.uint8], NDArray[Any]]:
    """Draw a box at a level of the labels.

    Args:
        slide, labels, cells: the image, its labels, and its cells if there are some.
        channels: indices of the channels to show.
        level: level of the labels.
        box: the part to show, in px of the labels' full resolution.
        longest: most px of the picture's longer side.
        bounds: pixel values that become black and white; None takes them from the pixels.

    Returns:
        The bounds; the picture, uint8 (h, w, 3), with the outlines of cells; and the labels in its pixels, (h, w).
    """
    (height, width), shape = labels.plane_shape(0), labels.plane_shape(level)
    window = Box(
        box.y0 * shape[0] // height,
        box.x0 * shape[1] // width,
        -(-box.y1 * shape[0] // height),
        -(-box.x1 * shape[1] // width),
    )
    step = -(-max(window.shape) // longest)
    steps = min(step, window.shape[0]), min(step, window.shape[1])
    pixels = _read_thinned(slide, _matching_level(slide, shape), channels, window, steps, _mean)
    ids = _read_thinned(labels, level, (0,), window, steps, _nearest)[0]
    bounds = bounds or _black_and_white(pixels, slide.rgb)
    picture = np.repeat(_displayable(pixels, bounds), 3 // len(pixels), axis=-1)
    enlarge = max(1, longest // max(ids.shape))
    picture, ids = (_enlarged(array, enlarge) for array in (picture, ids))
    if cells is not None and not too_small_to_outline(ids):
        own_ids = _read_thinned(cells, level, (0,), window, steps, _nearest)[0]
        picture[borders(_enlarged(own_ids, enlarge))] = _CELL
    return bounds, picture, ids


def _enlarged(array: NDArray[Any], times: int) -> NDArray[Any]:
    return np.repeat(np.repeat(array, times, 0), times, 1)


def _fullest(ids: NDArray[Any], box: Box, zoom: float, side: int) -> Box:
    """The square of ``side`` px with the longest borders of objects, which most and not the largest objects have.

    Args:
        ids: labels (h, w) of the overview.
        box: what the overview shows; the square lies in it, smaller than ``side`` where the box is.
        zoom: px of the overview per px of the box.
        side: side of the square in px of the labels' full resolution, as those of ``box``.
    """
    spans = []
    for length in ids.shape:
        own = min(max(1, round(side * zoom)), length)
        starts = np.arange(length - own + 1)
        spans.append((starts, starts + own))
    inside = count_in_spans(borders(ids) & (ids > 0), *spans)
    y, x = np.unravel_index(int(np.argmax(inside)), inside.shape)
    rows, columns = min(side, box.shape[0]), min(side, box.shape[1])
    y0 = min(box.y0 + int(y / zoom), box.y1 - rows)
    x0 = min(box.x0 + int(x / zoom), box.x1 - columns)
    return Box(y0, x0, y0 + rows, x0 + columns)


def _frame(picture: NDArray[np.uint8], part: Box, box: Box, zoom: float) -> None:
    """Frame ``part`` in a picture of ``box``: a white line with black edges, which any ground shows."""
    top, left = int((part.y0 - box.y0) * zoom), int((part.x0 - box.x0) * zoom)
    bottom, right = int((part.y1 - box.y0) * zoom), int((part.x1 - box.x0) * zoom)
    frame = np.zeros(picture.shape[:2], np.uint8)
    for distance, value in enumerate((1, 2, 2, 1)):
        frame[top + distance : bottom - distance, left + distance : right - distance] = value
    frame[top + 4 : bottom - 4, left + 4 : right - 4] = 0
    picture[frame == 1], picture[frame == 2] = 0, 255


def _padded(picture: NDArray[np.uint8], height: int) -> NDArray[np.uint8]:
    missing = height - picture.shape[0]
    return np.pad(picture, ((0, missing), (0, 0), (0, 0)), constant_values=_GROUND)


def _pick_level(labels: Slide, box: Box, longest: int) -> int:
    """The lowest resolution at which ``box`` fills half of ``longest`` px or more; the full resolution if none does."""
    height, width = labels.plane_shape(0)

    def side(level: int) -> float:
        shape = labels.plane_shape(level)
        return max(box.shape[0] * shape[0] / height, box.shape[1] * shape[1] / width)

    return max((level for level in range(len(labels.levels)) if side(level) >= longest / 2), default=0)


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


def _black_and_white(pixels: NDArray[Any], rgb: bool) -> tuple[float, float]:
    """The pixel values that are shown as black and white: 0 and 255 for 8-bit RGB, else two percentiles."""
    finite = pixels[np.isfinite(pixels)].astype(np.float64)
    if not finite.size or (rgb and finite.max() <= 255):
        return 0.0, 255.0
    low, high = np.percentile(finite, (_BLACK, _WHITE))
    return float(low), float(high)


def _displayable(pixels: NDArray[Any], bounds: tuple[float, float]) -> NDArray[np.uint8]:
    """Turn pixels (C, h, w) into uint8 (h, w, C), scaled between the bounds."""
    low, high = bounds
    channels_last = np.clip(np.nan_to_num(np.moveaxis(pixels, 0, -1)), low, high).astype(np.float64)
    shown: NDArray[np.uint8] = np.round(255 * ((channels_last - low) / max(high - low, 1e-9))).astype("u1")
    return shown
