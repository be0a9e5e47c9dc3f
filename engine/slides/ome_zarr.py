"""Read the images of zarr hierarchies: OME-Zarr 0.4 and 0.5 multiscales, HCS plates, bioformats2raw, plain arrays.

Sources: the OME-Zarr specification 0.4 and 0.5 (ngff.openmicroscopy.org). Whatever a group lists is found or named.
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal

import zarr

from cellseg_batch.engine.errors import CellsegError, ReadError, brief
from cellseg_batch.engine.slides.image_format import (
    ImageFormat,
    LevelArray,
    Search,
    is_overview,
    left_out,
    some_of,
)
from cellseg_batch.engine.slides.ome_multiscale import describe_multiscale, not_an_image, ome_metadata, path_inside
from cellseg_batch.engine.slides.ome_xml import read_names
from cellseg_batch.engine.slides.plain_zarr import ZARR, describe_array, describe_pyramid
from cellseg_batch.engine.slides.plate import FieldChoice, PlatePosition
from cellseg_batch.engine.slides.slide import Level, Slide, UnreadableImage
from cellseg_batch.engine.storage.archives import ArchivedPath
from cellseg_batch.engine.storage.paths import RemotePath, is_web, zarr_store

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
        images = images_in(store, inside, name, search, None)
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


def images_in(
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
        metadata = ome_metadata(node)
        if _is_output(node, metadata):
            return
        if "multiscales" in metadata:
            slide = describe_multiscale(node, metadata, store, path, name)
            notes = _notes_on_content(node, slide) + search.check_axes(slide.axes, location)
            yield replace(slide, plate_position=position, notes=slide.notes + notes)
            return
        children = _children(node, metadata, location, search.fields, position)
        listed_images = {child for child, _ in children} if "well" in metadata else _listed_series(node)
        is_converted = _LAYOUT_MARK in metadata and "plate" not in metadata
        members = [child for child, _ in children]
        unlisted = _note_on_unlisted(metadata, store / path)
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
        images = [*images_in(store, below, f"{name}/{child}", search, child_position)] if is_there else []
        if images or (is_there and child not in listed_images):
            return images
        reason = "listed in the metadata, but " + ("holds no image" if is_there else "not in the store")
        return [UnreadableImage(f"{name}/{child}", str(store / below), reason, child_position)]

    children = [child for child in children if child[0] not in aside]
    notes = left_out(list(aside.values())) + unlisted
    if isinstance(store, RemotePath) and position is None:  # remote wells: answers take long, so ask for many at once
        with ThreadPoolExecutor(_REQUESTS) as pool:
            yield from _noted(chain.from_iterable(pool.map(images_of, children)), notes)
    else:
        yield from _noted(chain.from_iterable(map(images_of, children)), notes)
    if not metadata.keys() & {"plate", "well"} and not is_web(store):  # a group may be a folder of other files, too
        yield from search.visit_folder(store / path, name, search, _NO_IMAGES.union(members))


def _holds_nothing(node: zarr.Array[Any] | zarr.Group) -> bool:
    """Whether a node is a group without arrays at any depth and without metadata of its own."""
    if isinstance(node, zarr.Array) or node.attrs or any(node.arrays()):
        return False
    return all(_holds_nothing(group) for _, group in node.groups())


def _leads_back(node: Path) -> bool:
    """Whether a node is a link to a group around it."""
    if isinstance(node, RemotePath) or not node.is_symlink():
        return False
    group = node.resolve()
    return any(parent.resolve().is_relative_to(group) for parent in node.parents)


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
    listed = ome_metadata(node).get("multiscales") or [{"datasets": [{"path": level.path} for level in slide.levels]}]
    known = {str(dataset["path"]).split("/")[0] for dataset in listed[0]["datasets"]} | _NO_IMAGES
    others = _nodes_in(group, known)
    return (*notes, f"left out, as they are none of its levels: {some_of(others)}") if others else notes


def _note_on_unlisted(metadata: dict[str, Any], group: Path) -> tuple[str, ...]:
    """The note on nodes of a local plate or well that its metadata do not list; () if there are none."""
    if isinstance(group, RemotePath):  # whose answers take long
        return ()
    if "plate" in metadata:
        kind, members = "plate", _listed_paths(metadata["plate"], "wells", str(group))
        rows = sorted(row for row in group.iterdir() if row.is_dir() and row.name not in _NO_IMAGES)
        there = [f"{row.name}/{well}" for row in rows for well in _nodes_in(row, _NO_IMAGES)]
    elif "well" in metadata:
        kind, members = "well", _listed_paths(metadata["well"], "images", str(group))
        there = _nodes_in(group, _NO_IMAGES)
    else:
        return ()
    listed = {path_inside(member, str(group)) for member in members}
    others = [node for node in there if node not in listed]
    return (f"left out, as the {kind} does not list them: {some_of(others)}",) if others else ()


def _nodes_in(folder: Path, known: Container[str]) -> list[str]:
    """Names of the nodes in a local folder, but for the ``known`` ones."""
    return sorted(name for name in _names_in(folder) if name not in known and is_zarr_node(folder / name))


def _names_in(folder: Path) -> Iterator[str]:
    """Names of what lies in a folder on this machine, one after the other: there may be millions of chunks."""
    if isinstance(folder, ArchivedPath):
        yield from (path.name for path in folder.iterdir())
    else:
        with os.scandir(folder) as entries:
            yield from (entry.name for entry in entries)


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
    for name in _names_in(folder):
        if named.fullmatch(name):
            return ()
        misnamed = name if _CHUNK.fullmatch(name) else misnamed
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
        metadata = ome_metadata(node)
        slide = describe_multiscale(node, metadata, store, path, path)
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


def colours_of_classes(store: Path, path: str) -> dict[int, str]:
    """Value -> colour (``#rrggbb``) of the classes of the label image ``path`` of ``store``; {} if it shows no classes.

    Raises:
        ReadError: there is no such image.
    """
    about = ome_metadata(zarr.open_group(zarr_store(store), path=path, mode="r", use_consolidated=False))
    label = about.get("image-label", {})
    named = {entry["label-value"] for entry in label.get("properties", ()) if "class" in entry}
    colours = {entry["label-value"]: entry.get("rgba", ()) for entry in label.get("colors", ())}
    return {value: "#" + bytes(rgba[:3]).hex() for value, rgba in colours.items() if value in named and len(rgba) == 4}


def _is_output(node: zarr.Group, metadata: dict[str, Any]) -> bool:
    """Whether a group holds labels, of whatever program, or another output of this one."""
    return "image-label" in metadata or OUTPUT_MARK in node.attrs


def plate_names(plate: Path) -> tuple[list[str], list[str]]:
    """Names of all rows and columns of a plate, including those without wells."""
    metadata = ome_metadata(zarr.open_group(zarr_store(plate), mode="r", use_consolidated=False))["plate"]
    rows, columns = ([str(entry["name"]) for entry in metadata.get(side, ())] for side in ("rows", "columns"))
    return rows, columns


def _children(
    node: zarr.Group, metadata: dict[str, Any], location: str, choice: FieldChoice, position: PlatePosition | None
) -> list[tuple[str, PlatePosition | None]]:
    """(path, position on a plate) of the children of a group that may hold images: those in its metadata, else all."""
    if "plate" in metadata:
        wells = [path_inside(path, location) for path in _listed_paths(metadata["plate"], "wells", location)]
        positions = [PlatePosition(location, Path(well).parent.name, Path(well).name, field="") for well in wells]
        return [(well, of_well) for well, of_well in zip(wells, positions, strict=True) if choice.takes_well(of_well)]
    if "well" in metadata:
        fields = [path_inside(path, location) for path in _listed_paths(metadata["well"], "images", location)]
        return [(field, position and replace(position, field=field)) for field in fields if choice.takes_field(field)]
    members = {key for key in node if key not in _NO_IMAGES} | _listed_series(node)
    return [(path_inside(member, location), position) for member in sorted(members, key=_numbers_in_order)]


def _listed_paths(metadata: object, kind: str, location: str) -> list[object]:
    """Paths of the wells of a plate, or of the images of a well.

    Raises:
        ReadError: there are none.
    """
    entries = metadata.get(kind) if isinstance(metadata, dict) else None
    if not (isinstance(entries, list) and entries and all(isinstance(entry, dict) for entry in entries)):
        raise not_an_image(location, f"a list of {kind} in its metadata", f"{entries!r:.80}")
    return [entry.get("path") for entry in entries]


def _listed_series(node: zarr.Group) -> set[str]:
    """Paths of the images that a group of bioformats2raw lists; none in other groups."""
    ome = node.get(_OME_GROUP) if _LAYOUT_MARK in ome_metadata(node) else None
    listed = ome_metadata(ome).get("series") if isinstance(ome, zarr.Group) else None
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


def _numbers_in_order(key: str) -> tuple[bool, int, str]:
    return (not key.isdecimal(), int(key) if key.isdecimal() else 0, key)
