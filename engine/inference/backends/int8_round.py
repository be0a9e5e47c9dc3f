"""Round a network's weights to the steps of int8, so that its features change as little as possible.

It runs in torch, before the network is quantised.  It must not know which backend quantises it.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cellseg_batch.engine.inference.backends.int8_equalise import Convolution, of_outputs

_LARGEST = 127  # of a symmetric int8
_MAX_SAMPLED = 1 << 24  # values of a convolution's input that are sampled per tile
_WIDEST = 4096  # inputs per output; with more, their products take too long to factorise
_DAMPING = 0.01  # share of the diagonal's mean that is added to the diagonal, so that the matrix can be inverted
_COLUMNS = 128  # columns that are rounded before their error is passed on to the rest


def round_weights(network: nn.Module, tiles: Iterable[Tensor]) -> nn.Module:
    """Round the weights of all convolutions but the first and the last to int8's steps, in place; returns ``network``.

    The step of an output channel is a 127th of its largest weight.  The largest weight stays unchanged, so that
    quantising by the largest weight gives the same steps.  Weights are rounded column by column, and the remaining
    columns compensate for each rounding error as well as the features of the tiles allow (Frantar et al. 2022,
    arXiv:2210.17323).  Grouped, dilated and very wide convolutions stay unchanged.

    Args:
        network: in evaluation mode, batch norms folded.
        tiles: (1, C, H, W) each, whose features are sampled.
    """
    order: list[Convolution] = []
    products: dict[Convolution, Tensor] = {}

    def add_products(convolution: Convolution, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        if convolution not in order:
            order.append(convolution)
        plain = convolution.groups == 1 and convolution.dilation == (1, 1)
        if plain and convolution.in_channels * _window(convolution) ** 2 <= _WIDEST:
            columns = patches(convolution, inputs[0])
            products[convolution] = products.get(convolution, 0) + (columns @ columns.T).double()

    convolutions = [module for module in network.modules() if isinstance(module, Convolution)]
    hooks = [convolution.register_forward_hook(add_products) for convolution in convolutions]
    with torch.no_grad():
        for tile in tiles:
            network(tile)
        for hook in hooks:
            hook.remove()
        for convolution in order[1:-1]:
            if convolution in products and products[convolution].any():
                _round(convolution, products[convolution])
    return network


def patches(convolution: Convolution, features: Tensor) -> Tensor:
    """Return the inputs of each output in features (1, C, H, W), one column per output: (C * window, positions).

    For a transposed convolution, a column belongs to a position of its input and holds the inputs of all outputs there.
    If there are many positions, a fixed random sample of them is used.
    """
    size, stride, padding = _window(convolution), convolution.stride[0], int(convolution.padding[0])
    if isinstance(convolution, nn.ConvTranspose2d):
        stride, padding = 1, size // 2
    padded = F.pad(features[0], (padding,) * 4)
    height, width = ((side - size) // stride + 1 for side in padded.shape[1:])
    positions, limit = torch.arange(height * width), _MAX_SAMPLED // (len(padded) * size**2)
    if len(positions) > limit:
        positions = torch.randperm(len(positions), generator=torch.Generator().manual_seed(0))[:limit]
    rows, columns = stride * (positions // width), stride * (positions % width)
    return torch.stack([padded[:, rows + y, columns + x] for y, x in product(range(size), repeat=2)], 1).flatten(0, 1)


def _round(convolution: Convolution, products: Tensor) -> None:
    ordered = of_outputs(convolution)
    weights = ordered.double().flatten(1)
    steps = weights.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / _LARGEST
    rounded = torch.empty_like(weights)
    if isinstance(convolution, nn.ConvTranspose2d):
        for columns, inputs in outputs(convolution):
            rounded[:, columns] = _compensated(weights[:, columns], products[inputs][:, inputs], steps)
    else:
        rounded = _compensated(weights, products, steps)
    ordered.copy_(rounded.view_as(ordered))


def _window(convolution: Convolution) -> int:
    """Return the side in px of an output's inputs; for a transposed convolution, of all outputs at one position."""
    return 2 * _reach(convolution) + 1 if isinstance(convolution, nn.ConvTranspose2d) else convolution.kernel_size[0]


def _taps(convolution: nn.ConvTranspose2d) -> list[list[tuple[int, int]]]:
    """Return, along one axis, (tap, offset) of every tap of each output within a stride.

    The offset is the distance in px from the output's position to the tap's input.
    """
    (size, _), (stride, _), padding = convolution.kernel_size, convolution.stride, int(convolution.padding[0])
    return [
        [(tap, shift // stride) for tap in range(size) if (shift := phase + padding - tap) % stride == 0]
        for phase in range(stride)
    ]


def _reach(convolution: nn.ConvTranspose2d) -> int:
    """Return the largest distance in px from an output of a transposed convolution to its inputs."""
    return max(abs(offset) for taps in _taps(convolution) for _, offset in taps)


def outputs(convolution: nn.ConvTranspose2d) -> list[tuple[Tensor, Tensor]]:
    """Return, for each output within a stride, its weights' columns (C * taps) and the matching rows of `patches`."""
    size, reach, window = convolution.kernel_size[0], _reach(convolution), _window(convolution)
    channels = torch.arange(convolution.in_channels)[:, None]
    indices = []
    for rows, columns in product(_taps(convolution), repeat=2):
        pairs = list(product(rows, columns))
        taps = torch.tensor([y * size + x for (y, _), (x, _) in pairs])
        inputs = torch.tensor([(reach + y) * window + reach + x for (_, y), (_, x) in pairs])
        indices.append(((channels * size**2 + taps).flatten(), (channels * window**2 + inputs).flatten()))
    return indices


def _compensated(weights: Tensor, products: Tensor, steps: Tensor) -> Tensor:
    """Round weights (outputs, K) to ``steps`` (outputs, 1), given the sums of the inputs' ``products`` (K, K)."""
    damped = products + _DAMPING * products.diagonal().mean() * torch.eye(len(products), dtype=products.dtype)
    # Round the weights of the strongest inputs first, while all other weights can still compensate.
    order = damped.diagonal().argsort(descending=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped[order][:, order]))
    factors = torch.linalg.cholesky(inverse, upper=True)
    left = weights[:, order]
    largest = left.abs() >= (1 - 1e-9) * _LARGEST * steps  # the steps derive from these weights, so they stay
    fixed, rounded = left.clone(), torch.empty_like(left)
    for start in range(0, left.shape[1], _COLUMNS):
        end = min(start + _COLUMNS, left.shape[1])
        errors = torch.empty_like(left[:, start:end])
        for column in range(start, end):
            exact = left[:, column, None]
            nearest = steps * (exact / steps).round().clamp(-_LARGEST, _LARGEST)
            rounded[:, column, None] = torch.where(largest[:, column, None], fixed[:, column, None], nearest)
            errors[:, column - start] = (exact - rounded[:, column, None])[:, 0] / factors[column, column]
            left[:, column:end] -= errors[:, column - start, None] * factors[column, column:end]
        left[:, end:] -= errors @ factors[start:end, end:]
    restored = torch.empty_like(rounded)
    restored[:, order] = rounded
    return restored
