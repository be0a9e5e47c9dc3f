"""Score a network on the val split during training; the scores decide which weights are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from skimage.segmentation import relabel_sequential
from torch import nn

from cellseg_batch.trainer.augment import Batch
from cellseg_batch.trainer.card import Instances
from cellseg_batch.trainer.data.sample import Sample
from cellseg_batch.trainer.decode import decode_instances, foreground_mask
from cellseg_batch.trainer.heads import HEADS
from cellseg_batch.trainer.metrics import competition_metric, instance_overlaps, pixel_score
from cellseg_batch.trainer.predict import predict_logits
from cellseg_batch.trainer.recipe import Recipe


@dataclass(frozen=True)
class Validation:
    """Mean scores over images.

    Attributes:
        loss: the recipe's loss.
        dice, iou: of the foreground masks, in [0, 1].
        competition: the competition metric, in [0, 1]; NaN unless it is the recipe's metric, because it takes longest.
    """

    loss: float
    dice: float
    iou: float
    competition: float


def validate(network: nn.Module, samples: Sequence[Sample], recipe: Recipe, total_stride: int) -> Validation:
    """Score ``network`` on whole images; puts it into evaluation mode."""
    network.eval()
    head = HEADS[recipe.head]
    rows = []
    for sample in samples:
        logits = predict_logits(network, sample.pixels, total_stride, recipe.precision)
        labels = torch.from_numpy(sample.labels.astype(np.int64))[None]
        truth = Batch(torch.empty(0), labels, torch.from_numpy(sample.distance)[None].float() / 255)
        loss = float(head.loss(logits[None], truth, recipe.loss_terms))
        pixels = pixel_score(foreground_mask(logits.numpy(), recipe.threshold), sample.labels > 0)
        metric = np.nan
        if recipe.metric == "competition":
            decoded = decode_instances(logits.numpy(), head.decoder, recipe.threshold, Instances())
            metric = competition_metric(instance_overlaps(decoded, relabel_sequential(sample.labels)[0]).ious)
        rows.append((loss, pixels.dice, pixels.iou, metric))
    return Validation(*(float(mean) for mean in np.mean(rows, axis=0)))
