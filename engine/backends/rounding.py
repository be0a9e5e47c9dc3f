"""Rounds a network's weights to what int8 can hold, so that its features change as little as possible.

Runs in torch, before a network is quantised.  Nothing here knows which backend quantises it.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Convolution = nn.Conv2d | nn.ConvTranspose2d

_LARGEST = 127  # of a symmetric int8
_PLACES = 40_000  # of a tile at which a convolution's input is looked at
_DAMPING = 0.01  # of the mean, added to the diagonal so that it can be inverted
_WIDEST = 4096  # weights of an output, above which their products take too long to factorise
_COLUMNS = 128  # that are rounded before the others learn of it


def round_weights(network: nn.Module, tiles: Iterable[Tensor]) -> nn.Module:
    """Round the weights of all convolutions but the first and the last to int8's steps, in place; returns ``network``.

    Each output channel has steps of a 127th of its largest weight, which stays what it is, so that whoever quantises it
    by its largest weight finds the same steps.  Weights are rounded one after the other, and what one gets wrong the
    rest make good as far as the features, as they come in tiles, let them (Frantar et al. 2022, arXiv:2210.17323).
    Convolutions of several groups and very wide ones are left alone.

    Args:
        network: in evaluation mode, batch norms folded.
        tiles: (1, C, H, W) on which features are looked at.
    """
    order: list[Convolution] = []
    products: dict[Convolution, Tensor] = {}

    def look(convolution: Convolution, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        if convolution not in order:
            order.append(convolution)
        if convolution.groups == 1 and len(seen := _patches(convolution, inputs[0])) <= _WIDEST:
            products[convolution] = products.get(convolution, 0) + seen @ seen.T

    hooks = [one.register_forward_hook(look) for one in network.modules() if isinstance(one, Convolution)]
    with torch.no_grad():
        for tile in tiles:
            network(tile)
        for hook in hooks:
            hook.remove()
        for convolution in order[1:-1]:
            if convolution in products:
                _round(convolution, products[convolution].double())
    return network


def _patches(convolution: Convolution, features: Tensor) -> Tensor:
    """What the outputs look at in features (1, C, H, W), one output a column: (C * window, places)."""
    if isinstance(convolution, nn.ConvTranspose2d):
        reach = _reach(convolution)
        seen = F.unfold(features, 2 * reach + 1, padding=reach)[0]
    else:
        padding = tuple(int(side) for side in convolution.padding)
        seen = F.unfold(features, convolution.kernel_size, padding=padding, stride=convolution.stride)[0]
    if seen.shape[1] <= _PLACES:
        return seen
    # Always the same ones, so that the same weights come out.
    return seen[:, torch.randint(0, seen.shape[1], (_PLACES,), generator=torch.Generator().manual_seed(0))]


def _round(convolution: Convolution, products: Tensor) -> None:
    if isinstance(convolution, nn.ConvTranspose2d):
        ordered, outputs = convolution.weight.transpose(0, 1), _outputs(convolution)
    else:
        everything = torch.arange(len(products))
        ordered, outputs = convolution.weight, [(everything, everything)]
    weights = ordered.double().flatten(1)
    steps = weights.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / _LARGEST
    rounded = torch.empty_like(weights)
    for columns, seen in outputs:
        rounded[:, columns] = _compensated(weights[:, columns], products[seen][:, seen], steps)
    largest = weights.abs().argmax(1, keepdim=True)
    rounded.scatter_(1, largest, weights.gather(1, largest))
    ordered.copy_(rounded.view_as(ordered))


def _taps(convolution: nn.ConvTranspose2d) -> list[list[tuple[int, int]]]:
    """Along one axis, of each output within a stride: its taps, and how many px from its own place they look."""
    (size, _), (stride, _), padding = convolution.kernel_size, convolution.stride, int(convolution.padding[0])
    return [
        [(tap, away // stride) for tap in range(size) if (away := phase + padding - tap) % stride == 0]
        for phase in range(stride)
    ]


def _reach(convolution: nn.ConvTranspose2d) -> int:
    """How many px around its own place an output of a transposed convolution looks at."""
    return max(abs(away) for taps in _taps(convolution) for _, away in taps)


def _outputs(convolution: nn.ConvTranspose2d) -> list[tuple[Tensor, Tensor]]:
    """Of each output within a stride: the columns of its weights (C * taps) and the rows of the patches they meet."""
    size, reach = convolution.kernel_size[0], _reach(convolution)
    window = 2 * reach + 1
    channels = torch.arange(convolution.in_channels)[:, None]
    found = []
    for rows, columns in product(_taps(convolution), repeat=2):
        both = list(product(rows, columns))
        taps = torch.tensor([y * size + x for (y, _), (x, _) in both])
        seen = torch.tensor([(reach + y) * window + reach + x for (_, y), (_, x) in both])
        found.append(((channels * size**2 + taps).flatten(), (channels * window**2 + seen).flatten()))
    return found


def _compensated(weights: Tensor, products: Tensor, steps: Tensor) -> Tensor:
    """Weights (outputs, K) rounded to ``steps`` (outputs, 1), given sums of the inputs' products (K, K)."""
    damped = products + _DAMPING * products.diagonal().mean() * torch.eye(len(products), dtype=products.dtype)
    # What is seen most is rounded first, when all others can still make it good.
    order = damped.diagonal().argsort(descending=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped[order][:, order]))
    factors = torch.linalg.cholesky(inverse, upper=True)
    left = weights[:, order].clone()
    rounded = torch.empty_like(left)
    for start in range(0, left.shape[1], _COLUMNS):
        end = min(start + _COLUMNS, left.shape[1])
        wrong = torch.empty_like(left[:, start:end])
        for column in range(start, end):
            exact = left[:, column, None]
            rounded[:, column, None] = steps * (exact / steps).round().clamp(-_LARGEST, _LARGEST)
            wrong[:, column - start] = (exact - rounded[:, column, None])[:, 0] / factors[column, column]
            left[:, column:end] -= wrong[:, column - start, None] * factors[column, column:end]
        left[:, end:] -= wrong @ factors[start:end, end:]
    restored = torch.empty_like(rounded)
    restored[:, order] = rounded
    return restored
