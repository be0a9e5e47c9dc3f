"""Balances the channels of a network's features, so that eight bits hold each of them; what it computes stays the same.

Runs in torch, before a network is quantised.  Nothing here knows which backend quantises it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

Convolution = nn.Conv2d | nn.ConvTranspose2d

# How much of the difference between channels goes from the features into the weights: 0.6 to 0.85 do equally well.
_MOVED = 0.7
# Channels that show next to nothing are not blown up.
_LEAST, _TINY = 1e-3, 1e-30
_KEEPING_CHANNELS = (nn.Identity, nn.MaxPool2d, nn.Dropout2d)


@dataclass(frozen=True)
class _Link:
    """Features after a ReLU, the convolutions whose sum they are, and those that alone look at them."""

    features: fx.Node
    before: list[Convolution]
    after: list[Convolution]


def equalise(network: nn.Module, tiles: Iterable[Tensor]) -> nn.Module:
    """Move differences between the channels of features into weights, in place; returns ``network``.

    A ReLU passes on any positive factor, so a channel may leave one convolution divided by what the next one multiplies
    it with (Nagel et al. 2019, arXiv:1906.04721).  The factor weighs the largest activation of the channel against its
    largest weight (Xiao et al. 2022, arXiv:2211.10438), and costs nothing when the network runs.  Features that
    anything but convolutions and pooling looks at stay as they are.

    Args:
        network: in evaluation mode, batch norms folded.
        tiles: (1, C, H, W) on which the activations are looked at.
    """
    traced = fx.symbolic_trace(network)
    modules = dict(traced.named_modules())
    links = [link for node in traced.graph.nodes if (link := _link(node, modules)) is not None]
    largest = _Largest(traced, {link.features for link in links})
    with torch.no_grad():
        for tile in tiles:
            largest.run(tile)
        for link in links:
            most = largest.seen[link.features]
            weights = torch.stack([_of_inputs(layer).abs().flatten(1).amax(1) for layer in link.after]).amax(0)
            factors = _bounded(most) ** _MOVED / _bounded(weights) ** (1 - _MOVED)
            for layer in link.before:
                of_outputs(layer).div_(factors.view(-1, 1, 1, 1))
                if layer.bias is not None:
                    layer.bias.div_(factors)
            for layer in link.after:
                _of_inputs(layer).mul_(factors.view(-1, 1, 1, 1))
    return network


class _Largest(fx.Interpreter):
    """Runs a network and keeps the largest value of each channel of some of its features."""

    def __init__(self, traced: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(traced)
        self._wanted = wanted
        self.seen: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self._wanted:
            most = value.amax((0, 2, 3))
            self.seen[n] = torch.maximum(most, self.seen.get(n, most))
        return value


def _link(node: fx.Node, modules: dict[str, nn.Module]) -> _Link | None:
    if not isinstance(_module(node, modules), nn.ReLU):
        return None
    before, after = _before(node.all_input_nodes[0], modules), _after(node, modules)
    return _Link(node, before, after) if before and after else None


def _before(node: fx.Node, modules: dict[str, nn.Module]) -> list[Convolution]:
    """The convolutions that alone make a node's value, added up; [] if it is made in another way."""
    if len(node.users) > 1:
        return []
    module = _module(node, modules)
    if isinstance(module, Convolution) and module.groups == 1:
        return [module]
    if isinstance(module, nn.Identity) or node.target in (operator.add, torch.add):
        parts = [_before(source, modules) for source in node.all_input_nodes]
        return [layer for part in parts for layer in part] if all(parts) else []
    return []


def _after(node: fx.Node, modules: dict[str, nn.Module]) -> list[Convolution]:
    """The convolutions that look at a node's value; [] if anything else does."""
    layers = []
    for user in node.users:
        module = _module(user, modules)
        if isinstance(module, Convolution) and module.groups == 1:
            layers.append(module)
        elif isinstance(module, _KEEPING_CHANNELS) and (behind := _after(user, modules)):
            layers += behind
        else:
            return []
    return layers


def _module(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    return modules[str(node.target)] if node.op == "call_module" else None


def _bounded(values: Tensor) -> Tensor:
    """Values of channels, of which none is next to nothing beside the others, or where all are 0."""
    return values.clamp_min(max(_LEAST * float(values.max()), _TINY))


def _of_inputs(convolution: Convolution) -> Tensor:
    """Its weights, the input channels first."""
    return convolution.weight if isinstance(convolution, nn.ConvTranspose2d) else convolution.weight.transpose(0, 1)


def of_outputs(convolution: Convolution) -> Tensor:
    """A convolution's weights, the output channels first."""
    return convolution.weight.transpose(0, 1) if isinstance(convolution, nn.ConvTranspose2d) else convolution.weight
