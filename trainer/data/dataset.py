"""A data set in any of the layouts, split for good: what training and evaluation ask for."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from cellseg_batch.trainer.card import ModelClass, Normalisation
from cellseg_batch.trainer.data.classes import CLASSES_FILE, CLASSES_FOLDER, read_classes
from cellseg_batch.trainer.data.dsb2018 import list_dsb2018
from cellseg_batch.trainer.data.folder import ANNOTATIONS, list_folder
from cellseg_batch.trainer.data.ground import GROUND_FILE, list_ground
from cellseg_batch.trainer.data.livecell import list_coco
from cellseg_batch.trainer.data.sample import Entry, Problem, Sample, make_sample

_VAL_SHARE = 0.15


@dataclass(frozen=True)
class Dataset:
    """Samples by split, and the images that could not be used.

    Attributes:
        splits: train, val, test -> samples, in a fixed order.
        problems: what was skipped, by file and reason.
        classes: the classes that class maps tell apart, in the order of their numbers; () without such maps.
    """

    splits: dict[str, list[Sample]]
    problems: list[Problem]
    classes: tuple[ModelClass, ...] = ()

    @property
    def names(self) -> dict[str, list[str]]:
        """Split -> names of its images, in order."""
        return {split: [sample.name for sample in samples] for split, samples in self.splits.items()}


def list_entries(folder: Path) -> list[Entry]:
    """The annotated images of ``folder``: a folder pair, COCO polygons, Data Science Bowl folders, or ground.

    A folder of several folder pairs, with ground or without, is all of them together; their images' names then begin
    with their folder's.

    Raises:
        FileNotFoundError: it is none of these, or there is no such folder.
        ValueError: an annotation file is damaged.
    """
    if (folder / GROUND_FILE).is_file():
        return list_ground(folder)
    if (folder / "images").is_dir():
        pair = any((folder / name).is_dir() for name in ANNOTATIONS)
        return list_folder(folder) if pair else list_coco(folder)
    if not folder.is_dir():
        entries = []
    elif parts := _parts_of(folder):
        entries = [_within(part, entry) for part in parts for entry in list_entries(part)]
    else:
        entries = list_dsb2018(folder)
    if not entries:
        raise FileNotFoundError(
            f"{folder}: expected images/ with labels/, masks/, {CLASSES_FOLDER}/ or a COCO file, <id>/images with "
            f"<id>/masks, or folders with images/ and labels/ or {CLASSES_FOLDER}/"
        )
    return entries


def _parts_of(folder: Path) -> list[Path]:
    """The folder pairs and the ground in a folder of several; [] if it is none."""
    several = any(
        (path / "images").is_dir() and any((path / name).is_dir() for name in ("labels", CLASSES_FOLDER))
        for path in folder.iterdir()
    )
    parts = sorted(path for path in folder.iterdir() if (path / "images").is_dir() or (path / GROUND_FILE).is_file())
    return parts if several else []


def _classes_of(folder: Path) -> tuple[ModelClass, ...]:
    """The classes of a data set, as its ``classes.csv`` or those of its parts say.

    Raises:
        ValueError: parts differ, or a file is none.
    """
    named = {part: read_classes(part) for part in (folder, *_parts_of(folder))}
    named = {part: classes for part, classes in named.items() if classes}
    if len(set(named.values())) > 1:
        files = ", ".join(str(part / CLASSES_FILE) for part in named)
        raise ValueError(f"{files}: expected the same classes in all of them")
    return next(iter(named.values()), ())


def _within(part: Path, entry: Entry) -> Entry:
    return replace(entry, name=f"{part.name}/{entry.name}", kind=entry.kind or part.name)


def load_dataset(
    folder: Path, rule: Normalisation, only: tuple[str, ...] = ("train", "val"), needs_classes: bool = False
) -> Dataset:
    """Read the splits ``only`` of a data set; bad annotations are reported and skipped.

    Images without a split go to train or val by a hash of their name, the same on every machine.

    Args:
        folder: the data set.
        rule: how pixels become the network's input.
        only: names of the splits.
        needs_classes: whether images without a class map are of no use.

    Raises:
        FileNotFoundError, ValueError: as `list_entries`, no image of these splits can be used, or nothing names the
            classes.
    """
    entries = list_entries(folder)
    classes = _classes_of(folder)
    if needs_classes and not classes:
        raise ValueError(f"{folder}: expected class maps in {CLASSES_FOLDER}/, and {CLASSES_FILE} with their names")
    splits: dict[str, list[Sample]] = {split: [] for split in only}
    problems: list[Problem] = []
    for entry in entries:
        split = entry.split or _hashed_split(entry.name)
        if split in splits:
            try:
                sample = make_sample(entry, rule, len(classes))
                if needs_classes and sample.classes is None:
                    raise ValueError(f"no class map in {CLASSES_FOLDER}/")
                splits[split].append(sample)
            except Exception as error:  # a file can be damaged in any way that its library knows
                problems.append(Problem(entry.name, str(error) or type(error).__name__))
    empty = [split for split, samples in splits.items() if not samples]
    if empty:
        raise ValueError(f"{folder}: no usable image in {' or '.join(empty)} {_why_empty(entries, problems)}")
    return Dataset(splits, problems, classes)


def _why_empty(entries: list[Entry], problems: list[Problem]) -> str:
    listed = f"among {len(entries)}"
    if problems:
        return f"{listed}; {len(problems)} could not be used, the first, {problems[0].file}, as {problems[0].reason}"
    return f"{listed}; add images, or say each one's split in a column of index.csv"


def _hashed_split(name: str) -> str:
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) / 2**32
    return "val" if share < _VAL_SHARE else "train"
