"""Define the interface of an image format: recognise its paths, list their images, open a level.

`formats` lists the formats. A format knows its files and their library; it does not choose levels or channels.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Protocol

from cellseg_batch.engine.errors import CellsegError, ReadError, brief
from cellseg_batch.engine.slides.plate import FieldChoice
from cellseg_batch.engine.slides.slide import Slide, UnreadableImage
from cellseg_batch.engine.storage.paths import RemotePath

# Names of the pictures that scanners take of a glass besides the scan.
_OVERVIEW = re.compile(r"(slide\s*)?(label|macro|thumbnail|overview|preview|map)(\s*image)?", re.IGNORECASE)
# Software that pictures and labels name if this engine exported them: outputs, which no run takes for images.
WRITTEN_BY = "cellseg-batch"
# Number of names that a message shows.
_SHOWN = 5


class LevelArray(Protocol):
    """Pixels of a level, with the axes of its slide, that are decoded when they are sliced."""

    def __getitem__(self, index: tuple[slice, ...], /) -> Any:
        """Decode the pixels in a slice along each axis; the result can be passed to `numpy.asarray`."""


@dataclass(frozen=True)
class Search:
    """The user's choices for a search for images.

    Attributes:
        axes: order of the axes, such as ``cyx``, of images that do not name theirs; None takes it from the images.
        fields: wells and fields of plates to take.
        visit_folder: finds the images in a folder, given its path, its name as `Slide.name`, the search and the names
            of what to pass over; for formats whose stores are folders with other files in them.
        visited: files whose images are found already, for formats that lead to a file from several others.
        folders: folder that is searched already -> names of the links that lead to it again.
    """

    axes: str | None
    fields: FieldChoice
    visit_folder: Callable[[Path, str, Search, Container[str]], Iterator[Slide | UnreadableImage]]
    visited: set[Path] = field(default_factory=set)
    folders: dict[Path, list[str]] = field(default_factory=dict)

    def check_axes(self, named: str, location: str) -> tuple[str, ...]:
        """The note on a single plane, to which the user's axes do not apply; () if there is nothing to say.

        Args:
            named: axes that the image names, or that follow from its shape.
            location: path of the image.

        Raises:
            ReadError: the image has more axes than those of a plane, and the user names others.
        """
        if self.axes is None or self.axes.lower() == named:
            return ()
        if named == "yx":
            return (f"`axes={self.axes}` was not applied: the image is a single plane",)
        raise ReadError(
            location,
            expected=f"`axes={named}`, as the image says",
            found=f"`axes={self.axes}`",
            remedy="leave `axes` out for this image",
        )


class ImageFormat(ABC):
    """A kind of file, folder or store that holds images.

    A format is an object in `formats.FORMATS`. Slides hold its name, as they travel between processes.

    Attributes:
        name: value of `Slide.format`.
        title: names of the format in messages; "" if no path leads to its images.
        suffixes: suffixes of its file names, in lower case; () if names decide nothing.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]] = ()

    def can_open(self, path: Path) -> bool:
        """Whether the file, folder or store ``path`` has this format; by default, whether a file has such a suffix."""
        return path.name.lower().endswith(self.suffixes) and not path.is_dir()

    @abstractmethod
    def find(self, path: Path, name: str, search: Search) -> Iterable[Slide | UnreadableImage]:
        """Find every image at ``path``, from the metadata alone.

        If an error is raised, the caller keeps the images before it and turns the error into an `UnreadableImage`.

        Args:
            path: a path that `can_open` accepts.
            name: name of the path as `Slide.name`; `name_in_series` makes one for each image of several.
            search: the user's choices.
        """

    @abstractmethod
    def open_level(self, slide: Slide, level: int) -> LevelArray:
        """Open the pixels of a level, in the order of the slide's axes; several threads may slice them at once."""

    def close(self, array: Any) -> None:  # noqa: B027 - most formats hold no file open
        """Close the file that `open_level` opened."""

    def sample_files(self, slide: Slide, level: int) -> Iterable[Path]:
        """Files of a slide, always the same, of which one is written anew if the pixels of a level change."""
        return (slide.store, *slide.parts)

    def describe(self, slide: Slide) -> str:
        """Name of the slide's format for messages, with the version if that matters."""
        return self.name


