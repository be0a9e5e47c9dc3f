"""Read the region of an image to which its segmentation is confined, and draw any box of it.

A region is the polygons of a GeoJSON file, or what is not 0 in a label image of any scale.  Only boxes of it are drawn:
memory does not grow with the slide.  Whether a pixel is inside depends on the pixel alone, so boxes agree wherever
they overlap:

- in polygons, if its centre is; one on a left or upper edge is inside, one on a right or lower edge is not, so that
  polygons with a common edge share no pixel and leave none out.  Holes are outside, overlapping polygons one region.
- in a label image, if the pixel there is not 0 that holds its centre.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.errors import NoImageError, ReadError
from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.slides.discover import find_images, first_slide
from cellseg_batch.engine.slides.formats import FORMATS
from cellseg_batch.engine.slides.geojson import Polygon, read_polygons
from cellseg_batch.engine.slides.ome_zarr import is_zarr_node, open_written, zarr_root
from cellseg_batch.engine.slides.reader import SlideReader
from cellseg_batch.engine.slides.slide import Slide

_GEOJSON = (".geojson", ".json")
# Their pixels differ a little from those that were saved, so few are 0.
_LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif")
# Side in px of the windows of a label image that are hashed one by one.
_WINDOW = 2048

Inside = NDArray[np.bool_]


class Region(ABC):
    """A part of every plane of a level of a slide."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    @abstractmethod
    def sha256(self) -> str:
        """Hash of the content: it changes with neither the path, the format of the text nor the level."""

    @abstractmethod
    def inside(self, box: Box) -> Inside:
        """Whether each pixel of a box inside the level lies in the region, (h, w).

        Raises:
            ReadError: the region cannot be read.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the file."""


def open_region(path: Path, slide: Slide, shape: tuple[int, int], class_name: str | None = None) -> Region:
    """Open a region.

    Args:
        path: a GeoJSON file, or a label image in any format that slides are read from.
        slide: the image that it belongs to.
        shape: (height, width) in px of the level, or of another picture of all of the slide, in which boxes are drawn.
        class_name: name of the class of QuPath to take; None takes all features.

    Raises:
        ReadError: it cannot be read, is empty, or lies outside the slide.
    """
    if path.name.lower().endswith(_GEOJSON):
        polygons = read_polygons(path, class_name)
        return PolygonRegion(path, polygons, slide.plane_shape(0), shape)
    if class_name is not None:
        raise ReadError(
            str(path),
            expected=f"a GeoJSON file for the class {class_name} (`mask_class`)",
            found="another one" if path.exists() else "nothing",
            remedy="leave the class out, as labels have none",
        )
    return LabelRegion(path, _label_image(path), shape)


def region_for(folder: Path, slide: Slide) -> Path:
    """The region in a folder that has the name of an image, with any suffix that regions have.

    It lies there as the image does below the user's input (``a/scan.geojson`` for ``a/scan.svs``), or by itself.

    Raises:
        ReadError: there is none, or several.
    """
    own = slide.store.name if slide.zarr_format is None else PurePath(slide.location).name
    below = PurePath(*PurePath(slide.name).parts[1:])
    suffixes = dict.fromkeys((*_GEOJSON, ".zarr", ".ome.zarr", *(end for one in FORMATS for end in one.suffixes)))
    for parent, name in ((below.parent, below.name), (PurePath(), own)):
        stems = _stems(name) if name else []
        names = dict.fromkeys(stem + suffix for stem in stems for suffix in suffixes)
        found = [path for name in names if (path := folder / parent / name).exists()]
        if len(found) > 1:
            raise ReadError(
                str(folder),
                expected=f"one region for {own}",
                found=" and ".join(sorted(path.name for path in found)),
                remedy="leave one of them there",
            )
        if found:
            return found[0]
    raise ReadError(
        str(folder),
        expected=f"a region for {own}, such as {_stems(own)[-1]}.geojson or {_stems(own)[-1]}.png",
        found="none of that name",
        remedy="add it, or leave this image out; one whose region is all of it needs a label image of ones",
    )


def _stems(name: str) -> list[str]:
    """The name of an image, and without its suffix."""
    stem = PurePath(name).stem
    return list(dict.fromkeys((name, stem, stem.removesuffix(".ome"))))


