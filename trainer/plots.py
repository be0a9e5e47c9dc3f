"""What a training run leaves to look at: the log, its curves, and predictions beside the truth."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.trainer.card import ModelClass
from cellseg_batch.trainer.data.sample import Sample
from cellseg_batch.trainer.outlines import outlined, tinted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Names of classes beside the pictures.
_MOST_KEYS = 24
_WRONG, _MISSED = (230, 60, 50), (60, 110, 240)


def write_log(history: Sequence[dict[str, Any]], path: Path) -> None:
    """One line of CSV for each epoch."""
    with open(path, "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(history[0]))
        writer.writeheader()
        writer.writerows(history)


def plot_curves(history: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss and scores over the steps, as PNG."""
    figure = _figure(9, 3.6)
    left, right = figure.subplots(1, 2)
    steps = [row["step"] for row in history]
    for axes, names in ((left, ("loss", "val_loss")), (right, ("val_dice", "val_iou", "val_competition"))):
        for name in names:
            values = [row[name] for row in history]
            if not np.isnan(values).all():
                axes.plot(steps, values, marker=".", label=name.replace("_", " "))
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=100)


def plot_predictions(
    samples: Sequence[Sample],
    predict: Callable[[Sample], NDArray[np.integer]],
    path: Path,
    classes: Sequence[ModelClass] = (),
    rows: int = 8,
) -> None:
    """A page of PNG: input, truth, prediction and error of images of each kind.

    In the last column white is right, red predicted but not true, blue true but missed.

    Args:
        samples: annotated images, of which some are shown.
        predict: returns a sample's instances (H, W), or the classes of its pixels.
        path: the file.
        classes: the classes that ``predict`` returns; () for instances.
        rows: the most images shown.
    """
    from matplotlib.patches import Patch

    colours = {number: one.colour for number, one in enumerate(classes, start=1)}
    chosen = _one_of_each_kind(samples, rows)
    figure = _figure(11, 2.9 * len(chosen))
    for line, sample in zip(figure.subplots(len(chosen), 4, squeeze=False), chosen, strict=True):
        picture, found = _bytes(sample.pixels), predict(sample)
        if classes and sample.classes is not None:
            drawn = [tinted(picture, numbers, colours) for numbers in (sample.classes, found)]
            errors = error_map(found, sample.classes)
        else:
            drawn = [outlined(picture, labels) for labels in (sample.labels, found)]
            errors = error_map(found > 0, sample.labels > 0)
        pictures = (picture, *drawn, errors)
        for axes, picture, title in zip(line, pictures, ("input", "truth", "prediction", "error"), strict=True):
            axes.imshow(picture)
            axes.set_title(f"{title}: {sample.kind}" if title == "input" and sample.kind else title, fontsize=9)
            axes.axis("off")
    if classes:
        keys = [Patch(color=one.colour, label=one.name) for one in classes[:_MOST_KEYS]]
        figure.legend(handles=keys, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=80)


def error_map(predicted: NDArray[np.generic], truth: NDArray[np.generic]) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 of masks or classes: right white, right background black, wrong red, missed blue."""
    picture = np.zeros((*truth.shape, 3), np.uint8)
    found, same = predicted != 0, predicted == truth
    picture[found & same] = 255
    picture[found & ~same] = _WRONG
    picture[~found & ~same] = _MISSED
    return picture


def _one_of_each_kind(samples: Sequence[Sample], count: int) -> list[Sample]:
    """First one image of each kind, then a second one, and so on, at most ``count``; deterministic."""
    seen: dict[str, int] = {}
    ranked = []
    for sample in samples:
        seen[sample.kind] = seen.get(sample.kind, 0) + 1
        ranked.append((seen[sample.kind], sample.kind, sample))
    return [sample for *_, sample in sorted(ranked, key=lambda one: one[:2])[:count]]


def _bytes(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.round(255 * pixels).astype(np.uint8)


def _figure(width: float, height: float) -> Figure:
    """A figure of its own, without pyplot's global state and display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
