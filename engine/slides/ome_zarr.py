"""Read the images of zarr hierarchies: OME-Zarr 0.4 and 0.5 multiscales, HCS plates, bioformats2raw, plain arrays.

Sources: the OME-Zarr specification 0.4 and 0.5 (ngff.openmicroscopy.org). Metadata are read leniently: whatever is
enough to read the pixels is accepted, and a level whose array is missing is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal

import zarr

from cellseg_batch.engine.errors import CellsegError, ReadError
from cellseg_batch.engine.slides.image_format import ImageFormat, LevelArray, Search
from cellseg_batch.engine.slides.plain_zarr import ZARR, describe_array
from cellseg_batch.engine.slides.plate import FieldChoice, PlatePosition
from cellseg_batch.engine.slides.slide import NUMBERS, Level, Slide, UnreadableImage, fits_axes
from cellseg_batch.engine.storage.paths import RemotePath, zarr_store

# Other spellings of the specification's "micrometer".
_UNIT_NAMES = dict.fromkeys(("µm", "μm", "um", "micron", "microns", "micrometre"), "micrometer")
# Attribute of groups that this program writes, which are not taken for images.
OUTPUT_MARK = "cellseg-batch-output"
# Number of members of a group in an object store that are read at the same time.
_REQUESTS = 16
_NODE_FILES = ("zarr.json", ".zgroup", ".zarray", ".zattrs")


class Zarr(ImageFormat):
    """Format of zarr hierarchies. OME-Zarr images hold their own labels; the labels of plain arrays lie beside them."""

    name: ClassVar[str] = ZARR
    title: ClassVar[str] = "OME-Zarr, zarr array"

    def can_open(self, path: Path) -> bool:
        """Whether a folder is a zarr group or array."""
        return is_zarr_node(path)

    def find(self, path: Path, name: str, search: Search) -> Iterator[Slide | UnreadableImage]:
        """Find every image in a node of a hierarchy and below it."""
        store, inside = zarr_root(path)
        return _images_in(store, inside, name, search, None)

    def open_level(self, slide: Slide, level: int) -> LevelArray:
        """Open the array of a level."""
        path = "/".join(part for part in (slide.path, slide.levels[level].path) if part)
        return zarr.open_array(zarr_store(slide.store), path=path, mode="r")

    def describe(self, slide: Slide) -> str:
        """OME-Zarr with its version, or zarr for a plain array."""
        return f"ome-zarr {'0.4' if slide.zarr_format == 2 else '0.5'}" if slide.holds_labels else "zarr"


def is_zarr_node(path: Path) -> bool:
    """Whether a folder is a zarr group or array, of either format."""
    return any((path / file).is_file() for file in _NODE_FILES)


def zarr_root(path: Path) -> tuple[Path, str]:
    """The outermost zarr hierarchy around a node, and the node's path inside it."""
    root = path
    while is_zarr_node(root.parent):
        root = root.parent
    return root, "" if root == path else path.relative_to(root).as_posix()


def _images_in(
    store: Path, path: str, name: str, search: Search, position: PlatePosition | None
) -> Iterator[Slide | UnreadableImage]:
    """Every image in the node ``path`` of ``store``; label groups and tables are not images.

    Args:
        store: root of the hierarchy.
        path: path of the node in it.
        name: name of the node as `Slide.name`.
        search: the user's choices.
        position: position of the node on a plate; None if it lies on no plate.
    """
    location = str(store / path)
    try:
        node = zarr.open(zarr_store(store), path=path, mode="r")
        if isinstance(node, zarr.Array):
            if node.ndim >= 2:
                yield describe_array(node, store, path, name, search.axes)
            return
        metadata = _ome_metadata(node)
        if "image-label" in metadata or OUTPUT_MARK in node.attrs:
            return
        if "multiscales" in metadata:
            yield replace(_multiscale(node, metadata, store, path, name), plate_position=position)
            return
        children = _children(node, metadata, location, search.fields, position)
    except CellsegError as error:
        yield UnreadableImage(name, location, error.detail, position)
        return
    except Exception as error:  # damaged JSON, unknown codecs, impossible metadata
        reason = f"its zarr metadata cannot be read: {type(error).__name__}: {error}"
        yield UnreadableImage(name, location, reason.splitlines()[0], position)
        return

    def images_of(listed: tuple[str, PlatePosition | None]) -> list[Slide | UnreadableImage]:
        child, child_position = listed
        below = f"{path}/{child}" if path else child
        if is_zarr_node(store / below):
            return [*_images_in(store, below, f"{name}/{child}", search, child_position)]
        reason = "listed in the metadata, but not in the store"
        return [UnreadableImage(f"{name}/{child}", str(store / below), reason, child_position)]

    if isinstance(store, RemotePath) and position is None:  # remote wells: answers take long, so ask for many at once
        with ThreadPoolExecutor(_REQUESTS) as pool:
            yield from chain.from_iterable(pool.map(images_of, children))
    else:
        yield from chain.from_iterable(map(images_of, children))