class PolygonRegion(Region):
    """The pixels whose centres lie in a polygon and in none of its holes.

    Args:
        path: file of the region.
        polygons: the polygons, in px of the full resolution.
        full: (height, width) of the full resolution in px.
        shape: (height, width) of the level in px.

    Raises:
        ReadError: there is no polygon, or all lie outside the slide.
    """

    def __init__(self, path: Path, polygons: Sequence[Polygon], full: tuple[int, int], shape: tuple[int, int]) -> None:
        self._polygons = polygons
        if not polygons:
            raise ReadError(
                str(path),
                expected="at least one polygon",
                found="none",
                remedy="draw the region and export it again, or leave `mask` out for the whole image",
            )
        scale = np.divide(shape, full)
        self._edges = [_edges(polygon, scale) for polygon in polygons]
        bounds = [(*edges[:, :2].min(axis=0), *edges[:, 2:].max(axis=0)) for edges in map(_as_boxes, self._edges)]
        self._bounds = np.array(bounds)
        if not self._meeting(Box(0, 0, *shape)).size:
            (y0, x0), (y1, x1) = self._bounds[:, :2].min(axis=0) / scale, self._bounds[:, 2:].max(axis=0) / scale
            raise ReadError(
                str(path),
                expected=f"a region in the image of {full[1]} x {full[0]} px",
                found=f"one from x {x0:.0f}, y {y0:.0f} to {x1:.0f}, {y1:.0f}, wholly outside",
                cause="a region of another image, or in µm or px of another resolution",
                remedy="export it for this image, in px of the full resolution",
            )

    @property
    def sha256(self) -> str:
        """See `Region.sha256`."""
        state = hashlib.sha256()
        for polygon in self._polygons:
            for ring in (np.array([len(polygon)]), *polygon):
                state.update(f"{len(ring)} ".encode())
                state.update(ring.astype("<f8").tobytes())
        return state.hexdigest()

    def inside(self, box: Box) -> Inside:
        """See `Region.inside`."""
        inside = np.zeros(box.shape, np.bool_)
        for number in self._meeting(box):
            y0, x0, y1, x1 = self._bounds[number]
            part = Box(math.floor(y0), math.floor(x0), math.ceil(y1), math.ceil(x1)).within(box)
            inside[part.seen_from(box).slices()] |= _fill(self._edges[number], part)
        return inside

    def close(self) -> None:
        """See `Region.close`; nothing is open."""

    def _meeting(self, box: Box) -> NDArray[np.intp]:
        """Numbers of the polygons whose bounding boxes share pixels with a box."""
        y0, x0, y1, x1 = self._bounds.T
        return np.flatnonzero((y0 < box.y1) & (y1 > box.y0) & (x0 < box.x1) & (x1 > box.x0))


