"""Read arrays of zarr hierarchies that have no image metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import zarr

from cellseg_batch.engine.errors import ReadError
from cellseg_batch.engine.slides.slide import Level, Slide, fits_axes

ZARR = "zarr"
"""Name of the format of every image in a zarr hierarchy."""


def describe_array(array: zarr.Array[Any], store: Path, path: str, name: str, axes: str | None) -> Slide:
    """Describe an array of a zarr hierarchy as a slide of one level.

    Args:
        array: an array of at least two axes.
        store: root of the hierarchy.
        path: path of the array in it.
        name: name of the array as `Slide.name`.
        axes: order of its axes, if the metadata do not name them; None takes it from the shape.

    Raises:
        ReadError: the axes are unknown, or do not fit the array.
    """
    location = str(store / path)
    axes = _named_axes(array) or (axes or "").lower() or _guess_axes(array.shape)
    if axes is None or not fits_axes(axes, array.ndim):
        raise ReadError(
            location,
            expected="a 2-D array, a 3-D one with one short axis for the channels, or `axes` that fit",
            found=f"an array of shape {array.shape}" + (f" and axes {axes!r}" if axes else ""),
            cause="a plain zarr array does not say what its axes are",
            remedy="name them, for example `axes=czyx`",
        )
    level = Level("", array.shape, array.chunks, (1.0,) * array.ndim, (0.0,) * array.ndim)
    count = array.shape[axes.index("c")] if "c" in axes else 1
    rgb = count == 3 and array.dtype.name == "uint8"
    return Slide(
        name=name,
        store=store,
        path=path,
        format=ZARR,
        axes=axes,
        dtype=array.dtype.name,
        levels=(level,),
        units=(None,) * array.ndim,
        rgb=rgb,
        zarr_format=array.metadata.zarr_format,
    )


def _named_axes(array: zarr.Array[Any]) -> str | None:
    """Axes from the dimension names of a zarr v3 array, or xarray's of a v2 array; yx if it is 2-D; else None."""
    listed = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS")
    names = "".join(str(name).lower() for name in listed) if isinstance(listed, list | tuple) else ""
    return names if fits_axes(names, array.ndim) else "yx" if array.ndim == 2 else None


def _guess_axes(shape: tuple[int, ...]) -> str | None:
    """Axes of an unambiguous shape, else None; a channel axis is first or last and at most 4 long."""
    if len(shape) == 3 and (shape[0] <= 4) != (shape[2] <= 4):
        return "cyx" if shape[0] <= 4 else "yxc"
    return None
