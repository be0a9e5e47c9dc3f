"""Describe an image of OME-Zarr by its multiscale metadata: levels, axes, pixel size, channels and colours.

Sources: the OME-Zarr specification 0.4 and 0.5 (ngff.openmicroscopy.org). Metadata are read leniently: whatever is
enough to read the pixels is accepted, and what is listed but no level is left out and noted.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import zarr

from cellseg_batch.engine.errors import ReadError
from cellseg_batch.engine.slides.colours import RGB, TAKEN_FOR_RGB, are_named_rgb, are_rgb
from cellseg_batch.engine.slides.pixel_size import PixelSize, settle_pixel_size
from cellseg_batch.engine.slides.plain_zarr import ZARR
from cellseg_batch.engine.slides.slide import AXES, NUMBERS, Level, Slide

# Other spellings of the specification's "micrometer".
_UNIT_NAMES = dict.fromkeys(("µm", "μm", "um", "micron", "microns", "micrometre"), "micrometer")


def ome_metadata(node: zarr.Group) -> dict[str, Any]:
    """The OME attributes of a group: under ``ome`` in version 0.5, at the top in older versions."""
    attributes = dict(node.attrs)
    nested = attributes.get("ome")
    return nested if isinstance(nested, dict) else attributes


def path_inside(listed: object, location: str) -> str:
    """Check that a path in the metadata of a node leads to something below the node.

    Returns:
        The path, without a slash at its end.

    Raises:
        ReadError: the path leads elsewhere.
    """
    path = str(listed).rstrip("/")
    if any(part in ("", ".", "..") for part in path.replace("\\", "/").split("/")):
        raise not_an_image(location, "paths in its metadata that stay inside it", repr(listed))
    return path


def describe_multiscale(node: zarr.Group, metadata: dict[str, Any], store: Path, path: str, name: str) -> Slide:
    """Describe a group as a slide, whose first multiscale is taken.

    Args:
        node: the group.
        metadata: its `ome_metadata`, with multiscales.
        store: root of the hierarchy.
        path: path of the group in it.
        name: name of the group as `Slide.name`.

    Raises:
        ReadError: the metadata cannot be used.
    """
    location = str(store / path)
    listed = metadata["multiscales"]
    if not (isinstance(listed, list) and listed and isinstance(listed[0], dict)):
        raise not_an_image(location, "a list of multiscales", f"{listed!r:.80}")
    notes = [f"the first of its {len(listed)} multiscales is taken"] if len(listed) > 1 else []
    multiscale = listed[0]
    axes, units = _axes_of(multiscale, location)
    datasets, arrays, remarks = _arrays_of(node, multiscale, axes, location)
    notes += remarks
    full = arrays[0]
    levels, units, size = _place(datasets, multiscale, arrays, axes, units)
    channels = _omero_channels(metadata)
    labels = [str(channel.get("label") or "").strip() for channel in channels]
    count = full.shape[axes.index("c")] if "c" in axes else 1
    alpha = count == 4 and [label.lower() for label in labels[3:]] in (["a"], ["alpha"])
    colour_labels = labels[: count - alpha]
    dtype = full.dtype.name
    rgb = are_rgb(count - alpha, dtype, colour_labels, _colours_of(channels))
    if rgb and any(colour_labels) and not are_named_rgb(colour_labels):
        notes.append(TAKEN_FOR_RGB)
    return Slide(
        name=name,
        store=store,
        path=path,
        format=ZARR,
        axes=axes,
        dtype=dtype,
        levels=levels,
        units=units,
        channels=tuple(labels) if any(labels) else (),
        rgb=rgb,
        alpha=alpha,
        zarr_format=node.metadata.zarr_format,
        holds_labels=True,
        size_is_doubtful=bool(set(size.doubts) & set("yx")),
        notes=(*notes, *size.notes),
    )


def _arrays_of(
    node: zarr.Group, multiscale: dict[str, Any], axes: str, location: str
) -> tuple[list[dict[str, Any]], list[zarr.Array[Any]], list[str]]:
    """(datasets, their arrays, notes) of a multiscale, from the largest; what is no level of it is left out and noted.

    Raises:
        ReadError: there is no array, or the first one is no image of the axes.
    """
    datasets = multiscale.get("datasets")
    if not (isinstance(datasets, list) and datasets and all(isinstance(entry, dict) for entry in datasets)):
        raise not_an_image(location, "a list of levels in its metadata", f"{datasets!r:.80}")
    found: dict[str, tuple[dict[str, Any], zarr.Array[Any]]] = {}
    notes = []
    for dataset in datasets:
        path = dataset.get("path")
        if not isinstance(path, str):
            # zarr can read such an image, but readers of its labels could not find it.
            raise not_an_image(location, "the paths of its levels as text", f"{path!r}")
        array = node.get(path_inside(path, location))
        if not isinstance(array, zarr.Array):
            notes.append(f"level {path} is listed, but not in the store")
            continue
        if array.ndim != len(axes):
            raise not_an_image(
                location, f"arrays of the axes {axes} that its metadata list", f"one of shape {array.shape}"
            )
        if not NUMBERS.fullmatch(array.dtype.name):
            raise not_an_image(location, "integer, floating point or boolean pixels", array.dtype.name)
        first = next(iter(found.values()))[1] if found else array
        if 0 in first.shape:
            raise not_an_image(location, "an image with pixels", f"shape {array.shape}")
        fits = all(axis in "zyx" or a == b for axis, a, b in zip(axes, first.shape, array.shape, strict=True))
        if path in found:
            notes.append(f"level {path} is listed twice")
        elif 0 in array.shape:
            notes.append(f"level {path} has no pixels and is left out")
        elif array.dtype.name != first.dtype.name or not fits:
            notes.append(
                f"level {path} is left out, as its {array.dtype.name} of shape {array.shape} is no resolution of "
                f"{first.dtype.name} of shape {first.shape}"
            )
        else:
            found[path] = dataset, array
    if not found:
        listed = ", ".join(str(dataset["path"]) for dataset in datasets)
        raise not_an_image(location, f"the arrays that its metadata list ({listed})", "none of them in the store")
    y, x = axes.index("y"), axes.index("x")
    ordered = sorted(found.values(), key=lambda level: -level[1].shape[y] * level[1].shape[x])
    if ordered != list(found.values()):
        notes.append("its levels are not listed from the largest, but taken so")
    return [dataset for dataset, _ in ordered], [array for _, array in ordered], notes


def _axes_of(multiscale: dict[str, Any], location: str) -> tuple[str, tuple[str | None, ...]]:
    listed = multiscale.get("axes")
    if not listed:
        raise not_an_image(location, "axes in its metadata", "none")
    # Version 0.3 wrote axes as plain names.
    entries = [{"name": axis} if isinstance(axis, str) else axis for axis in listed] if isinstance(listed, list) else []
    if not entries or not all(isinstance(axis, dict) and isinstance(axis.get("name"), str) for axis in entries):
        raise not_an_image(location, "a list of axes with names in its metadata", f"{listed!r:.80}")
    names = [axis["name"].lower() for axis in entries]
    for axis in names:
        if axis not in set(AXES):
            raise ReadError(
                location,
                expected="axes out of t, c, z, y, x",
                found=f"an axis {axis!r}",
                remedy="write each of its places as an image with the other axes",
            )
    for axis in AXES:
        if names.count(axis) > 1 or (axis in "yx" and axis not in names):
            raise not_an_image(location, f"one axis {axis}", f"{names.count(axis)} in {', '.join(names)}")
    axes = "".join(names)
    units = (axis.get("unit") for axis in entries)
    return axes, tuple(_UNIT_NAMES.get(unit, unit) if isinstance(unit, str) else None for unit in units)


def _place(
    datasets: list[dict[str, Any]],
    multiscale: dict[str, Any],
    arrays: list[zarr.Array[Any]],
    axes: str,
    units: tuple[str | None, ...],
) -> tuple[tuple[Level, ...], tuple[str | None, ...], PixelSize]:
    """(levels, unit of each axis, pixel size): an axis whose scales are not finite and positive has px, and no unit.

    Other scales and translations are kept as written, however unlikely: they tie the image to its labels in viewers. A
    translation that is not finite is 0.
    """
    # Versions older than 0.4 have no transformations; only the shapes tell how the levels relate.
    factors = [[a / b for a, b in zip(arrays[0].shape, array.shape, strict=True)] for array in arrays]
    placements = [_placement(dataset, multiscale, factor) for dataset, factor in zip(datasets, factors, strict=True)]
    stated: dict[str, tuple[object, object]] = {}
    broken = set()
    for index, axis in enumerate(axes):
        sizes = [scale[index] for scale, _ in placements]
        wrong = [size for size in sizes if not (math.isfinite(size) and size > 0)]
        if wrong:
            broken.add(axis)
        if axis in "zyx":
            stated[axis] = (wrong or sizes)[0], units[index]
    size = settle_pixel_size(stated)
    broken |= set("yx") if broken & set("yx") else set()
    levels = []
    for dataset, array, factor, (scale, translation) in zip(datasets, arrays, factors, placements, strict=True):
        scale = tuple(f if axis in broken else s for axis, s, f in zip(axes, scale, factor, strict=True))
        lost = [axis in broken or not math.isfinite(shift) for axis, shift in zip(axes, translation, strict=True)]
        start = tuple(0.0 if is_lost else shift for is_lost, shift in zip(lost, translation, strict=True))
        levels.append(Level(dataset["path"], array.shape, array.chunks, scale, start))
    units = tuple(None if axis in broken else unit for axis, unit in zip(axes, units, strict=True))
    return tuple(levels), units, size


def _placement(
    dataset: dict[str, Any], multiscale: dict[str, Any], factors: list[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(scale, translation) of a level: the dataset's transformations, then the whole image's; NaN if not numbers."""
    scale = [1.0] * len(factors) if "coordinateTransformations" in dataset else factors
    translation = [0.0] * len(factors)
    try:
        for holder in (dataset, multiscale):
            for transformation in holder.get("coordinateTransformations", ()):
                if transformation.get("type") == "scale":
                    scale = [a * float(b) for a, b in zip(scale, transformation["scale"], strict=True)]
                    translation = [a * float(b) for a, b in zip(translation, transformation["scale"], strict=True)]
                elif transformation.get("type") == "translation":
                    shift = transformation["translation"]
                    translation = [a + float(b) for a, b in zip(translation, shift, strict=True)]
    except (AttributeError, KeyError, TypeError, ValueError):
        scale = translation = [math.nan] * len(factors)
    return tuple(scale), tuple(translation)


def _omero_channels(metadata: dict[str, Any]) -> list[dict[str, Any]]:
    """The channels as OMERO describes them; [] if it does not."""
    omero = metadata.get("omero")
    listed = omero.get("channels") if isinstance(omero, dict) else None
    return [entry if isinstance(entry, dict) else {} for entry in listed] if isinstance(listed, list) else []


def _colours_of(channels: list[dict[str, Any]]) -> tuple[str, ...]:
    """RRGGBB of each channel; channels without any colour are red, green, blue for OMERO."""
    colours = tuple(str(channel.get("color") or "").strip("#").upper()[:6] for channel in channels)
    return colours if any(colours) else RGB


def not_an_image(location: str, expected: str, found: str) -> ReadError:
    """The error about metadata that describe no image."""
    return ReadError(
        location,
        expected=expected,
        found=found,
        cause="invalid or incomplete OME-Zarr metadata",
        remedy="write it again",
    )
