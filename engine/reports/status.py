"""How far a run is, from its journals alone: nothing is asked of the run itself, which may be on any machine.

Progress is counted in finished records, the rate comes from the times at which these came into being, and a run is at
work on an image while its lock is being renewed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cellseg_batch.engine.errors import NoImageError, SlideError
from cellseg_batch.engine.run.failed_images import FailedImages
from cellseg_batch.engine.run.output_paths import output_paths
from cellseg_batch.engine.run.records import BLOCKS, Manifest
from cellseg_batch.engine.slides.discover import JOURNAL_SUFFIX, OUTPUT_SUFFIX, find_images
from cellseg_batch.engine.slides.ome_zarr import is_zarr_node
from cellseg_batch.engine.slides.slide import Slide
from cellseg_batch.engine.storage.journal import Journal
from cellseg_batch.engine.storage.lock import LOCK_SUFFIX, is_held
from cellseg_batch.engine.storage.paths import RemotePath

# The rate is that of the last so many seconds of work.
_WINDOW = 600.0


@dataclass(frozen=True)
class SlideStatus:
    """How far one image is.

    Attributes:
        path: the image.
        journal: folder of its journal; None if it could not even be opened.
        state: done, running, failed, stopped (begun, and nobody works on it) or waiting.
        reason: why it failed.
        blocks, blocks_done: of its first pass; 0 when it waits.
        tasks, tasks_done: of all passes.
        pixels: of all planes, 0 when it waits.
        begun: POSIX time at which it was begun, None when it waits.
    """

    path: str
    journal: Path | None
    state: str
    reason: str = ""
    blocks: int = 0
    blocks_done: int = 0
    tasks: int = 0
    tasks_done: int = 0
    pixels: int = 0
    begun: float | None = None

    @property
    def pixels_left(self) -> float:
        """Pixels of the blocks that are not on disk yet."""
        return self.pixels * (1 - self.blocks_done / self.blocks) if self.blocks else 0.0


@dataclass(frozen=True)
class Status:
    """How far a run is.

    Attributes:
        slides: one entry per image.
        mpx_per_s: rate of the last minutes of work, 0 when there was none.
    """

    slides: list[SlideStatus]
    mpx_per_s: float

    @property
    def counts(self) -> Counter[str]:
        """Number of images in each state."""
        return Counter(slide.state for slide in self.slides)

    @property
    def seconds_left(self) -> float | None:
        """At the present rate, None while nothing runs; images that wait are taken to be as large as the others."""
        begun = [slide for slide in self.slides if slide.pixels]
        if not self.mpx_per_s or not self.counts["running"]:
            return None
        mean = sum(slide.pixels for slide in begun) / len(begun)
        left = sum(slide.pixels_left for slide in begun) + mean * self.counts["waiting"]
        return left / 1e6 / self.mpx_per_s

    def to_json(self) -> dict[str, Any]:
        """The status as plain JSON values."""
        slides = [{**asdict(slide), "journal": slide.journal and str(slide.journal)} for slide in self.slides]
        rates = {"mpx_per_s": self.mpx_per_s, "seconds_left": self.seconds_left}
        return {"counts": dict(self.counts), **rates, "slides": slides}


def read_status(paths: list[Path], name: str, output: Path | None) -> Status:
    """How far the run over ``paths`` is.

    Args:
        paths: the run's inputs, or its output folder.
        name: of the label group.
        output: of the run.

    Raises:
        NoImageError: there is neither an image nor a journal.
    """
    failures = FailedImages(name, output)
    reasons = {root: failures.reasons(root) for path in paths for root in _roots(path.resolve())}
    known = {path: reason for found in reasons.values() for path, reason in found.items()}
    looks = [_look_at(folder, path, known) for folder, path in find_journals(paths, name, output).items()]
    listed = {status.path for status, _ in looks}
    lost = [SlideStatus(path, None, "failed", reason) for path, reason in known.items() if path not in listed]
    return Status([status for status, _ in looks] + lost, _rate(looks))


def find_journals(paths: list[Path], name: str, output: Path | None) -> dict[Path, str]:
    """Journal folder -> image of every usable image below ``paths``, and of every journal there ("" as its image).

    Raises:
        NoImageError: there is neither an image nor a journal.
    """
    found: dict[Path, str] = {}
    for path in paths:
        roots = _roots(path.resolve())
        there = [one.parent for root in roots for one in sorted(root.rglob(f"labels/{name}/manifest.json"))]
        try:
            images = find_images(path)
        except NoImageError:
            if not roots:
                raise
            images = []
        for image in images:
            with suppress(SlideError):
                if isinstance(image, Slide):
                    found[output_paths(image, name, output).journal] = image.location
        found |= {journal: found.get(journal, "") for journal in there}
    return found


def _roots(path: Path) -> list[Path]:
    """Folders of journals and notes of a store, of a file's companion store, or of every store below a folder."""
    names = {path.name + JOURNAL_SUFFIX, path.stem + OUTPUT_SUFFIX + JOURNAL_SUFFIX}
    whole_bucket = isinstance(path, RemotePath) and not path.key
    roots = [] if whole_bucket else [path.with_name(name) for name in sorted(names)]
    if path.is_dir() and not is_zarr_node(path):
        roots += _journals_below(path)
    return [root for root in roots if root.is_dir()]


def _journals_below(folder: Path) -> Iterator[Path]:
    """Folders of journals at any depth; stores are not searched, as they hold pixels by the million."""
    for path in sorted(folder.iterdir()):
        if path.name.endswith(JOURNAL_SUFFIX):
            yield path
        elif path.is_dir() and not is_zarr_node(path):
            yield from _journals_below(path)


def _look_at(folder: Path, path: str, failures: dict[str, str]) -> tuple[SlideStatus, list[float]]:
    """The status of the image whose journal is ``folder``, and when its blocks came to be on disk."""
    journal = Journal(folder)
    manifest = journal.manifest(Manifest)
    path = path or (manifest.location if manifest is not None else str(folder))
    reason = failures.get(path, "")
    if manifest is None:
        return SlideStatus(path, folder, "failed" if reason else "waiting", reason), []
    if journal.is_finished:
        state, reason = "done", ""
    elif is_held(folder.with_name(folder.name + LOCK_SUFFIX)):
        state = "running"
    else:
        state = "failed" if reason else "stopped"
    times = {part: journal.times(part) for part in manifest.passes}
    status = SlideStatus(
        path=path,
        journal=folder,
        state=state,
        reason=reason,
        blocks=manifest.passes[BLOCKS],
        blocks_done=len(times[BLOCKS]),
        tasks=sum(manifest.passes.values()),
        tasks_done=sum(map(len, times.values())),
        pixels=math.prod(
            side
            for axis, side in zip(manifest.decisions.input.axes, manifest.decisions.input.shape, strict=True)
            if axis != "c"
        ),
        begun=journal.begun(),
    )
    return status, times[BLOCKS]


def _rate(looks: list[tuple[SlideStatus, list[float]]]) -> float:
    """Mpx/s of the last `_WINDOW` seconds in which there was work, from when blocks came to be on disk."""
    blocks = sorted((moment, one.pixels / one.blocks) for one, moments in looks for moment in moments)
    if not blocks:
        return 0.0
    end = blocks[-1][0]
    begun = min(one.begun for one, _ in looks if one.begun is not None)
    start = max(end - _WINDOW, begun)
    done = sum(pixels for moment, pixels in blocks if moment > start)
    return done / 1e6 / (end - start) if end > start else 0.0
