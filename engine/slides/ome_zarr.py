"""Images in zarr hierarchies: OME-Zarr 0.4 and 0.5 multiscales, HCS plates, bioformats2raw, plain arrays.

Sources: the OME-Zarr specification 0.4 and 0.5 (ngff.openmicroscopy.org).  Metadata are read leniently: what a
reader can work with is taken, and a level whose array is missing is passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import zarr

from cellseg_batch.engine.errors import CellsegError, ReadError
from cellseg_batch.engine.slides.plate import FieldChoice, PlateField
from cellseg_batch.engine.slides.slide import AXES, NUMBERS, Broken, Level, Slide, fits_axes
from cellseg_batch.engine.storage.paths import RemotePath, zarr_store

# What people write for the specification's "micrometer".
_UNIT_NAMES = dict.fromkeys(("µm", "μm", "um", "micron", "microns", "micrometre"), "micrometer")
# An attribute of what this program writes and is neither an image nor a label.
OUTPUT_MARK = "cellseg-batch-output"
# Members of a group in an object store that are looked at together.
_REQUESTS = 16
_NODE_FILES = ("zarr.json", ".zgroup", ".zarray", ".zattrs")


def is_zarr_node(path: Path) -> bool:
    """Whether a folder is a zarr group or array, of either format."""
    return any((path / file).is_file() for file in _NODE_FILES)


def zarr_root(path: Path) -> tuple[Path, str]:
    """The outermost zarr hierarchy around a node, and the node's path inside it."""
    root = path
    while is_zarr_node(root.parent):
        root = root.parent
    return root, "" if root == path else path.relative_to(root).as_posix()


def find_in_zarr(
    store: Path, path: str, name: str, axes: str | None, choice: FieldChoice, spot: PlateField | None = None
) -> Iterator[Slide | Broken]:
    """Every image in the node ``path`` of ``store``; label groups and tables are not images.

    Args:
        store: root of the hierarchy.
        path: of the node.
        name: of the node, as `Slide.name`.
        axes: of plain arrays that do not name theirs.
        choice: which fields of plates are wanted.
        spot: where on a plate the node lies.
    """
    location = str(store / path)
    try:
        node = zarr.open(zarr_store(store), path=path, mode="r")
        if isinstance(node, zarr.Array):
            if node.ndim >= 2:
                yield _plain_array(node, store, path, name, axes)
            return
        metadata = _ome_metadata(node)
        if "image-label" in metadata or OUTPUT_MARK in node.attrs:
            return
        if "multiscales" in metadata:
            yield replace(_multiscale(node, metadata, store, path, name), spot=spot)
            return
        children = _children(node, metadata, location, choice, spot)
    except CellsegError as error:
        yield Broken(name, location, error.detail, spot)
        return
    except Exception as error:  # damaged JSON, unknown codecs, impossible metadata
        reason = f"its zarr metadata cannot be read: {type(error).__name__}: {error}"
        yield Broken(name, location, reason.splitlines()[0], spot)
        return

    def look(listed: tuple[str, PlateField | None]) -> list[Slide | Broken]:
        child, place = listed
        below = f"{path}/{child}" if path else child
        if is_zarr_node(store / below):
            return [*find_in_zarr(store, below, f"{name}/{child}", axes, choice, place)]
        reason = "listed in the metadata, but not in the store"
        return [Broken(f"{name}/{child}", str(store / below), reason, place)]

    if isinstance(store, RemotePath) and spot is None:  # the wells of a plate, whose answers take long to come
        with ThreadPoolExecutor(_REQUESTS) as pool:
            yield from chain.from_iterable(pool.map(look, children))
    else:
        yield from chain.from_iterable(map(look, children))


