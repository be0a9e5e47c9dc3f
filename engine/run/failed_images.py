"""Which images have failed, one small file each beside their store, so that ``retry_failed`` can take up just those.

    <store>.cellseg/failed/<label name>/<hash>.json     {"path": ..., "reason": ...}

Also for what could not even be opened, and so has no journal.
"""

from __future__ import annotations

import hashlib
import logging
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
    """Why an image failed.

    Attributes:
        path: of the image, as a user would type it.
        reason: in one line.
    """

    path: str
    reason: str


class FailedImages:
    """The notes on the failed images of one label name.

    Args:
        name: of the label group.
        output: folder that mirrors the inputs; None has the notes beside the inputs.
    """

    def __init__(self, name: str, output: Path | None) -> None:
        self._name = name
        self._output = output

    def has(self, image: Slide | UnreadableImage) -> bool:
        """Whether the image has failed, and not been done since."""
        return self._file(image).is_file()

    def reason(self, image: Slide | UnreadableImage) -> str | None:
        """Why the image has failed; None if it has not, or has been done since."""
        note = read_record(self._file(image), FailureNote)
        return None if note is None else note.reason

    def note(self, image: Slide | UnreadableImage, reason: str) -> None:
        """Note a failure; where that cannot be written, the report alone has it."""
        try:
            write_record(self._file(image), FailureNote(location(image), reason))
        except OutputError:
            _log.warning("%s: the failure could not be noted", location(image))

    def forget(self, image: Slide | UnreadableImage) -> None:
        """The image is done."""
        file = self._file(image)
        with suppress(OSError):
            file.unlink(missing_ok=True)
            for folder in list(file.parents)[:3]:
                folder.rmdir()  # as long as they are empty

    def reasons(self, folder: Path) -> dict[str, str]:
        """Path -> reason of every failed image noted in the ``<store>.cellseg`` folder."""
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
        digest = hashlib.sha256(image.name.encode() if self._output else location(image).encode()).hexdigest()[:16]
        return store.with_name(store.name + JOURNAL_SUFFIX) / "failed" / self._name / f"{digest}.json"


def location(image: Slide | UnreadableImage) -> str:
    """Path of the image as a user would type it."""
    return image.path if isinstance(image, UnreadableImage) else image.location