def name_in_series(name: str, number: int, count: int) -> tuple[str, str]:
    """(name, path) of image ``number`` of a file with ``count`` images; a single image has the name of the file."""
    return (f"{name}/{number}", str(number)) if count > 1 else (name, "")


def beside(name: str, path: Path, other: Path) -> str:
    """Name as `Slide.name` of a file beside ``path``, which has the name ``name``."""
    return name.removesuffix(path.name) + other.name


def is_overview(name: str) -> bool:
    """Whether an image of this name shows a glass and its label, and not the sample."""
    return _OVERVIEW.fullmatch(name.strip()) is not None


def left_out(names: Sequence[str]) -> tuple[str, ...]:
    """The note on pictures of a file that are not taken beside its scan; none if ``names`` is empty."""
    return (f"left out beside the scan: {some_of(names)}",) if names else ()


def some_of(names: Sequence[str]) -> str:
    """Names in a message; of many the first, and how many there are more."""
    more = len(names) - _SHOWN
    return ", ".join([*names[:_SHOWN], *[f"{more} more"] * (more > 0)])


def image_or_reason(make: Callable[[], Slide], name: str, location: str) -> Slide | UnreadableImage:
    """What ``make`` returns, or an `UnreadableImage` with the error that it raises."""
    try:
        return make()
    except Exception as error:  # libraries raise errors of many types for damaged files
        return UnreadableImage(name, location, why_unreadable(error))


def image_in_series(
    path: Path, name: str, number: int, count: int, describe: Callable[[str, str], Slide]
) -> Slide | UnreadableImage:
    """Image ``number`` of a file with ``count`` images, or an `UnreadableImage` with what ``describe`` raises.

    Args:
        path: the file.
        name: name of the file as `Slide.name`.
        number: number of the image.
        count: number of images.
        describe: makes the slide of the image from its name and its path in the file.
    """
    image_name, inside = name_in_series(name, number, count)
    return image_or_reason(lambda: describe(image_name, inside), image_name, str(path / inside))


def why_unreadable(error: Exception) -> str:
    """Why an image cannot be used, in one line, by the error that it raised."""
    if isinstance(error, CellsegError):
        return error.detail
    if isinstance(error, OSError) and error.errno is not None:  # the operating system's, not a library's
        return f"cannot be read: {brief(error)}; check the path and its rights"
    return f"cannot be read: {brief(error)} (likely damaged, or not what its name promises); copy or export it again"


def local_file(path: Path) -> str:
    """The argument for a library that opens files on this machine alone.

    Raises:
        ReadError: the file lies elsewhere.
    """
    if isinstance(path, RemotePath):
        raise ReadError(
            str(path),
            expected="a file on this machine, for a format that no library reads over the network",
            found="a URL",
            remedy="copy it here, or convert it to OME-Zarr where it lies",
        )
    return str(path)


@contextmanager
def reading_by(library: str, path: Path) -> Iterator[None]:
    """Turn what a library raises about a file, of whatever type, into a ReadError."""
    try:
        yield
    except CellsegError:
        raise
    except Exception as error:
        raise ReadError(
            str(path),
            expected=f"a file that {library} can read",
            found=brief(error),
            cause="a damaged or unfinished file, or a variety that the library does not know",
            remedy="copy or export it again, or convert it to OME-TIFF (bioformats2raw)",
        ) from error


def optional_library(module: str, package: str) -> Any:
    """Import a library that only one format needs.

    Args:
        module: name of the module.
        package: pip requirement that installs the library, such as ``cellseg-batch[czi]``.

    Raises:
        ReadError: the library is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ReadError(
            module,
            expected=f"the library {module}",
            found=str(error),
            remedy=f"install it with: pip install '{package}'",
        ) from error
