"""Rounds a network's weights to what int8 can hold, so that its features change as little as possible.

Runs in torch, before a network is quantised.  Nothing here knows which backend quantises it.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cellseg_batch.engine.inference.backends.int8_equalise import Convolution, of_outputs

_LARGEST = 127  # of a symmetric int8
_SEEN = 1 << 24  # values of a convolution's input that are looked at in a tile
_WIDEST = 4096  # values that an output looks at, above which their products take too long to factorise
_DAMPING = 0.01  # of the mean, added to the diagonal so that it can be inverted
_COLUMNS = 128  # that are rounded before the others learn of it


def round_weights(network: nn.Module, tiles: Iterable[Tensor]) -> nn.Module:
    """Round the weights of all convolutions but the first and the last to int8's steps, in place; returns ``network``.

    Each output channel has steps of a 127th of its largest weight, which stays what it is, so that whoever quantises it
    by its largest weight finds the same steps.  Weights are rounded one after the other, and what one gets wrong the
    rest make good as far as the features, as they come in tiles, let them (Frantar et al. 2022, arXiv:2210.17323).
    Convolutions of several groups, dilated and very wide ones are left alone.

    Args:
        network: in evaluation mode, batch norms folded.
        tiles: (1, C, H, W) on which features are looked at.
    """
    order: list[Convolution] = []
    products: dict[Convolution, Tensor] = {}

    def look(convolution: Convolution, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        if convolution not in order:
            order.append(convolution)
        plain = convolution.groups == 1 and convolution.dilation == (1, 1)
        if plain and convolution.in_channels * _window(convolution) ** 2 <= _WIDEST:
            seen = patches(convolution, inputs[0])
            products[convolution] = products.get(convolution, 0) + (seen @ seen.T).double()

    hooks = [module.register_forward_hook(look) for module in network.modules() if isinstance(module, Convolution)]
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
    """What outputs look at in features (1, C, H, W), one output a column: (C * window, positions).

    Of a transposed convolution an output is one position of its input, with all that its outputs there look at.  Of
    many positions some are looked at, always the same ones.
    """
    size, stride, padding = _window(convolution), convolution.stride[0], int(convolution.padding[0])
    if isinstance(convolution, nn.ConvTranspose2d):
        stride, padding = 1, size // 2
    padded = F.pad(features[0], (padding,) * 4)
    height, width = ((side - size) // stride + 1 for side in padded.shape[1:])
    positions, most = torch.arange(height * width), _SEEN // (len(padded) * size**2)
    if len(positions) > most:
        positions = torch.randperm(len(positions), generator=torch.Generator().manual_seed(0))[:most]
    rows, columns = stride * (positions // width), stride * (positions % width)
    return torch.stack([padded[:, rows + y, columns + x] for y, x in product(range(size), repeat=2)], 1).flatten(0, 1)


def _round(convolution: Convolution, products: Tensor) -> None:
    ordered = of_outputs(convolution)
    weights = ordered.double().flatten(1)
    steps = weights.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / _LARGEST
    rounded = torch.empty_like(weights)
    if isinstance(convolution, nn.ConvTranspose2d):
        for columns, seen in outputs(convolution):
            rounded[:, columns] = _compensated(weights[:, columns], products[seen][:, seen], steps)
    else:
        rounded = _compensated(weights, products, steps)
    ordered.copy_(rounded.view_as(ordered))


def _window(convolution: Convolution) -> int:
    """Side in px of what an output looks at; of a transposed convolution, what all outputs of one position do."""
    return 2 * _reach(convolution) + 1 if isinstance(convolution, nn.ConvTranspose2d) else convolution.kernel_size[0]


def _taps(convolution: nn.ConvTranspose2d) -> list[list[tuple[int, int]]]:
    """Along one axis, of each output within a stride: its taps, and how many px from its own position they look."""
    (size, _), (stride, _), padding = convolution.kernel_size, convolution.stride, int(convolution.padding[0])
    return [
        [(tap, away // stride) for tap in range(size) if (away := phase + padding - tap) % stride == 0]
        for phase in range(stride)
    ]


def _reach(convolution: nn.ConvTranspose2d) -> int:
    """How many px around its own position an output of a transposed convolution looks at."""
    return max(abs(away) for taps in _taps(convolution) for _, away in taps)


def outputs(convolution: nn.ConvTranspose2d) -> list[tuple[Tensor, Tensor]]:
    """Of each output within a stride: the columns of its weights (C * taps) and the rows of the patches they meet."""
    size, reach, window = convolution.kernel_size[0], _reach(convolution), _window(convolution)
    channels = torch.arange(convolution.in_channels)[:, None]
    phases = []
    for rows, columns in product(_taps(convolution), repeat=2):
        both = list(product(rows, columns))
        taps = torch.tensor([y * size + x for (y, _), (x, _) in both])
        seen = torch.tensor([(reach + y) * window + reach + x for (_, y), (_, x) in both])
        phases.append(((channels * size**2 + taps).flatten(), (channels * window**2 + seen).flatten()))
    return phases


def _compensated(weights: Tensor, products: Tensor, steps: Tensor) -> Tensor:
    """Weights (outputs, K) rounded to ``steps`` (outputs, 1), given sums of the inputs' products (K, K)."""
    damped = products + _DAMPING * products.diagonal().mean() * torch.eye(len(products), dtype=products.dtype)
    # What is seen most is rounded first, when all others can still make it good.
    order = damped.diagonal().argsort(descending=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped[order][:, order]))
    factors = torch.linalg.cholesky(inverse, upper=True)
    left = weights[:, order]
    largest = left.abs() >= (1 - 1e-9) * _LARGEST * steps  # what the steps are made of stays
    fixed, rounded = left.clone(), torch.empty_like(left)
    for start in range(0, left.shape[1], _COLUMNS):
        end = min(start + _COLUMNS, left.shape[1])
        wrong = torch.empty_like(left[:, start:end])
        for column in range(start, end):
            exact = left[:, column, None]
            nearest = steps * (exact / steps).round().clamp(-_LARGEST, _LARGEST)
            rounded[:, column, None] = torch.where(largest[:, column, None], fixed[:, column, None], nearest)
            wrong[:, column - start] = (exact - rounded[:, column, None])[:, 0] / factors[column, column]
            left[:, column:end] -= wrong[:, column - start, None] * factors[column, column:end]
        left[:, end:] -= wrong @ factors[start:end, end:]
    restored = torch.empty_like(rounded)
    restored[:, order] = rounded
    return restored