def as_zarr(slide: Slide, store: Path, levels: tuple[Level, ...], zarr_format: Literal[2, 3]) -> Slide:
    """The same slide with its pixels in copies: ``levels`` are arrays of the zarr hierarchy ``store``."""
    return replace(slide, store=store, path="", format=ZARR, levels=levels, zarr_format=zarr_format, holds_labels=True)


def open_written(store: Path, path: str) -> Slide:
    """Open the label or probability image ``path`` of ``store`` as a slide.

    Raises:
        ReadError: there is no such image.
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
    """Names of all rows and columns of a plate, including those without wells."""
    metadata = _ome_metadata(zarr.open_group(zarr_store(plate), mode="r"))["plate"]
    rows, columns = ([str(entry["name"]) for entry in metadata.get(side, ())] for side in ("rows", "columns"))
    return rows, columns


def _ome_metadata(node: zarr.Group) -> dict[str, Any]:
    """The OME attributes of a group: under ``ome`` in version 0.5, at the top in older versions."""
    attributes = dict(node.attrs)
    nested = attributes.get("ome")
    return nested if isinstance(nested, dict) else attributes


def _children(
    node: zarr.Group, metadata: dict[str, Any], location: str, choice: FieldChoice, position: PlatePosition | None
) -> list[tuple[str, PlatePosition | None]]:
    """(path, position on a plate) of the children of a group that may hold images: those in its metadata, else all."""
    if "plate" in metadata:
        wells = [_inside(well["path"], location) for well in metadata["plate"]["wells"]]
        positions = [PlatePosition(location, Path(well).parent.name, Path(well).name, field="") for well in wells]
        return [(well, of_well) for well, of_well in zip(wells, positions, strict=True) if choice.takes_well(of_well)]
    if "well" in metadata:
        fields = [_inside(field["path"], location) for field in metadata["well"]["images"]]
        return [(field, position and replace(position, field=field)) for field in fields if choice.takes_field(field)]
    members = sorted((key for key in node if key not in ("labels", "tables", "OME")), key=_numbers_in_order)
    return [(_inside(member, location), position) for member in members]


def _inside(listed: object, location: str) -> str:
    """Check that a path in the metadata of a node leads to something below the node; returns the path.

    Raises:
        ReadError: the path leads elsewhere.
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
            # zarr can read such an image, but readers of its labels could not find it.
            raise _not_an_image(location, "the paths of its levels as text", f"{dataset['path']!r}")
        array = node.get(_inside(dataset["path"], location))
        if not isinstance(array, zarr.Array):
            continue
        if array.ndim != len(axes):
            raise _not_an_image(location, f"{len(axes)} axes as its metadata say", f"an array of shape {array.shape}")
        if not dtype or not NUMBERS.fullmatch(array.dtype.name):
            dtype = array.dtype.name
        # Versions older than 0.4 have no transformations; only the shapes tell how the levels relate.
        factors = [a / b for a, b in zip(levels[0].shape if levels else array.shape, array.shape, strict=True)]
        scale, translation = _placement(dataset, multiscale, factors)
        levels.append(Level(dataset["path"], array.shape, array.chunks, scale, translation))
    if not levels:
        listed = ", ".join(str(dataset["path"]) for dataset in multiscale["datasets"])
        raise _not_an_image(location, f"the arrays that its metadata list ({listed})", "none of them in the store")
    channels = _channel_names(metadata)
    count = levels[0].shape[axes.index("c")] if "c" in axes else 1
    return Slide(
        name=name,
        store=store,
        path=path,
        format=ZARR,
        axes=axes,
        dtype=dtype,
        levels=tuple(levels),
        units=units,
        channels=channels,
        rgb=_is_rgb(count, dtype, channels),
        zarr_format=node.metadata.zarr_format,
        holds_labels=True,
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
    dataset: dict[str, Any], multiscale: dict[str, Any], factors: list[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(scale, translation) of a level: the dataset's transformations, then the whole image's."""
    scale = [1.0] * len(factors) if "coordinateTransformations" in dataset else factors
    translation = [0.0] * len(factors)
    for holder in (dataset, multiscale):
        for transformation in holder.get("coordinateTransformations", ()):
            if transformation.get("type") == "scale":
                scale = [a * b for a, b in zip(scale, transformation["scale"], strict=True)]
                translation = [a * b for a, b in zip(translation, transformation["scale"], strict=True)]
            elif transformation.get("type") == "translation":
                translation = [a + b for a, b in zip(translation, transformation["translation"], strict=True)]
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


def _not_an_image(location: str, expected: str, found: str) -> ReadError:
    return ReadError(
        location,
        expected=expected,
        found=found,
        cause="invalid or incomplete OME-Zarr metadata",
        remedy="write it again",
    )
