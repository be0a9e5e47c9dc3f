"""Train a network on annotated images and write its bundle.

One loop: draw a batch, step, now and then score the averaged weights on the val split.  It knows nothing
about slides or the engine.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cellseg_batch.trainer.augment import Augmenter
from cellseg_batch.trainer.bundle import Bundle, Card, Normalisation, save_bundle
from cellseg_batch.trainer.data.dataset import load_dataset
from cellseg_batch.trainer.data.sample import Sample
from cellseg_batch.trainer.footprint import measure_footprint
from cellseg_batch.trainer.losses import OUTPUTS, segmentation_loss
from cellseg_batch.trainer.metrics import pixel_score
from cellseg_batch.trainer.unet import build_network

# The Data Science Bowl images do not record their pixel size; nuclei of 15-40 px across suggest this.
NOMINAL_PIXEL_SIZE_UM = 0.5


@dataclass(frozen=True)
class TrainSettings:
    """A recipe.

    Attributes:
        name: of the model.
        width: channels of the network's first layers.
        steps: optimiser steps.
        batch: crops per step.
        crop: side of a crop in px.
        zoom: smallest and largest magnification of a crop.
        learning_rate: AdamW's peak; warmed up over 300 steps, flat to the middle, then cosine to zero.
        weight_decay: AdamW's.
        averaging: decay of the exponential moving average of the weights that is scored and saved.
        group_power: a kind of image is drawn in proportion to (its number of images) ** group_power.
        score_every: steps between scores on the val split.
        seed: of every random draw.
    """

    name: str = "nuclei"
    width: int = 32
    steps: int = 16_000
    batch: int = 8
    crop: int = 256
    zoom: tuple[float, float] = (0.5, 2.4)
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    averaging: float = 0.998
    group_power: float = 0.6
    score_every: int = 1_000
    seed: int = 0


@dataclass(frozen=True)
class Progress:
    """What a training run reports each time it scores itself; ``loss`` is the mean since the last report."""

    step: int
    loss: float
    dice: float
    dice_by_kind: dict[str, float]
    images_per_second: float


def learning_rate_at(step: int, settings: TrainSettings) -> float:
    """Warm up, stay flat to the middle of the run, then follow a half cosine down to zero."""
    flat = settings.steps // 2
    if step < flat:
        return settings.learning_rate * min(1.0, (step + 1) / 300)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - flat) / (settings.steps - flat)))


def draw_samples(samples: list[Sample], count: int, power: float, rng: np.random.Generator) -> list[Sample]:
    """Draw ``count`` samples, first the kind of image, then the image."""
    kinds = sorted({sample.kind for sample in samples})
    groups = [[sample for sample in samples if sample.kind == kind] for kind in kinds]
    odds = np.array([len(group) for group in groups], float) ** power
    chosen = rng.choice(len(groups), size=count, p=odds / odds.sum())
    return [groups[i][rng.integers(len(groups[i]))] for i in chosen]


@torch.inference_mode()
def predict_logits(network: nn.Module, pixels: np.ndarray, total_stride: int, precision: torch.dtype) -> Tensor:
    """Logits (K, H, W) float32 of one whole image (H, W, C), padded by reflection to the total stride."""
    height, width = pixels.shape[:2]
    padding = ((0, -height % total_stride), (0, -width % total_stride), (0, 0))
    padded = torch.from_numpy(np.pad(pixels, padding, mode="reflect")).permute(2, 0, 1)[None]
    with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
        logits = network(padded.contiguous(memory_format=torch.channels_last))
    inside: Tensor = logits[0, :, :height, :width].float()
    return inside


def mean_dice(network: nn.Module, samples: list[Sample], total_stride: int) -> tuple[float, dict[str, float]]:
    """Mean pixel Dice of the foreground over images, overall and by kind."""
    network.eval()
    by_kind: dict[str, list[float]] = {}
    for sample in samples:
        logits = predict_logits(network, sample.pixels, total_stride, torch.bfloat16)
        score = pixel_score((logits[0] > 0).numpy(), sample.labels > 0)
        by_kind.setdefault(sample.kind, []).append(score.dice)
    every = [dice for scores in by_kind.values() for dice in scores]
    return float(np.mean(every)), {kind: float(np.mean(scores)) for kind, scores in sorted(by_kind.items())}


def train(
    data: Path,
    out: Path,
    settings: TrainSettings,
    report: Callable[[Progress], None],
    fine_tune: Bundle | None = None,
) -> Bundle:
    """Train on the train split of ``data`` and write the averaged weights to ``out`` at every score.

    Args:
        data: the annotated images.
        out: folder of the bundle.
        settings: the recipe.
        report: told at every score.
        fine_tune: start from this bundle's weights, which must be of the recipe's architecture.

    Raises:
        FileNotFoundError, ValueError: the data cannot be read.
        RuntimeError: the bundle to start from is of another architecture.
        FloatingPointError: the loss became NaN; the last bundle written is kept.
    """
    rule = Normalisation()
    splits = load_dataset(data, rule).splits
    train_samples, val_samples = splits["train"], splits["val"]
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    augmenter = Augmenter(settings.crop, settings.zoom, settings.seed + 1)

    architecture = {"name": "stem-unet", "in_channels": 3, "outputs": len(OUTPUTS), "width": settings.width, "depth": 4}
    network = build_network(architecture)
    if fine_tune is not None:
        network.load_state_dict(
            {name: torch.from_numpy(value) for name, value in fine_tune.weights.items()}, strict=True
        )
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    footprint = measure_footprint(build_network(architecture), in_channels=3)
    averaged = copy.deepcopy(network)
    optimiser = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)

    losses: list[float] = []
    started = time.perf_counter()
    for step in range(settings.steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate_at(step, settings)
        batch = augmenter.batch(draw_samples(train_samples, settings.batch, settings.group_power, rng))
        network.train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = network(batch.pixels.contiguous(memory_format=torch.channels_last))
        loss = segmentation_loss(logits, batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss became {float(loss)} at step {step}; lower the learning rate")
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimiser.step()
        _average(averaged, network, min(settings.averaging, (step + 1) / (step + 10)))
        losses.append(float(loss.detach()))

        if (step + 1) % settings.score_every == 0 or step + 1 == settings.steps:
            dice, by_kind = mean_dice(averaged, val_samples, footprint.total_stride)
            rate = (step + 1) * settings.batch / (time.perf_counter() - started)
            report(Progress(step + 1, float(np.mean(losses)), dice, by_kind, rate))
            losses.clear()
            card = Card(
                name=settings.name,
                architecture=architecture,
                channels=3,
                outputs=OUTPUTS,
                total_stride=footprint.total_stride,
                exact_margin=footprint.exact_margin,
                margin=64,
                threshold=0.5,
                pixel_size_um=NOMINAL_PIXEL_SIZE_UM,
                normalisation=rule,
                training={"data": data.name, "images": len(train_samples), "step": step + 1, **asdict(settings)},
                metrics={"val_mean_dice": dice, "val_mean_dice_by_kind": by_kind},
            )
            weights = {name: value.numpy() for name, value in averaged.state_dict().items()}
            bundle = Bundle(card, weights)
            save_bundle(bundle, out)
    return bundle


@torch.no_grad()
def _average(averaged: nn.Module, network: nn.Module, decay: float) -> None:
    for mean, value in zip(averaged.state_dict().values(), network.state_dict().values(), strict=True):
        if mean.dtype.is_floating_point:
            mean.lerp_(value, 1 - decay)
        else:
            mean.copy_(value)
