"""Read the images of zarr hierarchies: OME-Zarr 0.4 and 0.5 multiscales, HCS plates, bioformats2raw, plain arrays.

Sources: the OME-Zarr specification 0.4 and 0.5 (ngff.openmicroscopy.org). Metadata are read leniently: whatever is
enough to read the pixels is accepted, and a level whose array is missing is skipped and noted.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal

import zarr

from cellseg_batch.engine.errors import CellsegError, ReadError, brief
from cellseg_batch.engine.slides.colours import RGB, TAKEN_FOR_RGB, are_named_rgb, are_rgb
from cellseg_batch.engine.slides.image_format import ImageFormat, LevelArray, Search, is_overview, left_out
from cellseg_batch.engine.slides.ome_xml import read_names
from cellseg_batch.engine.slides.pixel_size import PixelSize, settle_pixel_size
from cellseg_batch.engine.slides.plain_zarr import ZARR, describe_array, describe_pyramid
from cellseg_batch.engine.slides.plate import FieldChoice, PlatePosition
from cellseg_batch.engine.slides.slide import AXES, Level, Slide, UnreadableImage
from cellseg_batch.engine.storage.paths import RemotePath, is_web, zarr_store

# Other spellings of the specification's "micrometer".
_UNIT_NAMES = dict.fromkeys(("µm", "μm", "um", "micron", "microns", "micrometre"), "micrometer")
# Attribute of groups that this program writes, which are not taken for images.
OUTPUT_MARK = "cellseg-batch-output"
# Number of members of a group in an object store that are read at the same time.
_REQUESTS = 16
# Number of chunks whose versions show whether an array has changed, on this machine and in an object store.
_SAMPLED, _SAMPLED_REMOTE = 8, 3
# Name of a chunk, or of the folder of chunks, in any version of zarr.
_CHUNK = re.compile(r"c|(c\.)?\d+(\.\d+)*")
_NODE_FILES = ("zarr.json", ".zgroup", ".zarray", ".zattrs")
# Attribute of groups and arrays that anndata writes: tables, and shapes and points of spatialdata.
_TABLE_MARK = "encoding-type"
# Attribute of groups that bioformats2raw writes, and their member that describes the others.
_LAYOUT_MARK, _OME_GROUP = "bioformats2raw.layout", "OME"
# Members of a group that are no images.
_NO_IMAGES = {"labels", "tables", _OME_GROUP}


class Zarr(ImageFormat):
    """Format of zarr hierarchies. OME-Zarr images hold their own labels; the labels of plain arrays lie beside them."""

    name: ClassVar[str] = ZARR
    title: ClassVar[str] = "OME-Zarr, zarr array"

    def can_open(self, path: Path) -> bool:
        """Whether a folder is a zarr group or array."""
        return is_zarr_node(path)

    def find(self, path: Path, name: str, search: Search) -> Iterator[Slide | UnreadableImage]:
        """Find every image in a node of a hierarchy and below it; a hierarchy without arrays is named."""
        store, inside = zarr_root(path)
        images = _images_in(store, inside, name, search, None)
        first = next(images, None)
        if first is None and not is_web(store) and _holds_nothing(_open_node(store, inside)):
            reason = "expected arrays, found a hierarchy of empty groups (likely an unfinished export); export it again"
            first = UnreadableImage(name, str(path), reason)
        return chain((first,) if first is not None else (), images)

    def open_level(self, slide: Slide, level: int) -> LevelArray:
        """Open the array of a level."""
        path = "/".join(part for part in (slide.path, slide.levels[level].path) if part)
        return zarr.open_array(zarr_store(slide.store), path=path, mode="r")

    def sample_files(self, slide: Slide, level: int) -> Iterator[Path]:
        """The metadata of a level's array, and chunks or shards over its diagonal with their folders."""
        folder = slide.store / slide.path / slide.levels[level].path
        yield from (folder / file for file in _NODE_FILES)
        array: zarr.Array[Any] = zarr.open_array(zarr_store(folder), mode="r")
        stored = array.shards or array.chunks
        last = [(length - 1) // side for length, side in zip(array.shape, stored, strict=True)]
        count = _SAMPLED_REMOTE if isinstance(slide.store, RemotePath) else _SAMPLED
        indices = {tuple(round(end * step / (count - 1)) for end in last) for step in range(count)}
        chunks = [folder / array.metadata.encode_chunk_key(index) for index in sorted(indices)]
        yield from dict.fromkeys(path for chunk in chunks for path in (chunk, chunk.parent))

    def describe(self, slide: Slide) -> str:
        """OME-Zarr with its version, or zarr for a plain array."""
        return f"ome-zarr {'0.4' if slide.zarr_format == 2 else '0.5'}" if slide.holds_labels else "zarr"


def is_zarr_node(path: Path) -> bool:
    """Whether a folder is a zarr group or array, of either format; False if it may not be looked into."""
    with suppress(PermissionError):
        return any((path / file).is_file() for file in _NODE_FILES)
    return False


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
        node = _open_node(store, path)
        if _TABLE_MARK in node.attrs:
            return
        if isinstance(node, zarr.Array):
            if node.ndim >= 2:
                slide = describe_array(node, store, path, name, search.axes)
                yield replace(slide, notes=_note_if_empty(node, store / path) + search.check_axes(slide.axes, location))
            return
        metadata = _ome_metadata(node)
        if _is_output(node, metadata):
            return
        if "multiscales" in metadata:
            slide = _multiscale(node, metadata, store, path, name)
            notes = _notes_on_content(node, slide) + search.check_axes(slide.axes, location)
            yield replace(slide, plate_position=position, notes=slide.notes + notes)
            return
        children = _children(node, metadata, location, search.fields, position)
        listed_images = {child for child, _ in children} if "well" in metadata else _listed_series(node)
        is_converted = _LAYOUT_MARK in metadata and "plate" not in metadata
        members = [child for child, _ in children]
        aside = _overviews(store, path, members) if is_converted else {}
        if not metadata.keys() & {"plate", "well", _LAYOUT_MARK}:
            pyramid = describe_pyramid(node, members, store, path, name, search.axes)
            if pyramid is not None:
                notes = _notes_on_content(node, pyramid) + search.check_axes(pyramid.axes, location)
                yield replace(pyramid, notes=pyramid.notes + notes)
                return
    except CellsegError as error:
        yield UnreadableImage(name, location, error.detail, position)
        return
    except Exception as error:  # damaged JSON, unknown codecs, impossible metadata
        yield UnreadableImage(name, location, f"its zarr metadata cannot be read: {brief(error)}", position)
        return

    def images_of(listed: tuple[str, PlatePosition | None]) -> list[Slide | UnreadableImage]:
        child, child_position = listed
        below = f"{path}/{child}" if path else child
        if _leads_back(store / below):
            return []
        is_there = is_zarr_node(store / below)
        images = [*_images_in(store, below, f"{name}/{child}", search, child_position)] if is_there else []
        if images or (is_there and child not in listed_images):
            return images
        reason = "listed in the metadata, but " + ("holds no image" if is_there else "not in the store")
        return [UnreadableImage(f"{name}/{child}", str(store / below), reason, child_position)]

    children = [child for child in children if child[0] not in aside]
    notes = left_out(list(aside.values()))
    if isinstance(store, RemotePath) and position is None:  # remote wells: answers take long, so ask for many at once
        with ThreadPoolExecutor(_REQUESTS) as pool:
            yield from _noted(chain.from_iterable(pool.map(images_of, children)), notes)
    else:
        yield from _noted(chain.from_iterable(map(images_of, children)), notes)


def _holds_nothing(node: zarr.Array[Any] | zarr.Group) -> bool:
    """Whether a node is a group without arrays at any depth and without metadata of its own."""
    if isinstance(node, zarr.Array) or node.attrs or any(node.arrays()):
        return False
    return all(_holds_nothing(group) for _, group in node.groups())


def _leads_back(node: Path) -> bool:
    """Whether a node is a link to a group around it."""
    if isinstance(node, RemotePath) or not node.is_symlink():
        return False
    return node.parent.resolve().is_relative_to(node.resolve())


def _noted(images: Iterable[Slide | UnreadableImage], notes: tuple[str, ...]) -> Iterator[Slide | UnreadableImage]:
    """The images, the first slide with ``notes``."""
    for image in images:
        if isinstance(image, Slide) and notes:
            yield replace(image, notes=notes + image.notes)
            notes = ()
        else:
            yield image


def _open_node(store: Path, path: str) -> zarr.Array[Any] | zarr.Group:
    """Open a node as it is: metadata that were gathered in a group may be older. Web servers list nothing else."""
    return zarr.open(zarr_store(store), path=path, mode="r", use_consolidated=None if is_web(store) else False)


def _notes_on_content(node: zarr.Group, slide: Slide) -> tuple[str, ...]:
    """Notes on a local image whose full resolution is not stored, and on members of its group that belong to no image.

    Raises:
        ReadError: as `_note_if_empty`.
    """
    full, group = slide.levels[0].path, slide.store / slide.path
    if isinstance(group, RemotePath):  # whose answers take long
        return ()
    notes = _note_if_empty(node[full], group / full)
    listed = _ome_metadata(node).get("multiscales") or [{"datasets": [{"path": level.path} for level in slide.levels]}]
    known = {str(dataset["path"]).split("/")[0] for dataset in listed[0]["datasets"]} | _NO_IMAGES
    with os.scandir(group) as entries:
        others = [entry.name for entry in entries if entry.name not in known and entry.is_dir()]
    others = sorted(other for other in others if is_zarr_node(group / other))
    return (*notes, f"left out, as they are none of its levels: {', '.join(others)}") if others else notes


def _note_if_empty(array: Any, folder: Path) -> tuple[str, ...]:
    """A note if no chunk of a local array is stored, which is legal for an image of nothing but its fill value.

    Raises:
        ReadError: chunks are stored, but under other names than the metadata say, so that none would be found.
    """
    if isinstance(folder, RemotePath):
        return ()
    first = array.metadata.encode_chunk_key((0,) * array.ndim).split("/")[0]
    named = re.compile(re.escape(first).replace("0", r"\d+"))
    misnamed = ""
    with os.scandir(folder) as entries:
        for entry in entries:
            if named.fullmatch(entry.name):
                return ()
            misnamed = entry.name if _CHUNK.fullmatch(entry.name) else misnamed
    if misnamed:
        raise ReadError(
            str(folder),
            expected=f"chunks that are named as its metadata say, such as {first}",
            found=misnamed,
            cause="a wrong or missing separator of chunk names in its metadata",
            remedy="set dimension_separator in .zarray, or the chunk_key_encoding in zarr.json",
        )
    return ("no chunk of its pixels is stored, so all have the fill value",)


def as_zarr(slide: Slide, store: Path, levels: tuple[Level, ...], zarr_format: Literal[2, 3]) -> Slide:
    """The same slide with its pixels in copies: ``levels`` are arrays of the zarr hierarchy ``store``."""
    return replace(slide, store=store, path="", format=ZARR, levels=levels, zarr_format=zarr_format, holds_labels=True)


def open_written(store: Path, path: str) -> Slide:
    """Open the label or probability image ``path`` of ``store`` as a slide.

    Raises:
        ReadError: there is no such image.
    """
    try:
        node = zarr.open_group(zarr_store(store), path=path, mode="r", use_consolidated=False)
        metadata = _ome_metadata(node)
        slide = _multiscale(node, metadata, store, path, path)
        finest = metadata["multiscales"][0]["datasets"][0]["path"]
        # Some programs mark their labels by nothing but the group around them.
        if not (_is_output(node, metadata) or (store / path).parent.name == "labels"):
            found = "an image to segment"
        elif slide.levels[0].path != finest:
            found = f"one without its level {finest}"
        else:
            return slide
    except (OSError, KeyError, ValueError) as error:
        found = brief(error)
    raise ReadError(
        str(store / path),
        expected="an image that cellseg-batch has written",
        found=found,
        remedy="write it with cellseg-batch run, or name another one with `name` or `output`",
    )


def _is_output(node: zarr.Group, metadata: dict[str, Any]) -> bool:
    """Whether a group holds labels, of whatever program, or another output of this one."""
    return "image-label" in metadata or OUTPUT_MARK in node.attrs


def plate_names(plate: Path) -> tuple[list[str], list[str]]:
    """Names of all rows and columns of a plate, including those without wells."""
    metadata = _ome_metadata(zarr.open_group(zarr_store(plate), mode="r", use_consolidated=False))["plate"]
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
        wells = [_inside(path, location) for path in _listed_paths(metadata["plate"], "wells", location)]
        positions = [PlatePosition(location, Path(well).parent.name, Path(well).name, field="") for well in wells]
        return [(well, of_well) for well, of_well in zip(wells, positions, strict=True) if choice.takes_well(of_well)]
    if "well" in metadata:
        fields = [_inside(path, location) for path in _listed_paths(metadata["well"], "images", location)]
        return [(field, position and replace(position, field=field)) for field in fields if choice.takes_field(field)]
    members = {key for key in node if key not in _NO_IMAGES} | _listed_series(node)
    return [(_inside(member, location), position) for member in sorted(members, key=_numbers_in_order)]


def _listed_paths(metadata: object, kind: str, location: str) -> list[object]:
    """Paths of the wells of a plate, or of the images of a well.

    Raises:
        ReadError: there are none.
    """
    entries = metadata.get(kind) if isinstance(metadata, dict) else None
    if not (isinstance(entries, list) and entries and all(isinstance(entry, dict) for entry in entries)):
        raise _not_an_image(location, f"a list of {kind} in its metadata", f"{entries!r:.80}")
    return [entry.get("path") for entry in entries]


def _listed_series(node: zarr.Group) -> set[str]:
    """Paths of the images that a group of bioformats2raw lists; none in other groups."""
    ome = node.get(_OME_GROUP) if _LAYOUT_MARK in _ome_metadata(node) else None
    listed = _ome_metadata(ome).get("series") if isinstance(ome, zarr.Group) else None
    return {str(series) for series in listed} if isinstance(listed, list) else set()


def _overviews(store: Path, path: str, members: list[str]) -> dict[str, str]:
    """Member -> name of the members that show a glass and not the sample; none if all would be such.

    The group is one of bioformats2raw: the names of the images are in OME-XML, in the order of the members.
    """
    names = {member: member for member in members}
    xml = store / path / _OME_GROUP / "METADATA.ome.xml"
    if xml.is_file():
        with suppress(ReadError, ValueError):  # damaged names are as good as none
            names |= dict(zip(members, read_names(xml.read_text("utf-8"), str(xml)), strict=True))
    overviews = {member: name for member, name in names.items() if is_overview(name) or is_overview(member)}
    return overviews if len(overviews) < len(members) else {}


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
    listed = metadata["multiscales"]
    if not (isinstance(listed, list) and listed and isinstance(listed[0], dict)):
        raise _not_an_image(location, "a list of multiscales", f"{listed!r:.80}")
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
        raise _not_an_image(location, "a list of levels in its metadata", f"{datasets!r:.80}")
    found: dict[str, tuple[dict[str, Any], zarr.Array[Any]]] = {}
    notes = []
    for dataset in datasets:
        path = dataset.get("path")
        if not isinstance(path, str):
            # zarr can read such an image, but readers of its labels could not find it.
            raise _not_an_image(location, "the paths of its levels as text", f"{path!r}")
        array = node.get(_inside(path, location))
        if not isinstance(array, zarr.Array):
            notes.append(f"level {path} is listed, but not in the store")
            continue
        if array.ndim != len(axes):
            raise _not_an_image(
                location, f"arrays of the axes {axes} that its metadata list", f"one of shape {array.shape}"
            )
        first = next(iter(found.values()))[1] if found else array
        if 0 in first.shape:
            raise _not_an_image(location, "an image with pixels", f"shape {array.shape}")
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
        raise _not_an_image(location, f"the arrays that its metadata list ({listed})", "none of them in the store")
    y, x = axes.index("y"), axes.index("x")
    ordered = sorted(found.values(), key=lambda level: -level[1].shape[y] * level[1].shape[x])
    if ordered != list(found.values()):
        notes.append("its levels are not listed from the largest, but taken so")
    return [dataset for dataset, _ in ordered], [array for _, array in ordered], notes


def _axes_of(multiscale: dict[str, Any], location: str) -> tuple[str, tuple[str | None, ...]]:
    listed = multiscale.get("axes")
    if not listed:
        raise _not_an_image(location, "axes in its metadata", "none")
    # Version 0.3 wrote axes as plain names.
    entries = [{"name": axis} if isinstance(axis, str) else axis for axis in listed] if isinstance(listed, list) else []
    if not entries or not all(isinstance(axis, dict) and isinstance(axis.get("name"), str) for axis in entries):
        raise _not_an_image(location, "a list of axes with names in its metadata", f"{listed!r:.80}")
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
            raise _not_an_image(location, f"one axis {axis}", f"{names.count(axis)} in {', '.join(names)}")
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


def _not_an_image(location: str, expected: str, found: str) -> ReadError:
    return ReadError(
        location,
        expected=expected,
        found=found,
        cause="invalid or incomplete OME-Zarr metadata",
        remedy="write it again",
    )
