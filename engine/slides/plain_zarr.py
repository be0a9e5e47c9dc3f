"""Read arrays of zarr hierarchies that have no image metadata, and groups of such arrays that are one pyramid."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import zarr

from cellseg_batch.engine.errors import ReadError
from cellseg_batch.engine.slides.slide import Level, Slide, fits_axes

ZARR = "zarr"
"""Name of the format of every image in a zarr hierarchy."""
# Full names of axes -> ours.
_AXIS_NAMES = {"time": "t", "channel": "c"}
# Name of an array of a series: what all have in common, and its number.
_NUMBERED = re.compile(r"(.*?)(\d+)")


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
    names = _dimension_names(array)
    axes = _named_axes(names, array.ndim) or (axes or "").lower() or (None if names else _guess_axes(array.shape))
    if axes is None or not fits_axes(axes, array.ndim):
        about = f" and axes {axes!r}" if axes else f" with axes {', '.join(names)}" if names else ""
        raise ReadError(
            location,
            expected="a 2-D array, a 3-D one with one short axis for the channels, or `axes` that fit",
            found=f"an array of shape {array.shape}{about}",
            cause="axes other than t, c, z, y, x" if names else "a plain zarr array does not say what its axes are",
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


def describe_pyramid(
    group: zarr.Group, members: Sequence[str], store: Path, path: str, name: str, axes: str | None
) -> Slide | None:
    """Describe a group without image metadata as one slide, if its arrays are clearly resolutions of one image.

    They are if their names are the same but for a number that counts up, such as s0, s1, s2, they have the same type,
    and each has y and x half as long as the one before, z as long or half as long, and other axes as long.

    Args:
        group: the group.
        members: names of its members.
        store: root of the hierarchy.
        path: path of the group in it.
        name: name of the group as `Slide.name`.
        axes: as in `describe_array`.

    Returns:
        The slide, with a note; None if the arrays are images of their own.

    Raises:
        ReadError: the axes are unknown, or do not fit the arrays.
    """
    ordered = _count_up(members)
    if not ordered or not isinstance(full := group.get(ordered[0]), zarr.Array) or full.ndim < 2:
        return None
    arrays = [full]
    for member in ordered[1:]:
        array = group.get(member)
        if (
            not isinstance(array, zarr.Array)
            or array.dtype != full.dtype
            or not _is_half(array.shape, arrays[-1].shape)
        ):
            return None
        arrays.append(array)
    slide = describe_array(full, store, path, name, axes)
    for axis, *lengths in zip(slide.axes, *(array.shape for array in arrays), strict=True):
        same = [coarser == finer for finer, coarser in pairwise(lengths)]
        if any(same) if axis in "yx" else axis != "z" and not all(same):
            return None
    levels = []
    for member, array in zip(ordered, arrays, strict=True):
        scale = tuple(finer / coarser for finer, coarser in zip(full.shape, array.shape, strict=True))
        levels.append(Level(member, array.shape, array.chunks, scale, (0.0,) * full.ndim))
    note = f"{', '.join(ordered)} are taken for resolutions of one image, as each is half as large as the one before"
    return replace(slide, levels=tuple(levels), notes=(note,))


def _count_up(members: Sequence[str]) -> list[str]:
    """Members in the order of the numbers at the end of their names; [] unless these count up from 0 or 1."""
    parts = [_NUMBERED.fullmatch(member) for member in members]
    numbers = {int(part[2]): part[0] for part in parts if part is not None}
    first = min(numbers, default=0)
    counts_up = first <= 1 and sorted(numbers) == list(range(first, first + len(members)))
    if len(members) < 2 or not counts_up or len({part[1] for part in parts if part is not None}) > 1:
        return []
    return [numbers[number] for number in sorted(numbers)]


def _is_half(coarser: tuple[int, ...], finer: tuple[int, ...]) -> bool:
    """Whether each side is as long or half as long, rounded, and two or more are not as long."""
    if len(coarser) != len(finer) or 0 in coarser:
        return False
    sides = list(zip(coarser, finer, strict=True))
    return all(a in (b, b // 2, -(-b // 2)) for a, b in sides) and sum(a != b for a, b in sides) >= 2


def _dimension_names(array: zarr.Array[Any]) -> list[str]:
    """Names of the axes of a zarr v3 array, or xarray's of a v2 array, in lower case; [] if none has a name."""
    listed = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS")
    if not isinstance(listed, list | tuple) or not any(listed):
        return []
    return [str(name).lower() for name in listed]


def _named_axes(names: list[str], ndim: int) -> str | None:
    """Axes by the names of the dimensions; yx if there are two, whatever their names; else None."""
    axes = "".join(_AXIS_NAMES.get(name, name) for name in names)
    return axes if fits_axes(axes, ndim) else "yx" if ndim == 2 else None


def _guess_axes(shape: tuple[int, ...]) -> str | None:
    """Axes of an unambiguous shape, else None; a channel axis is first or last and at most 4 long."""
    if len(shape) == 3 and (shape[0] <= 4) != (shape[2] <= 4):
        return "cyx" if shape[0] <= 4 else "yxc"
    return None