def open_written(store: Path, path: str) -> Slide:
    """The label or probability image ``path`` of ``store`` as a slide.

    Raises:
        ReadError: there is none.
    """
    try:
        node = zarr.open_group(zarr_store(store), path=path, mode="r")
        return _multiscale(node, _ome_metadata(node), store, path, path)
    except (OSError, KeyError, ValueError) as error:
        raise ReadError(
            str(store / path),
            expected="an image that cellseg-batch has written",
            found=f"{type(error).__name__}: {error}",
            remedy="write it with cellseg-batch run, or name another one with `name` or `output`",
        ) from error


def plate_names(plate: Path) -> tuple[list[str], list[str]]:
    """Names of all rows and columns of a plate, also of those without wells."""
    metadata = _ome_metadata(zarr.open_group(zarr_store(plate), mode="r"))["plate"]
    rows, columns = ([str(one["name"]) for one in metadata.get(side, ())] for side in ("rows", "columns"))
    return rows, columns


def _ome_metadata(node: zarr.Group) -> dict[str, Any]:
    """OME attributes: under ``ome`` since 0.5, at the top before."""
    attributes = dict(node.attrs)
    nested = attributes.get("ome")
    return nested if isinstance(nested, dict) else attributes


def _children(
    node: zarr.Group, metadata: dict[str, Any], location: str, choice: FieldChoice, spot: PlateField | None
) -> list[tuple[str, PlateField | None]]:
    """(path, place on a plate) of what may hold images below a group: the metadata's where they list any, else all."""
    if "plate" in metadata:
        wells = [_inside(well["path"], location) for well in metadata["plate"]["wells"]]
        spots = [(well, PlateField(location, Path(well).parent.name, Path(well).name, field="")) for well in wells]
        return [(well, place) for well, place in spots if choice.takes_well(place)]
    if "well" in metadata:
        fields = [_inside(field["path"], location) for field in metadata["well"]["images"]]
        return [(field, spot and replace(spot, field=field)) for field in fields if choice.takes_field(field)]
    members = sorted((key for key in node if key not in ("labels", "tables", "OME")), key=_numbers_in_order)
    return [(_inside(member, location), spot) for member in members]


def _inside(listed: object, location: str) -> str:
    """A path that metadata list, which must lead to something below the node that lists it.

    Raises:
        ReadError: it leads elsewhere.
    """
    parts = str(listed).replace("\\", "/").rstrip("/").split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise _not_an_image(location, "paths in its metadata that stay inside it", repr(listed))
    return str(listed)


def _numbers_in_order(key: str) -> tuple[bool, int, str]:
    return (not key.isdecimal(), int(key) if key.isdecimal() else 0, key)


def _multiscale(node: zarr.Group, metadata: dict[str, Any], store: Path, path: str, name: str) -> Slide:
    location = str(store / path)
    if not metadata["multiscales"]:
        raise _not_an_image(location, "one multiscale", "an empty list of multiscales")
    multiscale = metadata["multiscales"][0]
    axes, units = _axes_of(multiscale, location)
    levels: list[Level] = []
    dtype = ""
    for dataset in multiscale["datasets"]:
        if not isinstance(dataset["path"], str):
            # Readable here, but no reader of the labels would find its way back to such an image.
            raise _not_an_image(location, "the paths of its levels as text", f"{dataset['path']!r}")
        array = node.get(_inside(dataset["path"], location))
        if not isinstance(array, zarr.Array):
            continue
        if array.ndim != len(axes):
            raise _not_an_image(location, f"{len(axes)} axes as its metadata say", f"an array of shape {array.shape}")
        if not dtype or not NUMBERS.fullmatch(array.dtype.name):
            dtype = array.dtype.name
        # Before 0.4 there were no transformations, and the shapes alone say how levels lie on each other.
        shrink = [a / b for a, b in zip(levels[0].shape if levels else array.shape, array.shape, strict=True)]
        scale, translation = _placement(dataset, multiscale, shrink)
        levels.append(Level(dataset["path"], array.shape, array.chunks, scale, translation))
    if not levels:
        listed = ", ".join(str(dataset["path"]) for dataset in multiscale["datasets"])
        raise _not_an_image(location, f"the arrays that its metadata list ({listed})", "none of them in the store")
    channels = _channel_names(metadata)
    version = "0.5" if node.metadata.zarr_format == 3 else "0.4"
    count = levels[0].shape[axes.index("c")] if "c" in axes else 1
    return Slide(
        name=name,
        store=store,
        path=path,
        format=f"ome-zarr {version}",
        axes=axes,
        dtype=dtype,
        levels=tuple(levels),
        units=units,
        channels=channels,
        rgb=_is_rgb(count, dtype, channels),
    )


