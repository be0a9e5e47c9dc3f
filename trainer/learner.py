"""The network in training: one optimiser step at a time, its averaged weights, and how to stop and go on."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from cellseg_batch.trainer.augment import Batch
from cellseg_batch.trainer.bundle import Bundle
from cellseg_batch.trainer.checkpoint import Checkpoint
from cellseg_batch.trainer.encoders import load_encoder_weights
from cellseg_batch.trainer.heads import HEADS
from cellseg_batch.trainer.predict import PRECISIONS
from cellseg_batch.trainer.recipe import Recipe, RecipeError
from cellseg_batch.trainer.schedule import build_optimiser
from cellseg_batch.trainer.unet import EfficientUNet, EncoderUNet, build_network

_LARGEST_GRADIENT = 5.0


class Learner:
    """A network, its optimiser and the moving average of its weights.

    Args:
        recipe: what to build and how to train it.
        device: where it lives.
        pretrained: whether to load the published weights; False if others take their place.
        classes: number of classes that the network tells apart.

    Attributes:
        architecture: the argument of `build_network`.
        averaged: the network that is scored and saved; the trained one itself when the recipe does not average.
        provenance: of the published weights that its encoder began with; empty for none.

    Raises:
        OSError: the encoder's weights are missing or cannot be downloaded.
        ValueError: they are of another network.
    """

    def __init__(self, recipe: Recipe, device: torch.device, pretrained: bool = True, classes: int = 0) -> None:
        self.recipe = recipe
        self.architecture = recipe.architecture_of(classes)
        self.device = device
        torch.manual_seed(recipe.seed)
        network = build_network(self.architecture)
        self.provenance = ""
        if recipe.encoder_weights != "none":
            if not isinstance(network, EncoderUNet | EfficientUNet):
                raise RecipeError(
                    "encoder_weights", f"none, as {recipe.network} has no published encoder", recipe.encoder_weights
                )
            if pretrained:
                load_encoder_weights(network.encoder, recipe.encoder_weights)
            self.provenance = network.encoder.provenance
        self._settle(network)

    def _settle(self, network: nn.Module) -> None:
        self.network = network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.averaged = copy.deepcopy(self.network) if self.recipe.averaging else self.network
        self.optimiser = build_optimiser(self.network.parameters(), self.recipe)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.recipe.precision == "fp16")

    def start_from(self, bundle: Bundle) -> None:
        """Take a bundle's weights.

        Raises:
            ValueError: they are of another architecture.
        """
        weights = {name: torch.from_numpy(value.copy()) for name, value in bundle.weights.items()}
        try:
            self.network.load_state_dict(weights, strict=True)
        except RuntimeError as error:
            wanted, given = self.architecture, bundle.card.architecture
            raise ValueError(f"`fine_tune`: the recipe's network is {wanted}, the model's {given}") from error
        self._settle(self.network)

    def step(self, batch: Batch, number: int, learning_rate: float) -> float:
        """Take one optimiser step; returns the loss.

        Args:
            batch: the training pictures.
            number: of the step, from 0; it decides every random draw inside the network.
            learning_rate: of this step.

        Raises:
            FloatingPointError: the loss is not finite; nothing was changed.
        """
        torch.manual_seed(1_000_003 * self.recipe.seed + number)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate
        self.network.train()
        batch = Batch(*(part.to(self.device, non_blocking=True) for part in vars(batch).values()))
        loss = self._loss(batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss became {float(loss.detach())} at step {number + 1}")
        self.optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(self.scaler.scale(loss))
        self.scaler.unscale_(self.optimiser)
        nn.utils.clip_grad_norm_(self.network.parameters(), _LARGEST_GRADIENT)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if self.averaged is not self.network:
            # The average forgets the first, bad weights faster than its final decay would.
            _average(self.averaged, self.network, min(self.recipe.averaging, (number + 1) / (number + 10)))
        return float(loss.detach())

    def _loss(self, batch: Batch) -> Tensor:
        precision = self.recipe.precision
        with torch.autocast(self.device.type, dtype=PRECISIONS[precision], enabled=precision != "fp32"):
            logits = self.network(batch.pixels.contiguous(memory_format=torch.channels_last))
        return HEADS[self.recipe.head].loss(logits, batch, self.recipe.loss_terms)

    def state(self) -> dict[str, dict[str, Any]]:
        """The parts of a `Checkpoint` that are the learner's."""
        return {
            "network": self.network.state_dict(),
            "averaged": self.averaged.state_dict() if self.averaged is not self.network else {},
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of the same recipe."""
        self.network.load_state_dict(checkpoint.network, strict=True)
        if self.averaged is not self.network:
            self.averaged.load_state_dict(checkpoint.averaged, strict=True)
        self.optimiser.load_state_dict(checkpoint.optimiser)
        self.scaler.load_state_dict(checkpoint.scaler)


@torch.no_grad()
def _average(averaged: nn.Module, network: nn.Module, decay: float) -> None:
    for mean, value in zip(averaged.state_dict().values(), network.state_dict().values(), strict=True):
        if mean.dtype.is_floating_point:
            mean.lerp_(value, 1 - decay)
        else:
            mean.copy_(value)
