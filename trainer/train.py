"""Train a network on annotated images and write its bundle.

One loop: draw a batch, step, and after each epoch score the averaged weights on the val split, keep the best
and write a checkpoint.  Every draw is a function of the seed and the step, so a resumed run takes the same steps as an
uninterrupted one.  This module must not know slides or the engine.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cellseg_batch.trainer.augment import Augmenter, Batch
from cellseg_batch.trainer.bundle import Bundle, load_bundle, save_bundle
from cellseg_batch.trainer.card import Card, Input, ModelClass, Size, plain_output
from cellseg_batch.trainer.checkpoint import CHECKPOINT_FILE, Checkpoint, check_same, load_checkpoint, save_checkpoint
from cellseg_batch.trainer.data.dataset import Dataset, load_dataset
from cellseg_batch.trainer.data.sample import Sample
from cellseg_batch.trainer.decode import class_map, decode_instances
from cellseg_batch.trainer.footprint import measure_footprint
from cellseg_batch.trainer.heads import HEADS
from cellseg_batch.trainer.learner import Learner
from cellseg_batch.trainer.plots import plot_curves, plot_predictions, write_log
from cellseg_batch.trainer.predict import predict_logits
from cellseg_batch.trainer.receptive_field import Footprint
from cellseg_batch.trainer.recipe import Recipe, RecipeError
from cellseg_batch.trainer.schedule import learning_rate_at
from cellseg_batch.trainer.unet import build_network, load_network
from cellseg_batch.trainer.validate import Validation, validate


@dataclass(frozen=True)
class Epoch:
    """Figures of one epoch.

    Attributes:
        number: number of the epoch, from 1.
        step: number of steps done.
        learning_rate: learning rate of the last step.
        loss: mean loss over the epoch's batches.
        validation: scores of the averaged weights.
        best: whether these weights are the best so far, and kept.
        images_per_second: speed of training, without scoring.
    """

    number: int
    step: int
    learning_rate: float
    loss: float
    validation: Validation
    best: bool
    images_per_second: float

    @property
    def row(self) -> dict[str, float]:
        """One line of the log."""
        figures = {"epoch": self.number, "step": self.step, "learning_rate": self.learning_rate, "loss": self.loss}
        scores = {f"val_{name}": value for name, value in asdict(self.validation).items()}
        return figures | scores | {"best": self.best, "images_per_second": self.images_per_second}


class Observer(Protocol):
    """Told about a training run while it goes on."""

    def planned(self, dataset: Dataset, steps: int, done: int, batch: int) -> None:
        """The data are read; ``done`` of ``steps`` steps, of ``batch`` pictures each, are done already."""

    def stepped(self, step: int, loss: float) -> None:
        """``step`` steps are done."""

    def scored(self, epoch: Epoch) -> None:
        """An epoch is done."""


def train(
    data: Path,
    out: Path,
    recipe: Recipe,
    observer: Observer,
    *,
    fine_tune: Bundle | None = None,
    resume: bool = False,
    max_steps: int | None = None,
    device: str = "auto",
) -> Bundle:
    """Train on the train split of ``data``, and write the bundle of the best weights to ``out``, with log and pictures.

    Args:
        data: the annotated images.
        out: folder of the bundle, the checkpoint, ``log.csv``, ``curves.png`` and ``pictures.png``.
        recipe: the recipe.
        observer: told of every event.
        fine_tune: bundle whose weights to start from; they must be of the recipe's architecture.
        resume: whether to continue from the checkpoint in ``out``; the recipe's length and schedule may differ.
        max_steps: number of steps of a shorter run; the schedule is fitted to it.
        device: ``auto`` (CUDA if there is any), ``cpu`` or ``cuda``.

    Returns:
        The bundle of the best weights.

    Raises:
        RecipeError: crops are no whole strides of the network.
        OSError, ValueError: the data cannot be read; ``out`` holds a run already; there is no run to resume, or it has
            another recipe, other data or another number of steps; weights to start from do not fit or cannot be read.
        FloatingPointError: the loss is no longer finite; the best bundle and the last checkpoint are kept.
    """
    if not resume and (out / CHECKPOINT_FILE).exists():
        raise ValueError(f"{out} holds a training run already; go on with `resume`, or choose another `out`")
    head = HEADS[recipe.head]
    dataset = load_dataset(data, recipe.normalisation, needs_classes=head.has_classes)
    classes = dataset.classes if head.has_classes else ()
    samples = dataset.splits["train"]
    epoch_steps = recipe.epoch_steps or math.ceil(len(samples) / recipe.batch)
    steps = min(epoch_steps * recipe.epochs, max_steps or epoch_steps * recipe.epochs)
    start = Checkpoint(asdict(recipe), dataset.names, steps, [one.name for one in classes])
    pretrained = not resume and fine_tune is None
    learner = Learner(recipe, torch.device(_pick_device(device)), pretrained, len(classes))
    if resume:
        checkpoint = load_checkpoint(out)
        check_same(checkpoint, start)
        learner.restore(checkpoint)
        checkpoint.recipe, checkpoint.steps = start.recipe, start.steps
    else:
        checkpoint = start
        if fine_tune is not None:
            learner.start_from(fine_tune)
    footprint = _footprint(recipe)
    if recipe.size % footprint.total_stride:
        expected = f"a multiple of the network's total stride, {footprint.total_stride} px"
        raise RecipeError("size", expected, recipe.size)
    out.mkdir(parents=True, exist_ok=True)
    keeper = _Keeper(out, recipe, dataset, classes, footprint, checkpoint)
    observer.planned(dataset, steps, checkpoint.step, recipe.batch)

    def draw(step: int) -> Batch:
        rng = np.random.default_rng((recipe.seed, step))
        return Augmenter(recipe, rng).batch(draw_samples(samples, recipe.batch, recipe.group_power, rng))

    losses: list[float] = []
    epoch_started = time.perf_counter()
    first = steps if keeper.patience_is_over else checkpoint.step
    for step, batch in _in_order(
        draw, first, steps, workers=0 if learner.device.type == "cpu" else os.cpu_count() or 1
    ):
        rate = learning_rate_at(step, steps, recipe)
        losses.append(learner.step(batch, step, rate))
        observer.stepped(step + 1, losses[-1])
        if (step + 1) % epoch_steps == 0 or step + 1 == steps:
            speed = recipe.batch * len(losses) / (time.perf_counter() - epoch_started)
            observer.scored(keeper.keep(learner, step + 1, -(-(step + 1) // epoch_steps), rate, losses, speed))
            if keeper.patience_is_over:
                break
            losses, epoch_started = [], time.perf_counter()
    bundle = load_bundle(out)
    network = load_network(bundle)
    plot_predictions(dataset.splits["val"], partial(_predict, bundle.card, network), out / "pictures.png", classes)
    return bundle


def _predict(card: Card, network: nn.Module, sample: Sample) -> NDArray[np.integer]:
    """The classes of a sample's pixels, for a model of classes, or its instances."""
    logits = predict_logits(network, sample.pixels, card.total_stride, "fp32").numpy()
    if card.decoder == "classes":
        return class_map(logits, card.threshold)
    return decode_instances(logits, card.decoder, card.threshold, card.rule)


