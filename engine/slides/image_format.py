"""What an image format does: say which paths are its own, list their images, open a level.

`formats` lists the formats. A format knows its files and their library; it does not choose levels or channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Protocol

from cellseg_batch.engine.errors import ReadError
from cellseg_batch.engine.slides.plate import FieldChoice
from cellseg_batch.engine.slides.slide import Slide, UnreadableImage


class LevelArray(Protocol):
    """Pixels of one level, with the axes of its slide, that are decoded as they are asked for."""

    def __getitem__(self, index: tuple[slice, ...], /) -> Any:
        """The pixels of one slice along each axis, as something that numpy takes for an array."""


@dataclass(frozen=True)
class Search:
    """What the user says about the images to find.

    Attributes:
        axes: order of the axes of images that do not name theirs, such as ``cyx``.
        fields: which wells and fields of plates are wanted.
    """

    axes: str | None
    fields: FieldChoice


class ImageFormat(ABC):
    """One kind of file, folder or store that holds images.

    A format is one object in `formats.FORMATS`. Slides hold its name, as they travel between processes.

    Attributes:
        name: what `Slide.format` holds.
        title: names of the format in messages; "" if no path leads to its images.
        suffixes: ends of the names of its files, in lower case; () if names decide nothing.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]] = ()

    def can_open(self, path: Path) -> bool:
        """Whether the file, folder or store ``path`` is of this format: by default, a file with one of the suffixes."""
        return path.name.lower().endswith(self.suffixes) and not path.is_dir()

    @abstractmethod
    def find(self, path: Path, name: str, search: Search) -> Iterable[Slide | UnreadableImage]:
        """Every image at ``path``, from its metadata alone.

        An error that is raised becomes an `UnreadableImage`, after the images found before it.

        Args:
            path: a path that `can_open` accepts.
            name: name of the path as `Slide.name`; `name_in_series` makes one for each image of several.
            search: what the user says about the images.
        """

    @abstractmethod
    def open_level(self, slide: Slide, level: int) -> LevelArray:
        """The pixels of a level, in the order of the slide's axes; threads slice them at the same time."""

    def close(self, array: Any) -> None:  # noqa: B027 - most formats hold no file open
        """Close the file that `open_level` opened."""

    def describe(self, slide: Slide) -> str:
        """The format of ``slide`` in messages, with its version if that matters."""
        return self.name


def name_in_series(name: str, number: int, count: int) -> tuple[str, str]:
    """(name, path) of image ``number`` of a file with ``count`` images; an only image is the file itself."""
    return (f"{name}/{number}", str(number)) if count > 1 else (name, "")


def optional_library(module: str, package: str) -> Any:
    """Import a library that only one format needs.

    Args:
        module: name of the module.
        package: what pip installs it with, such as ``cellseg-batch[czi]``.

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
