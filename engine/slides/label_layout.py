"""Lay out an output image: its levels, chunks and shards, and the OME-Zarr metadata that describe them.

A block covers whole shards or chunks, so two tasks never touch the same file.  This module touches no file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from yaozarrs import v04, v05

from cellseg_batch.engine.geometry import BlockGrid, Box, chunk_side
from cellseg_batch.engine.slides.pixel_meaning import PixelMeaning
from cellseg_batch.engine.slides.slide import Level, Slide


@dataclass(frozen=True)
class Layout:
    """Shape and storage of an output image, the same for labels and probability.

    Attributes:
        axes: order of the axes, of the letters t c z y x; labels and probabilities have no c.
        shapes: shape of each level, the full resolution of the output first.
        chunks: (height, width) of a chunk in px.
        shards: (height, width) in px of the box that a task writes, by level.
        datasets: (scale, translation) of each level, along each axis in its unit.
        units: unit of each axis; None if it has no unit.
        zarr_format: 2 for OME-Zarr 0.4, 3 for 0.5.
        dtype: numpy name of the pixel type.
    """

    axes: str
    shapes: tuple[tuple[int, ...], ...]
    chunks: tuple[int, int]
    shards: tuple[tuple[int, int], ...]
    datasets: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]
    units: tuple[str | None, ...]
    zarr_format: Literal[2, 3]
    dtype: str = "uint8"

    def storage(self, level: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes (chunk, shard) of a level over all axes; planes and channels are always stored apart."""
        ones = (1,) * (len(self.axes) - 2)
        return (*ones, *self.chunks), (*ones, *self.shards[level])

    def shard_count(self, level: int) -> int:
        """Number of shards of a level, in all planes."""
        return math.prod(self._shard_grid(level))

    def shard_box(self, level: int, number: int) -> tuple[int, Box]:
        """(plane, box) of a shard of a level, numbered plane by plane in raster order."""
        plane, row, column = (int(i) for i in np.unravel_index(number, self._shard_grid(level)))
        (height, width), (shard_h, shard_w) = self.shapes[level][-2:], self.shards[level]
        y, x = row * shard_h, column * shard_w
        return plane, Box(y, x, min(y + shard_h, height), min(x + shard_w, width))

    def _shard_grid(self, level: int) -> tuple[int, int, int]:
        *planes, height, width = self.shapes[level]
        return math.prod(planes), -(-height // self.shards[level][0]), -(-width // self.shards[level][1])


def lay_out(slide: Slide, level: int, grid: BlockGrid, zarr_format: Literal[2, 3]) -> Layout:
    """Lay out the storage of an output whose levels are ``level`` of ``slide`` and every coarser level.

    Args:
        slide: the segmented image.
        level: number of the segmented level.
        grid: block grid of the slide.
        zarr_format: 2 for OME-Zarr 0.4, 3 for 0.5.
    """
    order = [i for i, axis in enumerate(slide.axes) if axis != "c"]
    # A plain array may have its axes in any order; outputs always have t, z, y, x.
    order.sort(key=lambda i: "tzyx".index(slide.axes[i]))
    levels: tuple[Level, ...] = slide.levels[level:]
    chunks = chunk_side(grid.lattice.core[0]), chunk_side(grid.lattice.core[1])
    shapes = tuple(tuple(resolution.shape[i] for i in order) for resolution in levels)
    shards = [grid.block_shape]
    for finer, coarser in pairwise(shapes):
        # A shard of a coarser level is made from at most a block's area of the finer level.
        fits = [
            max(1, grid.block_shape[axis] * coarser[axis - 2] // (finer[axis - 2] * chunks[axis])) * chunks[axis]
            for axis in (0, 1)
        ]
        shards.append((fits[0], fits[1]))
    return Layout(
        axes="".join(slide.axes[i] for i in order),
        shapes=shapes,
        chunks=chunks,
        shards=tuple(shards),
        datasets=tuple(
            (tuple(resolution.scale[i] for i in order), tuple(resolution.translation[i] for i in order))
            for resolution in levels
        ),
        units=tuple(slide.units[i] for i in order),
        zarr_format=zarr_format,
    )


def multiscale(layout: Layout, name: str) -> Any:
    """The multiscale metadata of an image, as a model of yaozarrs."""
    version: Any = v05 if layout.zarr_format == 3 else v04
    datasets = []
    for path, (scale, translation) in enumerate(layout.datasets):
        steps: list[Any] = [version.ScaleTransformation(scale=list(scale))]
        if any(translation):
            steps.append(version.TranslationTransformation(translation=list(translation)))
        datasets.append(version.Dataset(path=str(path), coordinateTransformations=steps))
    kinds = {"t": version.TimeAxis, "c": version.ChannelAxis}
    axes: list[Any] = [
        kinds.get(axis, version.SpaceAxis)(name=axis, unit=unit)
        for axis, unit in zip(layout.axes, layout.units, strict=True)
    ]
    return version.Multiscale(name=name, axes=axes, datasets=datasets)


def image_metadata(layout: Layout, name: str, source: str | None, meaning: PixelMeaning) -> dict[str, Any]:
    """The attributes of an image's group, as plain JSON values.

    Args:
        layout: shape and storage of the image.
        name: name of the image.
        source: relative path to the segmented image; None if that is no OME-Zarr image.
        meaning: meaning of its pixels.
    """
    version: Any = v05 if layout.zarr_format == 3 else v04
    parts: dict[str, Any] = {"multiscales": [multiscale(layout, name)]}
    if meaning.is_label:
        origin = None if source is None else version.LabelSource(image=source)
        colours = [version.LabelColor(**{"label-value": value, "rgba": rgba}) for value, rgba in meaning.colours]
        parts["image_label"] = version.ImageLabel(colors=colours or None, source=origin)
    model = version.LabelImage if meaning.is_label else version.Image
    content = model(**parts, **({"version": "0.5"} if layout.zarr_format == 3 else {}))
    dumped: dict[str, Any] = content.model_dump(mode="json", by_alias=True, exclude_none=True)
    for colour in dumped.get("image-label", {}).get("colors", ()):
        # The specification asks for a number, but readers expect an integer.
        colour["label-value"] = int(colour["label-value"])
    if meaning.names:
        # Properties may have any keys beside the value, which the models of yaozarrs would drop.
        named = [{"label-value": value, "class": name} for value, name in meaning.names]
        dumped["image-label"]["properties"] = named
    return {"ome": dumped} if layout.zarr_format == 3 else dumped
