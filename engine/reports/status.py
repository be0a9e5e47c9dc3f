"""Read the progress of a run from its journals alone, without asking the run itself, which may be on any machine.

Finished records give the progress and their times the rate; each pass counts for its share of an image, as in the
progress bar of the run. A run is at work on an image while it holds the image's lock.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cellseg_batch.engine.errors import NoImageError, OutputError, SlideError, UsageError
from cellseg_batch.engine.run.failed_images import FailedImages, location
from cellseg_batch.engine.run.output_paths import output_paths
from cellseg_batch.engine.run.places import place_beside, stores_below
from cellseg_batch.engine.run.records import BLOCKS, Manifest, shares_of
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.slides.discover import JOURNAL_SUFFIX, find_images, journals_of
from cellseg_batch.engine.slides.ome_zarr import is_zarr_node
from cellseg_batch.engine.slides.slide import Slide, UnreadableImage
from cellseg_batch.engine.storage.journal import Journal
from cellseg_batch.engine.storage.lock import LOCK_SUFFIX, is_held
from cellseg_batch.engine.storage.paths import RemotePath, is_web

# The rate is the mean over this many last seconds of work.
_WINDOW = 600.0


@dataclass(frozen=True)
class SlideStatus:
    """Progress of one image.

    Attributes:
        path: the image.
        journal: folder of its journal; None if the image could not be opened.
        state: done, running, failed, stopped (started, but no run works on it) or waiting.
        reason: why the image failed, or why its journal cannot be read.
        blocks, blocks_done: number of blocks, and of those whose first pass is done; 0 if the image waits.
        tasks, tasks_done: number of tasks of all passes, and of those that are done.
        pixels: number of pixels, over all planes; 0 if the image waits.
        pixels_done: number of pixels that are done, as each pass counts for a share.
        begun: POSIX time in seconds at which the image was started; None if it waits.
        notes: remarks on the image's metadata and on what is left out; () if the image is not at hand.
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
    pixels_done: float = 0.0
    begun: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Status:
    """Progress of a run.

    Attributes:
        slides: one entry per image.
        mpx_per_s: rate of the last minutes of work in Mpx/s; 0 if there was no work.
    """

    slides: list[SlideStatus]
    mpx_per_s: float

    @property
    def counts(self) -> Counter[str]:
        """Number of images in each state."""
        return Counter(slide.state for slide in self.slides)

    @property
    def seconds_left(self) -> float | None:
        """Seconds left at the present rate; None while nothing runs.

        A waiting image is taken to be as large as the mean of the others.
        """
        started = [slide for slide in self.slides if slide.pixels]
        if not self.mpx_per_s or not self.counts["running"]:
            return None
        mean = sum(slide.pixels for slide in started) / len(started)
        left = sum(slide.pixels - slide.pixels_done for slide in started) + mean * self.counts["waiting"]
        return left / 1e6 / self.mpx_per_s

    def to_json(self) -> dict[str, Any]:
        """The status as plain JSON values."""
        slides = [{**asdict(slide), "journal": slide.journal and str(slide.journal)} for slide in self.slides]
        rates = {"mpx_per_s": self.mpx_per_s, "seconds_left": self.seconds_left}
        return {"counts": dict(self.counts), **rates, "slides": slides}


def read_status(paths: list[Path], name: str, output: Path | None) -> Status:
    """Read the progress of the run over ``paths``.

    Args:
        paths: inputs of the run, or its output folder.
        name: name of the label group.
        output: output folder of the run; None if its labels lie in or beside the inputs.

    Raises:
        NoImageError: there is neither an image nor a journal.
        UsageError: there is no run of that name, as in `demand_run`.
    """
    failures = FailedImages(name, output)
    roots = [root for path in paths for root in _roots(path.resolve(), output)]
    noted = {file: note for root in roots for file, note in failures.noted(root).items()}
    images = find_images_and_journals(paths, name, output)
    for image in images.found:
        note = failures.note_of(image)
        if note is not None:
            noted[failures.file(image)] = replace(note, path=location(image))
    if not noted:
        demand_run(images, name)
    known = {note.path: note.reason for note in noted.values()}
    looks = [
        _look_at(folder, "" if slide is None else slide.location, known) for folder, slide in images.journals.items()
    ]
    listed = {status.path for status, _ in looks}
    unreadable = {image.path: image.reason for image in images.found if isinstance(image, UnreadableImage)}
    lost = [
        SlideStatus(path, None, "failed", reason) for path, reason in (unreadable | known).items() if path not in listed
    ]
    notes = {slide.location: slide.notes for slide in images.journals.values() if slide is not None}
    slides = [replace(status, notes=notes.get(status.path, ())) for status, _ in looks]
    return Status(slides + lost, _rate(looks))


@dataclass(frozen=True)
class ImagesAndJournals:
    """The images below some paths, and their journals.

    Attributes:
        found: every image.
        journals: folder of each journal -> its image; None for a journal whose image is not below the paths.
        names: names of the runs whose journals lie there.
    """

    found: list[Slide | UnreadableImage]
    journals: dict[Path, Slide | None]
    names: frozenset[str]


