"""Score a network on the val split during training; the scores decide which weights are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from statistics import fmean

import numpy as np
import torch
from skimage.segmentation import relabel_sequential
from torch import nn

from cellseg_batch.trainer.augment import Batch
from cellseg_batch.trainer.card import Instances
from cellseg_batch.trainer.data.sample import Sample
from cellseg_batch.trainer.decode import class_map, decode_instances, foreground_mask
from cellseg_batch.trainer.heads import HEADS
from cellseg_batch.trainer.metrics import (
    class_scores,
    competition_metric,
    instance_overlaps,
    majority_classes,
    pixel_score,
)
from cellseg_batch.trainer.predict import predict_logits
from cellseg_batch.trainer.recipe import Recipe


@dataclass(frozen=True)
class Validation:
    """Mean scores over images.

    Attributes:
        loss: the recipe's loss.
        dice, iou: of the foreground masks, in [0, 1]; of classes, the mean over the classes of their scores in all
            images together.
        competition: the competition metric, in [0, 1]; NaN unless it is the recipe's metric, because it takes longest.
            Instances match only those of their own class.
    """

    loss: float
    dice: float
    iou: float
    competition: float


def validate(network: nn.Module, samples: Sequence[Sample], recipe: Recipe, total_stride: int) -> Validation:
    """Score ``network`` on whole images; puts it into evaluation mode."""
    network.eval()
    head = HEADS[recipe.head]
    rows, by_class = [], []
    for sample in samples:
        logits = predict_logits(network, sample.pixels, total_stride, recipe.precision)
        classes = np.zeros_like(sample.labels) if sample.classes is None else sample.classes
        labels, numbers = (torch.from_numpy(maps.astype(np.int64))[None] for maps in (sample.labels, classes))
        truth = Batch(torch.empty(0), labels, torch.from_numpy(sample.distance)[None].float() / 255, numbers)
        loss = float(head.loss(logits[None], truth, recipe.loss_terms))
        pixels = pixel_score(foreground_mask(logits.numpy(), head.decoder, recipe.threshold), sample.labels > 0)
        if head.has_classes:
            count, found_classes = len(logits) - 1, class_map(logits.numpy(), recipe.threshold)
            by_class.append(class_scores(found_classes, classes, count))
        metric = np.nan
        if recipe.metric == "competition":
            decoded = decode_instances(logits.numpy(), head.decoder, recipe.threshold, Instances())
            true = relabel_sequential(sample.labels)[0]
            ious = instance_overlaps(decoded, true).ious
            if head.has_classes:
                found_as = majority_classes(decoded, found_classes, count)
                ious = np.where(found_as[:, None] == majority_classes(true, classes, count), ious, 0)
            metric = competition_metric(ious)
        rows.append((loss, pixels.dice, pixels.iou, metric))
    loss, dice, iou, competition = (float(mean) for mean in np.mean(rows, axis=0))
    if head.has_classes:
        pooled = [reduce(add, scores) for scores in zip(*by_class, strict=True)]
        dice, iou = fmean(score.dice for score in pooled), fmean(score.iou for score in pooled)
    return Validation(loss, dice, iou, competition)
