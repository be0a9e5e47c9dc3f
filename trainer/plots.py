"""What a training run leaves to look at: the log, its curves, and predictions beside the truth."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.trainer.bundle import Bundle
from cellseg_batch.trainer.data.sample import Sample
from cellseg_batch.trainer.decode import decode_instances
from cellseg_batch.trainer.outlines import outlined
from cellseg_batch.trainer.predict import predict_logits
from cellseg_batch.trainer.unet import load_network

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


def plot_predictions(bundle: Bundle, samples: Sequence[Sample], path: Path, rows: int = 8) -> None:
    """A page of PNG: input, truth, prediction and error of images of each kind.

    In the last column white is right, red predicted but not true, blue true but missed.
    """
    network, card = load_network(bundle), bundle.card
    chosen = _one_of_each_kind(samples, rows)
    figure = _figure(11, 2.9 * len(chosen))
    for line, sample in zip(figure.subplots(len(chosen), 4, squeeze=False), chosen, strict=True):
        logits = predict_logits(network, sample.pixels, card.total_stride, "fp32").numpy()
        decoded = decode_instances(logits, card.decoder, card.threshold, card.rule)
        pictures = (
            _bytes(sample.pixels),
            outlined(_bytes(sample.pixels), sample.labels),
            outlined(_bytes(sample.pixels), decoded),
            error_map(decoded > 0, sample.labels > 0),
        )
        for axes, picture, title in zip(line, pictures, ("input", "truth", "prediction", "error"), strict=True):
            axes.imshow(picture)
            axes.set_title(f"{title}: {sample.kind}" if title == "input" and sample.kind else title, fontsize=9)
            axes.axis("off")
    figure.savefig(path, dpi=80)


def error_map(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """(H, W, 3) uint8: right foreground white, right background black, wrong red, missed blue."""
    picture = np.zeros((*truth.shape, 3), np.uint8)
    picture[predicted & truth] = 255
    picture[predicted & ~truth] = _WRONG
    picture[~predicted & truth] = _MISSED
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