def find_images_and_journals(paths: list[Path], name: str, output: Path | None) -> ImagesAndJournals:
    """Find every image below ``paths``, the journals of those that are usable, and every other journal there.

    With ``output`` only the journals in it count.

    Raises:
        NoImageError: there is neither an image nor a journal.
    """
    found: list[Slide | UnreadableImage] = []
    journals: dict[Path, Slide | None] = {}
    names: set[str] = set()
    for path in paths:
        roots = _roots(path.resolve(), output)
        begun = [file.parent for root in roots for file in sorted(root.rglob("labels/*/manifest.json"))]
        names |= {folder.name for folder in begun}
        folders = [folder for folder in begun if folder.name == name]
        try:
            images = find_images(path)
        except NoImageError:
            if not roots:
                raise
            images = []
        found += images
        for image in images:
            with suppress(SlideError):
                if isinstance(image, Slide):
                    journals[output_paths(image, name, output).journal] = image
        journals |= {folder: journals.get(folder) for folder in folders}
    return ImagesAndJournals(found, journals, frozenset(names))


def demand_run(images: ImagesAndJournals, name: str) -> None:
    """Refuse a name that no run has, unless it is the default and no run has begun.

    Raises:
        UsageError: no run of that name has begun.
    """
    if any(Journal(folder).is_begun for folder in images.journals):
        return
    beside = (file.parent.name for folder in images.journals for file in folder.parent.glob("*/manifest.json"))
    names = sorted(images.names.union(beside))
    if names or name != Settings.name:
        raise UsageError(
            f"`name={name}`",
            expected=f"the name of a run that has begun ({', '.join(names) or 'there is none'})",
            found="no run of that name",
            remedy="give the name and the folder that the run was given",
        )


def _roots(path: Path, output: Path | None) -> list[Path]:
    """Folders that hold the journals and failure notes of a store, a file's companion store, or a folder of stores.

    With ``output`` only those in it count.
    """
    whole_bucket = isinstance(path, RemotePath) and not path.key
    roots = [] if whole_bucket else [journals_of(path)]
    if not whole_bucket and not is_web(path) and not _is_folder(path):
        with suppress(SlideError):
            roots.append(journals_of(place_beside(path).store))
    if _is_folder(path) and not is_zarr_node(path):
        roots += _journals_below(path, set())
        roots += map(journals_of, stores_below(path))  # some lie inside others
    roots = list(dict.fromkeys(roots))
    return [root for root in roots if _is_folder(root) and (output is None or output.resolve() in root.parents)]


def _journals_below(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Find the folders of journals at any depth, links followed, each folder once.

    Stores are not searched, as they hold very many files of pixels.

    Args:
        folder: a folder, without links.
        seen: the folders that were searched.
    """
    seen.add(folder)
    with suppress(PermissionError):  # the search for images names the folder
        for path in sorted(folder.iterdir()):
            if path.name.endswith(JOURNAL_SUFFIX):
                yield path
            elif _is_folder(path) and not is_zarr_node(path):
                followed = path.resolve()
                if followed not in seen and followed not in path.parents:
                    yield from _journals_below(followed, seen)


def _is_folder(path: Path) -> bool:
    """Whether a path leads to a folder; False if it may not be followed."""
    with suppress(PermissionError):
        return path.is_dir()
    return False


def _look_at(folder: Path, path: str, failures: dict[str, str]) -> tuple[SlideStatus, list[tuple[float, float]]]:
    """Status of the image with the journal ``folder``, and (POSIX time in seconds, pixels) of each finished task.

    Args:
        folder: folder of the journal.
        path: location of the image; "" takes it from the manifest.
        failures: location -> reason of each failed image.
    """
    journal = Journal(folder)
    try:
        manifest = journal.manifest(Manifest)
    except OutputError as error:  # it must not hide the other images
        return SlideStatus(path or str(folder), folder, "failed", str(error)), []
    path = path or (manifest.location if manifest is not None else str(folder))
    reason = failures.get(path, "")
    if manifest is None:
        return SlideStatus(path, folder, "failed" if reason else "waiting", reason), []
    if journal.is_finished:
        state = "failed" if reason else "done"  # as the latest run says, such as of changed pixels
    elif is_held(folder.with_name(folder.name + LOCK_SUFFIX)):
        state = "running"
    else:
        state = "failed" if reason else "stopped"
    times = {part: journal.times(part) for part in manifest.passes}
    pixels = manifest.decisions.input.planes * math.prod(manifest.decisions.input.plane_shape)
    worth = {part: pixels * share / manifest.passes[part] for part, share in shares_of(manifest.passes).items()}
    steps = [(moment, worth[part]) for part, moments in times.items() for moment in moments]
    status = SlideStatus(
        path=path,
        journal=folder,
        state=state,
        reason=reason,
        blocks=manifest.passes[BLOCKS],
        blocks_done=len(times[BLOCKS]),
        tasks=sum(manifest.passes.values()),
        tasks_done=sum(map(len, times.values())),
        pixels=pixels,
        pixels_done=sum(done for _, done in steps),
        begun=journal.begun(),
    )
    return status, steps


def _rate(looks: list[tuple[SlideStatus, list[tuple[float, float]]]]) -> float:
    """Rate in Mpx/s over the last `_WINDOW` seconds of work, from the times at which tasks were finished."""
    steps = [step for _, of_slide in looks for step in of_slide]
    if not steps:
        return 0.0
    end = max(moment for moment, _ in steps)
    run_start = min(slide.begun for slide, _ in looks if slide.begun is not None)
    start = max(end - _WINDOW, run_start)
    done = sum(pixels for moment, pixels in steps if moment > start)
    return done / 1e6 / (end - start) if end > start else 0.0