def _edges(polygon: Polygon, scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """The edges (n, 4) of all rings, as (y, x) of the left and of the right end: equal for both sides of an edge."""
    rings = [ring * scale for ring in polygon]
    edges = np.concatenate([np.concatenate([ring, np.roll(ring, -1, axis=0)], axis=1) for ring in rings])
    leads_left = edges[:, 1] > edges[:, 3]
    edges[leads_left] = edges[leads_left][:, [2, 3, 0, 1]]
    return edges


def _as_boxes(edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bounding boxes (n, 4) of edges: y0, x0, y1, x1."""
    y0, x0, y1, x1 = edges.T
    return np.stack([np.minimum(y0, y1), x0, np.maximum(y0, y1), x1], axis=1)


def _fill(edges: NDArray[np.float64], box: Box) -> Inside:
    """Whether the centre of each pixel of a box is inside a polygon, (h, w).

    A column of centres crosses each edge once at most; going down, every crossing leads into the polygon or out of it.
    """
    y0, x0, y1, x1 = edges.T
    first = np.maximum(np.ceil(x0 - 0.5), box.x0)  # of the columns whose centre lies at x0 or right of it, left of x1
    counts = np.maximum(np.minimum(np.ceil(x1 - 0.5), box.x1) - first, 0).astype(np.int64)
    met = np.flatnonzero(counts)
    counts = counts[met]
    edge = np.repeat(met, counts)
    columns = first[edge].astype(np.int64) + np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts)
    slopes = (y1 - y0)[edge] / (x1 - x0)[edge]
    crossings = y0[edge] + (columns + 0.5 - x0[edge]) * slopes
    rows = np.clip(np.ceil(crossings - 0.5), box.y0, box.y1).astype(np.int64) - box.y0
    height, width = box.shape
    if not ((rows > 0) & (rows < height)).any():  # no edge within the box
        above = np.bincount(columns[rows == 0] - box.x0, minlength=width)
        return np.broadcast_to(above % 2 == 1, box.shape)
    words = -(-width // 8)  # numpy takes as long for eight pixels in a word as for one
    crossed = np.zeros((height + 1, 8 * words), np.bool_)
    np.logical_xor.at(crossed.reshape(-1), rows * 8 * words + columns - box.x0, True)
    return np.bitwise_xor.accumulate(crossed[:height].view(np.uint64), axis=0).view(np.bool_)[:, :width]


class LabelRegion(Region):
    """The pixels that are not 0 in a label image, which is stretched over the slide.

    Args:
        path: file or store of the image.
        image: the image, of a single plane.
        shape: (height, width) of the slide's level in px.

    Raises:
        ReadError: it has other proportions than the slide, or cannot be opened.
    """

    def __init__(self, path: Path, image: Slide, shape: tuple[int, int]) -> None:
        self._shape = shape
        self._size = height, width = image.plane_shape(0)
        # A side of a downscaled image may be rounded up or down.
        is_too_high, is_too_wide = (
            (long - 1) * across > (short + 1) * along
            for long, short, along, across in ((height, width, *shape), (width, height, *shape[::-1]))
        )
        if is_too_high or is_too_wide:
            raise ReadError(
                str(path),
                expected=f"a label image with the proportions of its slide, {shape[1]} x {shape[0]} px",
                found=f"{width} x {height} px",
                cause="labels of another image, or of a part of it",
                remedy="save it for the whole slide, at any scale",
            )
        self._reader = SlideReader(image, 0, tuple(range(image.extent("c", 0) - image.alpha)))

    @property
    def sha256(self) -> str:
        """See `Region.sha256`; reads the whole image, window by window."""
        height, width = self._size
        state = hashlib.sha256(f"{height} {width}".encode())
        for y in range(0, height, _WINDOW):
            for x in range(0, width, _WINDOW):
                window = Box(y, x, min(y + _WINDOW, height), min(x + _WINDOW, width))
                state.update(np.packbits(self._read(window)).tobytes())
        return state.hexdigest()

    def inside(self, box: Box) -> Inside:
        """See `Region.inside`."""
        spans = ((box.y0, box.y1), (box.x0, box.x1))
        rows, columns = (
            (2 * np.arange(start, stop) + 1) * side // (2 * length)
            for (start, stop), side, length in zip(spans, self._size, self._shape, strict=True)
        )
        pixels = self._read(Box(int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1))
        inside: Inside = pixels[rows - rows[0]][:, columns - columns[0]]
        return inside

    def close(self) -> None:
        """See `Region.close`."""
        self._reader.close()

    def _read(self, box: Box) -> Inside:
        """Whether each pixel of a box of the image is not 0 in any channel; NaN counts as 0."""
        pixels = self._reader.read(0, box)
        inside: Inside = ((pixels != 0) & (pixels == pixels)).any(axis=0)  # NaN equals nothing
        return inside


def _label_image(path: Path) -> Slide:
    """The one image at a path, which may be labels of an OME-Zarr image."""
    if path.name.lower().endswith(_LOSSY):
        raise ReadError(
            str(path), expected="labels as they were drawn", found="a JPEG", remedy="save them as PNG or TIFF"
        )
    try:
        images = find_images(path)
    except NoImageError as error:
        if is_zarr_node(path):  # labels are never found as images
            return open_written(*zarr_root(path))
        raise ReadError.with_detail(str(path), error.detail) from error
    if len(images) > 1:
        raise ReadError(
            str(path),
            expected="one label image",
            found=f"{len(images)} images",
            remedy="name one of them, or save it in a file of its own",
        )
    image = first_slide(images)
    if image.planes(0) > 1:
        raise ReadError(
            str(path),
            expected="a label image of one plane, which holds for all planes of its slide",
            found=f"{image.planes(0)} planes",
            remedy="save one of them alone",
        )
    return image
