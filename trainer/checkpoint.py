"""Everything that a training run needs to go on after a kill, in one file that is replaced in one step."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

CHECKPOINT_FILE = "checkpoint.pt"

# Fields of a recipe that may change when a run goes on: how long it is, when it is scored and its learning rate falls.
RESCHEDULED = frozenset({"epochs", "epoch_steps", "schedule", "hold", "patience"})


@dataclass
class Checkpoint:
    """The state of a run after ``step`` steps.

    Attributes:
        recipe: the recipe's fields.
        splits: train, val -> names of the images, in order.
        steps: length of the whole run.
        classes: names of the classes that the network tells apart.
        step: steps done.
        network, averaged, optimiser, scaler: state dictionaries.
        history: one row of figures for each score so far.
        best: the best score so far.
        stale: scores since then.
    """

    recipe: dict[str, Any]
    splits: dict[str, list[str]]
    steps: int
    classes: list[str] = field(default_factory=list)
    step: int = 0
    network: dict[str, Any] = field(default_factory=dict)
    averaged: dict[str, Any] = field(default_factory=dict)
    optimiser: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    best: float = float("-inf")
    stale: int = 0


def save_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the checkpoint; a kill at any moment leaves the old one or the new one, whole."""
    partial = folder / f"{CHECKPOINT_FILE}.partial"
    with open(partial, "wb") as stream:
        torch.save(vars(checkpoint), stream)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(folder / CHECKPOINT_FILE)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read the checkpoint of ``folder``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    path = folder / CHECKPOINT_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {CHECKPOINT_FILE} to go on from")
    try:
        return Checkpoint(**torch.load(path, map_location="cpu", weights_only=True))
    except (RuntimeError, TypeError, EOFError, UnpicklingError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__})") from error


def check_same(checkpoint: Checkpoint, planned: Checkpoint) -> None:
    """Refuse to go on with another recipe or set of images; length and schedule may change.

    Raises:
        ValueError: naming what differs.
    """
    changed = [
        f"`{name}` was {checkpoint.recipe.get(name)!r}, is {value!r}"
        for name, value in planned.recipe.items()
        if name not in RESCHEDULED and checkpoint.recipe.get(name) != value
    ]
    changed += [
        f"images of {split} differ" for split, names in planned.splits.items() if checkpoint.splits.get(split) != names
    ]
    if checkpoint.classes != planned.classes:
        changed.append(f"classes were {', '.join(checkpoint.classes)}, are {', '.join(planned.classes)}")
    if changed:
        raise ValueError(f"`resume` with another recipe or other images: {'; '.join(changed)}")