@dataclass
class _Keeper:
    """Scores the weights after an epoch, and writes bundle, checkpoint, log and curves."""

    out: Path
    recipe: Recipe
    dataset: Dataset
    classes: tuple[ModelClass, ...]
    footprint: Footprint
    checkpoint: Checkpoint

    @property
    def patience_is_over(self) -> bool:
        return 0 < self.recipe.patience <= self.checkpoint.stale

    def keep(self, learner: Learner, step: int, number: int, rate: float, losses: list[float], speed: float) -> Epoch:
        """Score the averaged weights; write the bundle if they are the best so far, then checkpoint, log and curves.

        Args:
            learner: the network in training.
            step: number of steps done.
            number: number of the epoch, from 1.
            rate: learning rate of the last step.
            losses: losses of the epoch's batches.
            speed: pictures per second, without scoring.
        """
        state = self.checkpoint
        validation = validate(learner.averaged, self.dataset.splits["val"], self.recipe, self.footprint.total_stride)
        value: float = getattr(validation, self.recipe.metric)
        best = value > state.best
        epoch = Epoch(number, step, rate, float(np.mean(losses)), validation, best, speed)
        if best:
            save_bundle(self._bundle(learner, epoch), self.out)
        state.best, state.stale, state.step = max(value, state.best), 0 if best else state.stale + 1, step
        state.history.append(epoch.row)
        vars(state).update(learner.state())
        # Write the checkpoint after the bundle: after a kill in between, a resumed run writes the same bundle again.
        save_checkpoint(state, self.out)
        write_log(state.history, self.out / "log.csv")
        plot_curves(state.history, self.out / "curves.png")
        return epoch

    def _bundle(self, learner: Learner, epoch: Epoch) -> Bundle:
        recipe, head, stride = self.recipe, HEADS[self.recipe.head], self.footprint.total_stride
        card = Card(
            name=recipe.name,
            input=Input(("rgb",), recipe.normalisation, Size(stride, stride), recipe.pixel_size_um or None),
            output=plain_output(*head.outputs, *(one.name for one in self.classes)),
            decoder=head.decoder,
            total_stride=stride,
            exact_margin=self.footprint.exact_margin,
            margin=recipe.margin,
            threshold=recipe.threshold,
            architecture=recipe.architecture_of(len(self.classes)),
            downscale=recipe.downscale,
            classes=self.classes,
            training={
                "images": len(self.dataset.splits["train"]),
                "step": epoch.step,
                **asdict(recipe),
                **({"encoder_provenance": learner.provenance} if learner.provenance else {}),
            },
            metrics={name: value for name, value in asdict(epoch.validation).items() if not math.isnan(value)},
        )
        weights = {name: value.cpu().numpy() for name, value in learner.averaged.state_dict().items()}
        return Bundle(card, weights)


