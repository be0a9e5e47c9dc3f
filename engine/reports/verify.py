"""Check every pixel of an output against the checksums in its journal, and name the damaged blocks.

Journals and outputs are read.  Segmented images that are there are compared with their state when they were segmented.
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

from cellseg_batch.engine.errors import ReadError, SlideError, UsageError
from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.reports.status import demand_run, find_images_and_journals
from cellseg_batch.engine.run.completeness import differences
from cellseg_batch.engine.run.input_state import has_changed
from cellseg_batch.engine.run.records import FinishedRecord, Manifest, TaskRecord, record_of
from cellseg_batch.engine.scheduling.scheduler import TaskGroup, ThreadPool, Workflow, ask, run_workflows
from cellseg_batch.engine.slides.slide import Slide, unravel_plane
from cellseg_batch.engine.storage.journal import Journal
from cellseg_batch.engine.storage.paths import zarr_store


@dataclass(frozen=True)
class Damage:
    """A block, or a shard of a pyramid, whose pixels differ from those that were written.

    Attributes:
        journal: folder of the journal with its record.
        part, number: part of the journal and number of the record in it.
        reason: where the block or shard lies, and how it differs.
    """

    journal: str
    part: str
    number: int
    reason: str


@dataclass
class Verdict:
    """Result of a verification.

    Attributes:
        checked: number of records whose pixels were read back.
        unfinished: folders of the journals without their closing record.
        damages: the damaged blocks and shards.
        unreadable: the journals that cannot be read, and so are not checked, each with its reason.
        changed: images whose pixels have changed since they were segmented.
    """

    checked: int = 0
    unfinished: list[str] = field(default_factory=list)
    damages: list[Damage] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """Whether all that was recorded as written could be read back, and belongs to the images' present pixels."""
        return not (self.damages or self.unreadable or self.changed)

    def to_json(self) -> dict[str, Any]:
        """The verdict as plain JSON values."""
        damaged = self.damages or self.unreadable
        status = "damaged" if damaged else "changed" if self.changed else "whole"
        return {"status": status, **asdict(self)}


def verify(paths: list[Path], name: str, output: Path | None, workers: int, forget: bool = False) -> Verdict:
    """Read back everything that the journals of a run list as written.

    Args:
        paths: inputs of the run, or its output folder.
        name: name of the label group.
        output: output folder of the run; None if its labels lie in or beside the inputs.
        workers: number of blocks to read at a time.
        forget: drop the records of damaged blocks, so that the next run computes them again. Repairing finished
            instance labels means recomputing all blocks, because scratch is deleted.

    Raises:
        NoImageError: there is neither an image nor a journal.
        UsageError: there is no run of that name.
    """
    images = find_images_and_journals(paths, name, output)
    demand_run(images, name)
    started = {Journal(folder): slide for folder, slide in images.journals.items() if Journal(folder).is_begun}
    if not started:
        raise UsageError(
            f"`name={name}`",
            expected="a run that has begun",
            found=f"none over {', '.join(map(str, paths))}",
            remedy="run first, or give the `output` and `name` that the run was given",
        )
    verdict = Verdict(unfinished=[str(journal.folder) for journal in started if not journal.is_finished])
    workflows = (_workflow(journal, slide, verdict, forget) for journal, slide in started.items())
    for _ in run_workflows(workflows, ThreadPool(workers)):
        pass
    return verdict


def _workflow(journal: Journal, slide: Slide | None, verdict: Verdict, forget: bool) -> Workflow[None]:
    """Read back what a journal lists, look whether its image has changed, and note a journal that cannot be read."""
    try:
        yield from _read_back(journal, verdict, forget)
        manifest = journal.manifest(Manifest)
        if manifest and slide and (yield from ask(partial(has_changed, journal=journal, manifest=manifest), slide)):
            verdict.changed.append(slide.location)
    except SlideError as error:  # the other journals are checked all the same
        verdict.unreadable.append(str(error))


def _read_back(journal: Journal, verdict: Verdict, forget: bool) -> Workflow[None]:
    """Check every record of a journal; if the journal is finished, also check that no record is missing.

    Raises:
        OutputError: the journal cannot be read.
    """
    manifest = journal.manifest(Manifest)
    assert manifest is not None  # the journal is started
    outputs = _Outputs({path: (journal.folder / relative).resolve() for path, relative in manifest.images.items()})

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
        yield TaskGroup(partial(check, part), journal.records(part, record_of(part)), collect)
        note(Damage(str(journal.folder), part, number, "its record is missing") for number in lost)
    journal.finished(FinishedRecord)  # raises if it cannot be read


class _Outputs:
    """The output images of a journal; each level is opened once."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self._folders = folders
        self._level = cache(self._open)

    def read(self, path: str, level: int, plane: int, box: Box) -> NDArray[Any]:
        """Read the pixels (h, w) of a box from disk.

        Raises:
            ReadError: the pixels cannot be read.
        """
        try:
            array = self._level(path, level)
            index: tuple[Any, ...] = (*unravel_plane(plane, array.shape[:-2]), *box.slices())
            return np.asarray(array[index])
        except Exception as error:  # libraries raise errors of many types for damaged files
            raise ReadError(
                path,
                expected="readable pixels",
                found=f"{type(error).__name__}: {error}".splitlines()[0],
                remedy="have them made again: verify with `forget`, and run once more",
            ) from error

    def _open(self, path: str, level: int) -> zarr.Array[Any]:
        return zarr.open_array(zarr_store(self._folders[path] / str(level)), mode="r")
