"""Optimisers and learning rates.  The rate is a function of the step alone, so a resumed run needs no state for it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from cellseg_batch.trainer.recipe import Recipe

# One-cycle (Smith & Topin 2018, arXiv:1708.07120): rise over the first 30 %, then fall to almost nothing.
_RISE = 0.3
_START = 1 / 25


def build_optimiser(parameters: Iterable[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser."""
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.optimiser == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=0.9, nesterov=True, weight_decay=decay)
    kind = torch.optim.AdamW if recipe.optimiser == "adamw" else torch.optim.Adam
    return kind(parameters, lr=rate, weight_decay=decay)


def learning_rate_at(step: int, steps: int, recipe: Recipe) -> float:
    """The learning rate of step ``step`` (from 0) of ``steps``.

    ``cosine`` warms up, holds, then follows a half cosine to zero; ``constant`` warms up and stays;
    ``one-cycle`` rises from 1/25 of the peak over 30 % of the run and falls to zero, both by half cosines.
    """
    peak = recipe.learning_rate
    if recipe.schedule == "one-cycle":
        top = _RISE * steps
        if step < top:
            return peak * (_START + (1 - _START) * _ease(step / top))
        return peak * (1 - _ease((step - top) / (steps - top)))
    rising = peak * min(1.0, (step + 1) / max(1, recipe.warmup))
    held = recipe.hold * steps
    if recipe.schedule == "constant" or step < held:
        return rising
    return rising * (1 - _ease((step - held) / (steps - held)))


def _ease(share: float) -> float:
    """From 0 to 1 along a half cosine."""
    return 0.5 * (1 - math.cos(math.pi * share))