def _footprint(recipe: Recipe) -> Footprint:
    """Measure stride and margin of the recipe's network, on a thin one if possible: width does not affect them."""
    thin = {"width": 2} if "width" in recipe.architecture else {}
    return measure_footprint(build_network(recipe.architecture | thin))


def draw_samples(samples: Sequence[Sample], count: int, power: float, rng: np.random.Generator) -> list[Sample]:
    """Draw ``count`` samples: for each, first the kind of image, then the image.

    Args:
        samples: the samples.
        count: number of draws.
        power: the odds of a kind are its number of images to this power.
        rng: source of random numbers.
    """
    kinds = sorted({sample.kind for sample in samples})
    groups = [[sample for sample in samples if sample.kind == kind] for kind in kinds]
    odds = np.array([len(group) for group in groups], float) ** power
    chosen = rng.choice(len(groups), size=count, p=odds / odds.sum())
    return [groups[kind][rng.integers(len(groups[kind]))] for kind in chosen]


def _in_order(draw: Callable[[int], Batch], first: int, last: int, workers: int) -> Iterator[tuple[int, Batch]]:
    """(step, batch) of steps [first, last) in order, drawn ahead by ``workers`` threads unless ``workers`` is 0."""
    if workers == 0:
        yield from ((step, draw(step)) for step in range(first, last))
        return
    with ThreadPoolExecutor(workers) as pool:
        ahead = deque(pool.submit(draw, step) for step in range(first, min(first + 2 * workers, last)))
        for step in range(first, last):
            yield step, ahead.popleft().result()
            if step + 2 * workers < last:
                ahead.append(pool.submit(draw, step + 2 * workers))


def _pick_device(device: str) -> str:
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"
