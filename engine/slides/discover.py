"""Find every image that a path holds, in any depth: folders, zarr hierarchies, files.

A folder is walked; whatever looks like an image but cannot be used becomes a `UnreadableImage` with its reason, so that
one bad file among many costs nothing but itself.  What earlier runs wrote is never taken for an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from cellseg_batch.engine.errors import CellsegError, NoImageError
from cellseg_batch.engine.slides.limits import absurdity
from cellseg_batch.engine.slides.ome_zarr import find_in_zarr, is_zarr_node, zarr_root
from cellseg_batch.engine.slides.pictures import PICTURE_SUFFIXES, open_picture
from cellseg_batch.engine.slides.plate import FieldChoice
from cellseg_batch.engine.slides.slide import NUMBERS, Slide, UnreadableImage
from cellseg_batch.engine.slides.tiff import TIFF_SUFFIXES, open_tiff

# Microscopy formats that people will try; each is named in the report instead of being passed over in silence.
_FOREIGN_SUFFIXES = (".dcm", ".czi", ".nd2", ".lif", ".mrxs", ".vsi", ".oib", ".oif", ".ims", ".h5", ".jp2")
EVERY_FIELD = FieldChoice()
OUTPUT_SUFFIX = ".cellseg.zarr"
JOURNAL_SUFFIX = ".cellseg"


def find_images(
    path: Path, axes: str | None = None, choice: FieldChoice = EVERY_FIELD
) -> list[Slide | UnreadableImage]:
    """Every image below ``path``, in sorted order.

    Args:
        path: a file, a zarr store, a group inside one, or a folder of any of these.
        axes: order of the axes of plain zarr arrays and of TIFFs that do not name them, such as ``cyx``.
        choice: which wells and fields of plates are wanted.

    Raises:
        NoImageError: the path does not exist or holds nothing that could be an image.
    """
    if not (path.exists() or is_zarr_node(path)):  # the node of a web server is no folder
        raise NoImageError(
            str(path), expected="a file, a zarr store or a folder", found="nothing", remedy="check the path"
        )
    path = path.resolve()
    found = [_usable(image) for image in _visit(path, path.name, axes, choice)]
    if not found:
        raise NoImageError(
            str(path),
            expected="at least one image (OME-Zarr, zarr array, TIFF, SVS, PNG, JPEG)",
            found="none" + " in such wells and fields" * (choice != EVERY_FIELD),
            cause="an empty folder or group, or a store with nothing but labels",
            remedy="see cellseg-batch info for what a path holds",
        )
    return found


def _visit(path: Path, name: str, axes: str | None, choice: FieldChoice) -> Iterator[Slide | UnreadableImage]:
    suffix = path.suffix.lower()
    if is_zarr_node(path):
        root, inside = zarr_root(path)
        yield from find_in_zarr(root, inside, name, axes, choice)
    elif path.is_dir():
        try:
            children = sorted(path.iterdir())
        except OSError as error:
            yield UnreadableImage(name, str(path), f"the folder cannot be listed: {error.strerror or error}")
            return
        for child in children:
            if not child.name.startswith(".") and not child.name.endswith((OUTPUT_SUFFIX, JOURNAL_SUFFIX)):
                yield from _visit(child, f"{name}/{child.name}", axes, choice)
    elif suffix in TIFF_SUFFIXES:
        yield from _guarded(path, name, partial(open_tiff, axes=axes))
    elif suffix in PICTURE_SUFFIXES:
        yield from _guarded(path, name, open_picture)
    elif suffix in _FOREIGN_SUFFIXES:
        yield UnreadableImage(
            name, str(path), f"{suffix} files are not supported; convert it to OME-Zarr or OME-TIFF (bioformats2raw)"
        )


def _usable(image: Slide | UnreadableImage) -> Slide | UnreadableImage:
    """The image itself, or why none can be segmented that is like it."""
    if isinstance(image, UnreadableImage):
        return image
    if not NUMBERS.fullmatch(image.dtype):
        reason = f"expected integer, floating point or boolean pixels, found {image.dtype}; convert the image"
        return UnreadableImage(image.name, image.location, reason, image.plate_position)
    absurd = absurdity(image)
    if absurd:
        return UnreadableImage(image.name, image.location, absurd, image.plate_position)
    empty = [level.shape for level in image.levels if 0 in level.shape]
    if empty:
        reason = f"expected an image with pixels, found shape {empty[0]} (likely an unfinished export); export it again"
        return UnreadableImage(image.name, image.location, reason, image.plate_position)
    return image


def _guarded(path: Path, name: str, opener: Callable[[Path, str], list[Slide]]) -> list[Slide | UnreadableImage]:
    try:
        return [*opener(path, name)]
    except CellsegError as error:
        return [UnreadableImage(name, str(path), error.detail)]
    except Exception as error:  # a damaged file can fail in any way that its library knows
        return [UnreadableImage(name, str(path), f"cannot be read: {type(error).__name__}: {error}".splitlines()[0])]
