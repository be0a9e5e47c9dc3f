"""Note failed images in small files beside their stores, so that ``retry_failed`` can process just those.

    <store>.cellseg/failed/<label name>/<hash>.json     {"path": ..., "reason": ...}

Images that could not even be opened, and so have no journal, have a note too.
"""

from __future__ import annotations

import hashlib
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cellseg_batch.engine.errors import OutputError
from cellseg_batch.engine.slides.discover import JOURNAL_SUFFIX
from cellseg_batch.engine.slides.ome_zarr import is_zarr_node, zarr_root
from cellseg_batch.engine.slides.slide import Slide, UnreadableImage
from cellseg_batch.engine.storage.paths import locate
from cellseg_batch.engine.storage.records import read_record, write_record

_log = logging.getLogger(__name__)


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
        return self._file(image).is_file()

    def reason(self, image: Slide | UnreadableImage) -> str | None:
        """Reason why the image has failed; None if it has not failed, or has been finished since."""
        note = read_record(self._file(image), FailureNote)
        return None if note is None else note.reason

    def note(self, image: Slide | UnreadableImage, reason: str) -> None:
        """Note a failure; if the note cannot be written, only the report has the failure."""
        try:
            write_record(self._file(image), FailureNote(location(image), reason))
        except OutputError:
            _log.warning("%s: the failure could not be noted", location(image))

    def forget(self, image: Slide | UnreadableImage) -> None:
        """Remove the note on an image, because it is finished."""
        file = self._file(image)
        with suppress(OSError):
            file.unlink(missing_ok=True)
            for folder in list(file.parents)[:3]:
                folder.rmdir()  # raises OSError at the first folder that is not empty

    def reasons(self, folder: Path) -> dict[str, str]:
        """Path -> reason of every failed image that is noted in ``folder``, a ``<store>.cellseg``."""
        files = sorted((folder / "failed" / self._name).glob("*.json"))
        notes = (read_record(file, FailureNote) for file in files)
        return {note.path: note.reason for note in notes if note is not None}

    def _file(self, image: Slide | UnreadableImage) -> Path:
        if self._output is not None:
            store = self._output.resolve() / image.name.partition("/")[0]
        elif isinstance(image, Slide):
            store = image.store
        else:
            path = locate(image.path)
            store = zarr_root(path)[0] if is_zarr_node(path) else path
        digest = hashlib.sha256(os.fsencode(image.name if self._output else location(image))).hexdigest()[:16]
        return store.with_name(store.name + JOURNAL_SUFFIX) / "failed" / self._name / f"{digest}.json"


def location(image: Slide | UnreadableImage) -> str:
    """Path of the image as a user would type it."""
    return image.path if isinstance(image, UnreadableImage) else image.location