def _axes_of(multiscale: dict[str, Any], location: str) -> tuple[str, tuple[str | None, ...]]:
    listed = multiscale.get("axes")
    if not listed:
        raise _not_an_image(location, "axes in its metadata", "none")
    # Version 0.3 wrote axes as plain names.
    entries = [{"name": axis} if isinstance(axis, str) else axis for axis in listed]
    axes = "".join(str(axis["name"]).lower() for axis in entries)
    if not fits_axes(axes, len(axes)):
        raise _not_an_image(location, "axes out of t, c, z, y, x with y and x among them", repr(axes))
    return axes, tuple(_UNIT_NAMES.get(str(axis.get("unit")), axis.get("unit")) for axis in entries)


def _placement(
    dataset: dict[str, Any], multiscale: dict[str, Any], shrink: list[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(scale, translation) of a level: the dataset's transformations, then the whole image's."""
    scale = [1.0] * len(shrink) if "coordinateTransformations" in dataset else shrink
    translation = [0.0] * len(shrink)
    for holder in (dataset, multiscale):
        for step in holder.get("coordinateTransformations", ()):
            if step.get("type") == "scale":
                scale = [a * b for a, b in zip(scale, step["scale"], strict=True)]
                translation = [a * b for a, b in zip(translation, step["scale"], strict=True)]
            elif step.get("type") == "translation":
                translation = [a + b for a, b in zip(translation, step["translation"], strict=True)]
    return tuple(scale), tuple(translation)


def _channel_names(metadata: dict[str, Any]) -> tuple[str, ...]:
    listed = metadata.get("omero", {}).get("channels", ())
    names = tuple(str(channel.get("label", "")) for channel in listed)
    return names if any(names) else ()


def _is_rgb(count: int, dtype: str, channels: tuple[str, ...]) -> bool:
    """RGB if OMERO's labels say so, or three uint8 channels without names."""
    if channels:
        return tuple(label.lower() for label in channels) in {("r", "g", "b"), ("red", "green", "blue")}
    return count == 3 and dtype == "uint8"


def _plain_array(array: zarr.Array[Any], store: Path, path: str, name: str, axes: str | None) -> Slide:
    location = str(store / path)
    axes = (axes or "").lower() or _named_axes(array) or _guess_axes(array.shape)
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
    return Slide(name, store, path, "zarr", axes, array.dtype.name, (level,), (None,) * array.ndim, (), rgb)


def _named_axes(array: zarr.Array[Any]) -> str | None:
    """The dimension names of a zarr v3 array, if they are axes as we know them."""
    names = [str(name).lower() for name in getattr(array.metadata, "dimension_names", None) or ()]
    return "".join(names) if names and set(names) <= set(AXES) else None


def _guess_axes(shape: tuple[int, ...]) -> str | None:
    """Axes that a shape leaves no doubt about, else None: a channel axis is first or last and at most 4 long."""
    if len(shape) == 2:
        return "yx"
    if len(shape) == 3 and (shape[0] <= 4) != (shape[2] <= 4):
        return "cyx" if shape[0] <= 4 else "yxc"
    return None


def _not_an_image(location: str, expected: str, found: str) -> ReadError:
    return ReadError(
        location,
        expected=expected,
        found=found,
        cause="invalid or incomplete OME-Zarr metadata",
        remedy="write it again",
    )
