"""Every pixel of an output against the checksums in its journal: what is damaged on disk is found and named.

It reads journals and outputs alone; the images that were segmented are not needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from cellseg_batch.engine.errors import ReadError
from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.reports.status import find_journals
from cellseg_batch.engine.run.completeness import differences
from cellseg_batch.engine.run.records import Manifest, TaskRecord
from cellseg_batch.engine.scheduling.scheduler import TaskGroup, ThreadPool, Workflow, run_workflows
from cellseg_batch.engine.slides.slide import unravel_plane
from cellseg_batch.engine.storage.journal import Journal
from cellseg_batch.engine.storage.paths import zarr_store


@dataclass(frozen=True)
class Damage:
    """One block, or shard of a pyramid, that is not what was written.

    Attributes:
        journal: whose record says what should be there.
        part, number: of the record.
        reason: where it lies, and how it differs.
    """

    journal: str
    part: str
    number: int
    reason: str


@dataclass
class Verdict:
    """What was found.

    Attributes:
        checked: records whose pixels were read back.
        unfinished: journals without their closing record.
        damages: what is not as it was written.
    """

    checked: int = 0
    unfinished: list[str] = field(default_factory=list)
    damages: list[Damage] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The verdict as plain JSON values."""
        return {"status": "damaged" if self.damages else "whole", **asdict(self)}


def verify(paths: list[Path], name: str, output: Path | None, workers: int, forget: bool = False) -> Verdict:
    """Read back all that the journals of a run say was written.

    Args:
        paths: the run's inputs, or its output folder.
        name: of the label group.
        output: of the run.
        workers: blocks that are read at a time.
        forget: drop the records of what is damaged, so that the next run makes it again; of finished
            instances, whose scratch is gone, it then makes all blocks again.

    Raises:
        NoImageError: there is neither an image nor a journal.
    """
    journals = [Journal(folder) for folder in find_journals(paths, name, output)]
    begun = [journal for journal in journals if journal.is_begun]
    verdict = Verdict(unfinished=[str(journal.folder) for journal in begun if not journal.is_finished])
    for _ in run_workflows((_workflow(journal, verdict, forget) for journal in begun), ThreadPool(workers)):
        pass
    return verdict


def _workflow(journal: Journal, verdict: Verdict, forget: bool) -> Workflow[None]:
    """Check every record of a journal; of a finished one, also that none is missing."""
    manifest = journal.manifest(Manifest)
    assert manifest is not None  # it is begun
    outputs = _Outputs({path: journal.folder / beside for path, beside in manifest.images.items()})

    def check(part: str, item: tuple[int, TaskRecord[Any]]) -> list[Damage]:
        number, record = item
        return [Damage(str(journal.folder), part, number, line) for line in differences(outputs.read, record)]

    def note(damages: Iterable[Damage]) -> None:
        for damage in damages:
            verdict.damages.append(damage)
            if forget:
                journal.forget(damage.part, damage.number)

    def collect(damages: list[Damage]) -> None:
        verdict.checked += 1
        note(damages)

    for part, count in manifest.passes.items():
        lost = list(journal.missing(part, count)) if journal.is_finished else []
        yield TaskGroup(partial(check, part), journal.records(part, TaskRecord[Any]), collect)
        note(Damage(str(journal.folder), part, number, "its record is missing") for number in lost)


class _Outputs:
    """The images that a journal is about; each level is opened once."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self._folders = folders
        self._level = cache(self._open)

    def read(self, path: str, level: int, plane: int, box: Box) -> NDArray[Any]:
        """Pixels (h, w) as they are on disk.

        Raises:
            ReadError: they cannot be read.
        """
        try:
            array = self._level(path, level)
            index: tuple[Any, ...] = (*unravel_plane(plane, array.shape[:-2]), *box.slices())
            return np.asarray(array[index])
        except Exception as error:  # a damaged file can fail in any way that its library knows
            raise ReadError(
                str(self._folders[path]),
                expected="readable pixels",
                found=f"{type(error).__name__}: {error}".splitlines()[0],
                remedy="have them made again: verify with `forget`, and run once more",
            ) from error

    def _open(self, path: str, level: int) -> zarr.Array[Any]:
        return zarr.open_array(zarr_store(self._folders[path] / str(level)), mode="r")
