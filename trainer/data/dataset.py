"""A data set in any of the layouts, split for good: what training and evaluation ask for."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from cellseg_batch.trainer.card import Normalisation
from cellseg_batch.trainer.data.dsb2018 import list_dsb2018
from cellseg_batch.trainer.data.folder import list_folder
from cellseg_batch.trainer.data.livecell import list_coco
from cellseg_batch.trainer.data.sample import Entry, Problem, Sample, make_sample

_VAL_SHARE = 0.15


@dataclass(frozen=True)
class Dataset:
    """Samples by split, and the images that could not be used.

    Attributes:
        splits: train, val, test -> samples, in a fixed order.
        problems: what was skipped, by file and reason.
    """

    splits: dict[str, list[Sample]]
    problems: list[Problem]

    @property
    def names(self) -> dict[str, list[str]]:
        """Split -> names of its images, in order."""
        return {split: [sample.name for sample in samples] for split, samples in self.splits.items()}


def list_entries(folder: Path) -> list[Entry]:
    """The annotated images of ``folder``: a folder pair, COCO polygons or Data Science Bowl folders.

    A folder of several folder pairs is all of them together; their images' names then begin with their folder's.

    Raises:
        FileNotFoundError: it is none of these, or there is no such folder.
        ValueError: an annotation file is damaged.
    """
    if (folder / "images").is_dir():
        pair = (folder / "labels").is_dir() or (folder / "masks").is_dir()
        return list_folder(folder) if pair else list_coco(folder)
    if not folder.is_dir():
        entries = []
    elif any((path / "images").is_dir() and (path / "labels").is_dir() for path in folder.iterdir()):
        parts = sorted(path for path in folder.iterdir() if (path / "images").is_dir())
        entries = [_within(part, entry) for part in parts for entry in list_entries(part)]
    else:
        entries = list_dsb2018(folder)
    if not entries:
        raise FileNotFoundError(
            f"{folder}: expected images/ with labels/, masks/ or a COCO file, <id>/images with <id>/masks, "
            "or folders with images/ and labels/"
        )
    return entries


def _within(part: Path, entry: Entry) -> Entry:
    return replace(entry, name=f"{part.name}/{entry.name}", kind=entry.kind or part.name)


def load_dataset(folder: Path, rule: Normalisation, only: tuple[str, ...] = ("train", "val")) -> Dataset:
    """Read the splits ``only`` of a data set; bad annotations are reported and skipped.

    Images without a split go to train or val by a hash of their name, the same on every machine.

    Raises:
        FileNotFoundError, ValueError: as `list_entries`, or no image of these splits can be used.
    """
    splits: dict[str, list[Sample]] = {split: [] for split in only}
    problems: list[Problem] = []
    for entry in list_entries(folder):
        split = entry.split or _hashed_split(entry.name)
        if split in splits:
            try:
                splits[split].append(make_sample(entry, rule))
            except Exception as error:  # a file can be damaged in any way that its library knows
                problems.append(Problem(entry.name, str(error) or type(error).__name__))
    empty = [split for split, samples in splits.items() if not samples]
    if empty:
        raise ValueError(f"{folder}: no usable image in {', '.join(empty)}; {len(problems)} could not be used")
    return Dataset(splits, problems)


def _hashed_split(name: str) -> str:
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) / 2**32
    return "val" if share < _VAL_SHARE else "train"
