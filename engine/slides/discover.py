"""Find every image below a path, at any depth: in folders, stores and files.

Whatever looks like an image but cannot be used becomes an `UnreadableImage` with its reason, so that a bad file does
not stop the others. Outputs of earlier runs are never taken for images.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cellseg_batch.engine.errors import NoImageError, ReadError, brief
from cellseg_batch.engine.machine import MOST_NAME_BYTES
from cellseg_batch.engine.slides import formats
from cellseg_batch.engine.slides.image_format import ImageFormat, Search, why_unreadable
from cellseg_batch.engine.slides.ome_zarr import is_zarr_node, zarr_root
from cellseg_batch.engine.slides.plate import FieldChoice
from cellseg_batch.engine.slides.slide import NUMBERS, Slide, UnreadableImage
from cellseg_batch.engine.storage.paths import RemotePath

EVERY_FIELD = FieldChoice()
OUTPUT_SUFFIX = ".cellseg.zarr"
JOURNAL_SUFFIX = ".cellseg"

# Causes of a path without images.
_EMPTY_FOLDER = "an empty folder or group, or a store with nothing but labels"
_OTHER_FILE = "a file of another format, without the suffix of its format, or exported by cellseg-batch"

# What may lie in a folder besides files and folders. To open one may wait for ever, or never end.
_SPECIAL = (
    *((stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket")),
    *((stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device")),
)

# A few bytes of metadata may claim any number of pixels. No microscope exceeds these bounds.
# A whole slide of 15 x 15 cm at 0.25 µm per pixel.
MOST_PLANE_PIXELS = 600_000**2
# A row of 2.5 m.
MOST_SIDE = 10_000_000
MOST_PIXELS = 10**15
# Reading a single pixel decodes its whole chunk.
MOST_CHUNK_BYTES = 4 << 30


def journals_of(store: Path) -> Path:
    """The folder of the journals of a store, beside it."""
    return store.with_name(with_suffix(store.name, JOURNAL_SUFFIX))


def with_suffix(name: str, suffix: str) -> str:
    """A name with a suffix added; what is too long for a name is cut, and ends in a hash of the whole."""
    most = MOST_NAME_BYTES - len(suffix)
    if len(os.fsencode(name)) <= most:
        return name + suffix
    end = f"-{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}"
    while len(os.fsencode(name)) > most - len(end):
        name = name[:-1]
    return name + end + suffix


def find_images(
    path: Path, axes: str | None = None, choice: FieldChoice = EVERY_FIELD
) -> list[Slide | UnreadableImage]:
    """Find every image below ``path``, in sorted order; an image that several names lead to is found once.

    The list is empty if there are images, but none in the wells and fields of ``choice``.

    Args:
        path: a file, a zarr store, a group inside one, or a folder of any of these.
        axes: order of the axes, such as ``cyx``; images that name others themselves become an `UnreadableImage`, but
            for TIFFs and plain zarr arrays.
        choice: wells and fields of plates to take.

    Raises:
        NoImageError: the path does not exist or holds nothing that could be an image.
    """
    try:
        # A link to nothing is named as an image; the node of a web server is no folder.
        found = "" if path.exists() or _leads_nowhere(path) or is_zarr_node(path) else "nothing"
    except PermissionError as error:
        found = brief(error)
    if found:
        raise NoImageError(
            str(path), expected="a file, a zarr store or a folder", found=found, remedy="check the path and its rights"
        )
    path, search = _followed(path), Search(axes, choice, _visit_folder)
    images = _once(_usable(_followed_image(image)) for image in _visit(path, path.name, search))
    images = [_with_links(image, search.folders) for image in images]
    if not images and choice != EVERY_FIELD:
        find_images(path, axes)  # which raises an error if there are none at all
    elif not images:
        titles = ", ".join(image_format.title for image_format in formats.FORMATS if image_format.title)
        raise NoImageError(
            str(path),
            expected=f"at least one image ({titles})",
            found=_special_file(path) or "none",
            cause=_EMPTY_FOLDER if path.is_dir() else _OTHER_FILE,
            remedy="see cellseg-batch info for what a path holds",
        )
    return images


def find_all_images(
    paths: Iterable[Path], axes: str | None = None, choice: FieldChoice = EVERY_FIELD
) -> list[Slide | UnreadableImage]:
    """Find every image below several paths, each once, as `find_images` does for one.

    Raises:
        NoImageError: one of the paths does not exist or holds nothing that could be an image.
    """
    return _once(image for path in paths for image in find_images(path, axes, choice))


def first_slide(images: Sequence[Slide | UnreadableImage]) -> Slide:
    """The first of the images below a path.

    Raises:
        ReadError: the first image cannot be used.
    """
    image = images[0]
    if isinstance(image, UnreadableImage):
        raise ReadError.with_detail(image.path, image.reason)
    return image


def _visit(path: Path, name: str, search: Search) -> Iterator[Slide | UnreadableImage]:
    special = _special_file(path)
    if special is not None:
        if formats.is_named_like_an_image(path.name):
            yield UnreadableImage(name, str(path), f"expected a file, found {special}; copy the image into a file")
        return
    if _leads_nowhere(path):
        if not path.suffix or formats.is_named_like_an_image(path.name):
            yield UnreadableImage(name, str(path), f"a link to {path.readlink()}, where nothing is; mend or remove it")
        return
    image_format = formats.format_at(path)
    if image_format is not None:
        yield from _images_of(image_format, path, name, search)
        return
    images = _visit_folder(path, name, search) if path.is_dir() else iter(())
    image = next(images, None)
    reason = formats.why_unsupported(path.name)
    if image is not None:
        yield image
        yield from images
    elif reason is not None:
        yield UnreadableImage(name, str(path), reason)


def _visit_folder(
    path: Path, name: str, search: Search, known: Container[str] = ()
) -> Iterator[Slide | UnreadableImage]:
    """Yield the images in a folder, but for those in what has one of the ``known`` names."""
    search.folders[path] = []
    try:
        children = sorted(path.iterdir())
    except OSError as error:
        yield UnreadableImage(name, str(path), f"the folder cannot be listed: {error.strerror or error}")
        return
    for child in children:
        if child.name.startswith(".") or child.name.endswith((OUTPUT_SUFFIX, JOURNAL_SUFFIX)) or child.name in known:
            continue
        child_name = f"{name}/{child.name}"
        try:
            followed = _followed(child)
        except OSError as error:
            yield UnreadableImage(child_name, str(child), f"cannot be looked at: {error.strerror or error}")
            continue
        if followed in child.parents:
            continue  # a link back to a folder around it
        if followed in search.folders:
            search.folders[followed].append(child_name)
        else:
            yield from _visit(followed, child_name, search)


def _leads_nowhere(path: Path) -> bool:
    """Whether a path is a link to nothing, or to itself."""
    return not isinstance(path, RemotePath) and path.is_symlink() and not path.exists()


def _special_file(path: Path) -> str | None:
    """What a path leads to that is neither a file nor a folder; None if it is one of these, or nothing."""
    if isinstance(path, RemotePath) or not path.exists():
        return None
    mode = path.stat().st_mode
    return next((kind for is_kind, kind in _SPECIAL if is_kind(mode)), None)


def _followed(path: Path) -> Path:
    """A path without links, but for the name of a file: its suffix and the files beside it belong to this name."""
    if isinstance(path, RemotePath) or path.is_dir():
        return path.resolve()
    return path.parent.resolve() / path.name


def _followed_image(image: Slide | UnreadableImage) -> Slide | UnreadableImage:
    """The image in its real store, if a link inside a zarr hierarchy leads to it."""
    if isinstance(image, UnreadableImage) or image.zarr_format is None or image.identity == image.location:
        return image
    store, path = zarr_root(Path(image.identity))
    return replace(image, store=store, path=path)


def _once(images: Iterable[Slide | UnreadableImage]) -> list[Slide | UnreadableImage]:
    """The images without those that are named again; a slide that is named again has a note.

    A field of a plate keeps its position there, even if it is named by itself too.
    """
    kept: dict[tuple[str, str], Slide | UnreadableImage] = {}
    for image in images:
        key = image.identity, image.reason if isinstance(image, UnreadableImage) else ""
        first = kept.setdefault(key, image)
        if first is not image and isinstance(first, Slide) and isinstance(image, Slide):
            taken = image if first.plate_position is None else first
            kept[key] = replace(taken, notes=_with_note(first.notes, f"also named as {image.name}; it is taken once"))
    return list(kept.values())


def _with_links(image: Slide | UnreadableImage, folders: dict[Path, list[str]]) -> Slide | UnreadableImage:
    """The image with a note for each link that leads to its folder again."""
    if isinstance(image, UnreadableImage) or not any(folders.values()):
        return image
    links = [link for folder in image.store.parents for link in folders.get(folder, ())]
    for link in links:
        image = replace(image, notes=_with_note(image.notes, f"also below {link}; it is taken once"))
    return image


def _with_note(notes: tuple[str, ...], note: str) -> tuple[str, ...]:
    return notes if note in notes else (*notes, note)


def _images_of(image_format: ImageFormat, path: Path, name: str, search: Search) -> Iterator[Slide | UnreadableImage]:
    """Yield the images that a format finds at ``path``, then an `UnreadableImage` if an error ends the search."""
    try:
        yield from image_format.find(path, name, search)
    except Exception as error:  # libraries raise errors of many types for damaged files
        yield UnreadableImage(name, str(path), why_unreadable(error))


def _usable(image: Slide | UnreadableImage) -> Slide | UnreadableImage:
    """The image itself, or an `UnreadableImage` if such an image cannot be segmented."""
    if isinstance(image, UnreadableImage):
        return image
    reason = _why_unusable(image)
    return image if reason is None else UnreadableImage(image.name, image.location, reason, image.plate_position)


def _why_unusable(slide: Slide) -> str | None:
    """Why no pixels of ``slide`` can be segmented, in one line; None if they can."""
    if not NUMBERS.fullmatch(slide.dtype):
        return f"expected integer, floating point or boolean pixels, found {slide.dtype}; convert the image"
    too_large = _why_too_large(slide)
    if too_large is not None:
        return too_large
    for level in slide.levels:
        if 0 in level.shape:
            return (
                f"expected an image with pixels, found shape {level.shape} (likely an unfinished export); "
                "export it again"
            )
    return None


def _why_too_large(slide: Slide) -> str | None:
    """Why a level of ``slide`` is too large, in one line with the numbers; None if no level exceeds a bound."""
    itemsize = np.dtype(slide.dtype).itemsize
    for number, level in enumerate(slide.levels):
        height, width = slide.plane_shape(number)
        chunk = math.prod(level.chunks) * itemsize
        for count, most, meaning in (
            (max(height, width), MOST_SIDE, f"px along a side of {height} x {width}"),
            (height * width, MOST_PLANE_PIXELS, f"px in a plane of {height} x {width}"),
            (math.prod(level.shape), MOST_PIXELS, f"px in shape {level.shape}"),
            (chunk, MOST_CHUNK_BYTES, f"bytes in one chunk of {' x '.join(map(str, level.chunks))} once decoded"),
        ):
            if count > most:
                return (
                    f"expected at most {most} {meaning}, found {count} (likely damaged metadata or a decompression "
                    f"bomb); write level {level.path or number} again in smaller pieces"
                )
    return None
