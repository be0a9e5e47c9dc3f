"""Rewrite a torch network so that it computes the same with fewer operations.

The rewritten network is for inference only.  It must not know which backend compiles the network.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cellseg_batch.engine.inference.backends.torch_turn import TORCH_TURN
from cellseg_batch.trainer.blocks import Merge


def fold_batch_norm(network: nn.Module) -> nn.Module:
    """Fold every batch norm that alone reads a convolution into it, in place; returns ``network``.

    Args:
        network: in evaluation mode.
    """
    modules = dict(network.named_modules())
    with TORCH_TURN:
        nodes = _LayerTracer().trace(network).nodes
    for node in nodes:
        if node.op != "call_module" or not isinstance(modules[node.target], nn.BatchNorm2d):
            continue
        (before,) = node.all_input_nodes
        convolution = modules.get(str(before.target)) if before.op == "call_module" else None
        if isinstance(convolution, nn.Conv2d) and len(before.users) == 1:
            network.set_submodule(str(before.target), fuse_conv_bn_eval(convolution, modules[node.target]))
            network.set_submodule(node.target, nn.Identity())
    return network


class _LayerTracer(fx.Tracer):
    """Follows the features through a network and takes every convolution, padded in whatever way, for one layer."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d) or super().is_leaf_module(m, module_qualified_name)


def fold_upsampling(network: nn.Module) -> nn.Module:
    """Fold every transposed convolution of a `Merge` into the 3x3 convolution behind it, in place; returns ``network``.

    Both are linear and adjacent, so together they are one transposed convolution of 4x4 taps.  The features of the
    finer resolution get their own convolution, and the two results are added: neither enlarged features nor a
    concatenation is held in memory.  For C input channels, W enlarged and K output channels this takes 4 C K
    multiplications per output pixel instead of C W + 9 W K.  A merge that would take more stays as it is, and so does a
    merge whose transposed convolution has a bias, because the padding between the two convolutions cuts the bias off at
    the edges.  Fold batch norms first (`fold_batch_norm`).
    """
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Merge):
                up, convolution = child.up, child.block[0]
                are_convolutions = isinstance(up, nn.ConvTranspose2d) and isinstance(convolution, nn.Conv2d)
                if are_convolutions and up.bias is None and _pays(up, convolution):
                    setattr(parent, name, _FoldedMerge(up, convolution, child.block[1:]))
    return network


def plain_clamps(network: nn.Module) -> nn.Module:
    """Replace every ReLU6 by one clamp in the dtype of its features, in place; returns ``network``.

    Torch lowers its own to a float32 clamp between two casts, in a slow pass over the whole exported program.
    """
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(parent, name, _Clamp6())
    return network


class _Clamp6(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        """Clamp ``features`` to 0 ... 6."""
        return features.clamp(0.0, 6.0)


def _pays(up: nn.ConvTranspose2d, convolution: nn.Conv2d) -> bool:
    inputs, middle, outputs = up.in_channels, up.out_channels, convolution.out_channels
    return 4 * inputs * outputs < inputs * middle + 9 * middle * outputs


class _FoldedMerge(nn.Module):
    """Computes the same as a `Merge` without enlarging the features first.

    Args:
        up: transposed convolution that doubles height and width.
        convolution: convolution of the finer features, if any, concatenated with the enlarged features.
        rest: the layers that follow.
    """

    def __init__(self, up: nn.ConvTranspose2d, convolution: nn.Conv2d, rest: nn.Module) -> None:
        super().__init__()
        finer, outputs = convolution.in_channels - up.out_channels, convolution.out_channels
        self.up = nn.ConvTranspose2d(up.in_channels, outputs, 4, stride=2, padding=1)
        self.up.weight = nn.Parameter(_compose(up.weight, convolution.weight[:, finer:]))
        self.up.bias = convolution.bias
        self.finer = nn.Conv2d(finer, outputs, 3, padding=1, bias=False) if finer else None
        if self.finer is not None:
            self.finer.weight = nn.Parameter(convolution.weight[:, :finer].contiguous())
        self.rest = rest

    def forward(self, features: Tensor, *finer: Tensor) -> Tensor:
        """See `Merge`."""
        merged = self.up(features)
        if self.finer is not None:
            # In this order OpenVINO needs less memory in int8.
            merged = merged + self.finer(*finer)
        folded: Tensor = self.rest(merged)
        return folded


def _compose(up: Tensor, convolution: Tensor) -> Tensor:
    """Return the weights (C, K, 4, 4) that combine a transposed convolution and the 3x3 convolution after it.

    The result is a transposed convolution of stride 2 and padding 1.

    Args:
        up: weights (C, W, 2, 2) of the transposed convolution, stride 2.
        convolution: weights (K, W, 3, 3) of the convolution, padding 1.
    """
    weights = torch.zeros(up.shape[0], convolution.shape[0], 4, 4, dtype=torch.float64)
    for y in range(3):
        for x in range(3):
            # An enlarged pixel contributes to the output pixel that lies y - 1 above and x - 1 left of it.
            taps = torch.einsum("cwab,kw->ckab", up.double(), convolution[:, :, y, x].double())
            weights[:, :, 2 - y : 4 - y, 2 - x : 4 - x] += taps
    return weights.float()
