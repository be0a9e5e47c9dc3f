"""Total stride and receptive field of a network, found by running it.

One input column is set to NaN and the outputs that turn NaN are those that can see it: a NaN survives
every convolution, normalisation, activation and pooling, whatever the weights.  So the footprint is
exact and holds for any network, phase by phase of its strides, without a table of layer types.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from cellseg_batch.trainer.receptive_field import Footprint, footprint_of

_LARGEST_STRIDE = 32
_SPANS = (512, 1024, 2048, 4096)


def measure_footprint(network: nn.Module, in_channels: int = 3) -> Footprint:
    """Measure the footprint of ``network`` along one axis (its layers are square).

    Args:
        network: takes (1, in_channels, H, W) for H, W multiples of 32.
        in_channels: channels of its input.

    Raises:
        ValueError: the receptive field is wider than 4096 px.
    """
    # Double precision keeps to direct convolutions; a Winograd one would smear the NaN over its transform tile.
    network = copy.deepcopy(network).double().eval()
    for span in _SPANS:
        columns = range(span // 2, span // 2 + _LARGEST_STRIDE)
        first, last = _sees(network, in_channels, span, columns[0])
        if first > _LARGEST_STRIDE and last < span - _LARGEST_STRIDE:
            break
    else:
        raise ValueError(f"the receptive field is wider than {_SPANS[-1]} px")
    reach = [_sees(network, in_channels, span, column) for column in columns]
    seen_by = [(first - column, last - column) for column, (first, last) in zip(columns, reach, strict=True)]
    stride = next(
        period
        for period in (2**power for power in range(_LARGEST_STRIDE.bit_length()))
        if all(seen_by[i] == seen_by[i % period] for i in range(_LARGEST_STRIDE))
    )
    return footprint_of(seen_by[:stride])


def _sees(network: nn.Module, in_channels: int, span: int, column: int) -> tuple[int, int]:
    """First and last output column that sees input ``column`` of a probe ``span`` px wide."""
    probe = torch.zeros(1, in_channels, _LARGEST_STRIDE, span, dtype=torch.float64)
    probe[..., column] = torch.nan
    with torch.inference_mode(), _PooledDepthwise():
        hit = torch.isnan(network(probe)).any(dim=(0, 1, 2)).nonzero().flatten()
    return int(hit[0]), int(hit[-1])


class _PooledDepthwise(TorchFunctionMode):
    """Takes means instead of depthwise convolutions: they see the same, and in double precision are far faster."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.conv2d and len(args) == 7:
            features, weight, _, stride, padding, dilation, groups = args
            if weight.shape[:2] == (groups, 1) and groups > 1 and tuple(dilation) == (1, 1):
                return F.avg_pool2d(features, tuple(weight.shape[2:]), stride, padding)
        return func(*args, **(kwargs or {}))
