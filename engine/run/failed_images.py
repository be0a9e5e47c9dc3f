"""Note failed images in small files beside their stores, so that ``retry_failed`` can process just those.

    <store>.cellseg/failed/<label name>/<hash>.json     {"path": ..., "reason": ...}
    OUT/.cellseg/failed/<label name>/<hash>.json        with the setting ``output``

Images that could not even be opened, and so have no journal, have a note too.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cellseg_batch.engine.errors import OutputError, brief
from cellseg_batch.engine.run.places import seen_from
from cellseg_batch.engine.slides.discover import JOURNAL_SUFFIX, journals_of
from cellseg_batch.engine.slides.ome_zarr import is_zarr_node, zarr_root
from cellseg_batch.engine.slides.slide import Slide, UnreadableImage, real_path
from cellseg_batch.engine.storage.paths import RemotePath, locate
from cellseg_batch.engine.storage.records import read_record, write_record


@dataclass(frozen=True)
class FailureNote:
    """A note that an image failed.

    Attributes:
        path: path of the image, as a user would type it.
        reason: the reason, in one line.
    """

    path: str
    reason: str


class FailedImages:
    """The notes on the failed images of one label name.

    Args:
        name: name of the label group.
        output: folder that mirrors the inputs; None puts the notes beside the inputs.
    """

    def __init__(self, name: str, output: Path | None) -> None:
        self._name = name
        self._output = output

    def has(self, image: Slide | UnreadableImage) -> bool:
        """Whether the image has failed and has not been finished since."""
        return self.file(image).is_file()

    def note_of(self, image: Slide | UnreadableImage) -> FailureNote | None:
        """The note on the image; None if it has not failed, or has been finished since."""
        return _read(self.file(image))

    def note(self, image: Slide | UnreadableImage, reason: str) -> bool:
        """Note a failure; False if the note cannot be written."""
        try:
            write_record(self.file(image), FailureNote(location(image), reason))
        except OutputError:
            return False
        return True

    def forget(self, image: Slide | UnreadableImage) -> None:
        """Remove the note on an image, because it is finished."""
        file = self.file(image)
        with suppress(OSError):
            file.unlink()
            for folder in list(file.parents)[:3]:
                folder.rmdir()  # raises OSError at the first folder that is not empty

    def noted(self, folder: Path) -> dict[Path, FailureNote]:
        """File -> note of every failed image that is noted in ``folder``, a ``<store>.cellseg``.

        A folder that may not be looked into has a note with the reason.
        """
        try:
            files = sorted((folder / "failed" / self._name).glob("*.json"))
        except PermissionError as error:
            return {folder: FailureNote(str(folder), brief(error))}
        return {file: note for file in files if (note := _read(file)) is not None}

    def file(self, image: Slide | UnreadableImage) -> Path:
        """File of the note on an image, whichever name leads to it."""
        if self._output is not None:
            home = self._output.resolve()
            notes = home / JOURNAL_SUFFIX
        else:
            path = locate(image.identity)
            store = locate(real_path(str(image.store))) if isinstance(image, Slide) else path
            if isinstance(image, UnreadableImage) and is_zarr_node(path):
                store = zarr_root(path)[0]
            elif isinstance(image, UnreadableImage) and not isinstance(path, RemotePath):
                # An image inside a file, such as a series, is named as if the file were a folder.
                store = next((place for place in path.parents if place.is_file()), path)
            home, notes = store.parent, journals_of(store)
        digest = hashlib.sha256(os.fsencode(seen_from(home, image.identity))).hexdigest()[:16]
        return notes / "failed" / self._name / f"{digest}.json"


def _read(file: Path) -> FailureNote | None:
    """The note in a file, if there is one; one that cannot be read stands for its image, with the reason why."""
    try:
        return read_record(file, FailureNote)
    except OutputError as error:
        return FailureNote(str(file), str(error))


def location(image: Slide | UnreadableImage) -> str:
    """Path of the image as a user would type it."""
    return image.path if isinstance(image, UnreadableImage) else image.location
