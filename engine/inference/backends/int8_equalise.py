"""Balance the channels of a network's features, so that eight bits hold each channel; the result stays the same.

It runs in torch, before the network is quantised.  It must not know which backend quantises it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

Convolution = nn.Conv2d | nn.ConvTranspose2d

# Exponent that decides how much of the difference between channels moves from the features into the weights; 0.6 to
# 0.85 do equally well.
_MOVED = 0.7
# Lower bounds of a channel's largest value, relative and absolute, so that nearly empty channels are not blown up.
_LEAST, _TINY = 1e-3, 1e-30
_KEEPING_CHANNELS = (nn.Identity, nn.MaxPool2d, nn.Dropout2d)


@dataclass(frozen=True)
class _Link:
    """Features after a ReLU, the convolutions whose sum makes them, and the convolutions that alone read them."""

    features: fx.Node
    before: list[Convolution]
    after: list[Convolution]


def equalise(network: nn.Module, tiles: Iterable[Tensor]) -> nn.Module:
    """Move differences between the channels of features into weights, in place; returns ``network``.

    A ReLU passes on any positive factor, so a convolution may divide a channel by a factor if the next convolution
    multiplies it by the same factor (Nagel et al. 2019, arXiv:1906.04721).  The factor weighs the channel's largest
    activation against its largest weight (Xiao et al. 2022, arXiv:2211.10438), and costs nothing when the network runs.
    Features that any layer except convolutions and pooling reads stay unchanged.

    Args:
        network: in evaluation mode, batch norms folded.
        tiles: (1, C, H, W) each, on which activations are measured.
    """
    traced = fx.symbolic_trace(network)
    modules = dict(traced.named_modules())
    links = [link for node in traced.graph.nodes if (link := _link(node, modules)) is not None]
    largest = _Largest(traced, {link.features for link in links})
    with torch.no_grad():
        for tile in tiles:
            largest.run(tile)
        for link in links:
            activations = largest.values[link.features]
            weights = torch.stack([_by_input(reader).abs().flatten(1).amax(1) for reader in link.after]).amax(0)
            factors = _bounded(activations) ** _MOVED / _bounded(weights) ** (1 - _MOVED)
            for convolution in link.before:
                of_outputs(convolution).div_(factors.view(-1, 1, 1, 1))
                if convolution.bias is not None:
                    convolution.bias.div_(factors)
            for convolution in link.after:
                _by_input(convolution).mul_(factors.view(-1, 1, 1, 1))
    return network


class _Largest(fx.Interpreter):
    """Runs a network and keeps the largest value of each channel of the ``wanted`` features in ``values``."""

    def __init__(self, traced: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(traced)
        self._wanted = wanted
        self.values: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self._wanted:
            largest = value.amax((0, 2, 3))
            self.values[n] = torch.maximum(largest, self.values.get(n, largest))
        return value


def _link(node: fx.Node, modules: dict[str, nn.Module]) -> _Link | None:
    if not isinstance(_module(node, modules), nn.ReLU):
        return None
    before, after = _before(node.all_input_nodes[0], modules), _after(node, modules)
    return _Link(node, before, after) if before and after else None


def _before(node: fx.Node, modules: dict[str, nn.Module]) -> list[Convolution]:
    """Return the convolutions whose sum is a node's value; [] if anything else makes or shares the value."""
    if len(node.users) > 1:
        return []
    module = _module(node, modules)
    if isinstance(module, Convolution) and module.groups == 1:
        return [module]
    if isinstance(module, nn.Identity) or node.target in (operator.add, torch.add):
        summands = [_before(source, modules) for source in node.all_input_nodes]
        return [convolution for summand in summands for convolution in summand] if all(summands) else []
    return []


def _after(node: fx.Node, modules: dict[str, nn.Module]) -> list[Convolution]:
    """Return the convolutions that read a node's value; [] if any other layer reads it."""
    convolutions = []
    for user in node.users:
        module = _module(user, modules)
        if isinstance(module, Convolution) and module.groups == 1:
            convolutions.append(module)
        elif isinstance(module, _KEEPING_CHANNELS) and (behind := _after(user, modules)):
            convolutions += behind
        else:
            return []
    return convolutions


def _module(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    return modules[str(node.target)] if node.op == "call_module" else None


def _bounded(values: Tensor) -> Tensor:
    """Raise values of channels to a lower bound: a share of the largest value, or a tiny value if all are 0."""
    return values.clamp_min(max(_LEAST * float(values.max()), _TINY))


def _by_input(convolution: Convolution) -> Tensor:
    """Return a convolution's weights with the input channels first."""
    return convolution.weight if isinstance(convolution, nn.ConvTranspose2d) else convolution.weight.transpose(0, 1)


def of_outputs(convolution: Convolution) -> Tensor:
    """Return a convolution's weights with the output channels first."""
    return convolution.weight.transpose(0, 1) if isinstance(convolution, nn.ConvTranspose2d) else convolution.weight
