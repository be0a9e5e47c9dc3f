"""Convolution and ReLU in one kernel of cuDNN, which a plain one stands for here."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from cellseg_batch.engine.inference.backends.cudnn_fusion import ConvolutionReLU, fuse_relu
from cellseg_batch.engine.inference.backends.fold_layers import fold_batch_norm
from cellseg_batch.trainer.unet import build_network
from tests.support.networks import NETWORKS, trained


@pytest.fixture
def cudnn():
    """Gives the CPU the operator, with cuDNN's limits: no convolution of single channels. Returns its calls."""
    calls = []

    def convolution_relu(features, weight, bias, stride, padding, dilation, groups):
        if groups > 1:
            raise RuntimeError("GET was unable to find an engine to execute this computation")
        calls.append(tuple(weight.shape))
        return nn.functional.conv2d(features, weight, bias, stride, padding, dilation, groups).relu_()

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("cudnn_convolution_relu", convolution_relu, "CPU")
        yield calls


@pytest.mark.parametrize("architecture", [*(one for one, _ in NETWORKS), {"name": "unet-efficientnet-lite0"}], ids=str)
@torch.no_grad()
def test_a_fused_network_computes_the_same(cudnn, architecture):
    torch.manual_seed(0)
    plain = fold_batch_norm(trained(build_network(architecture)))
    fused = fuse_relu(copy.deepcopy(plain))
    count = sum(isinstance(module, ConvolutionReLU) for module in fused.modules())
    assert count == sum(isinstance(module, nn.Sequential) and _pairs(module) for module in plain.modules()) > 0
    pixels = torch.rand(1, 3, 64, 96)
    cudnn.clear()
    torch.testing.assert_close(fused(pixels), plain(pixels))
    assert len(cudnn) == count


def _pairs(sequence):
    """Number of convolutions, grouped ones aside, with a ReLU behind them."""
    layers = [layer for layer in sequence if not isinstance(layer, nn.Identity)]
    return sum(
        isinstance(first, nn.Conv2d) and first.groups == 1 and isinstance(second, nn.ReLU | nn.ReLU6)
        for first, second in pairwise(layers)
    )


@torch.no_grad()
def test_geometry_and_ceiling_are_kept(cudnn):
    layers = [nn.Conv2d(3, 8, 3, stride=2, padding=(0, 1), dilation=2), nn.ReLU6(), nn.Conv2d(8, 4, 1, bias=False)]
    plain = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(4, 2, 3, padding="same"), nn.ReLU())
    nn.init.normal_(plain[0].weight, 0, 5)
    fused = fuse_relu(copy.deepcopy(plain))
    assert [type(layer).__name__ for layer in fused] == [
        *("ConvolutionReLU", "Identity", "ConvolutionReLU", "Identity"),
        *("Conv2d", "ReLU"),  # its padding has no numbers
    ]
    pixels = torch.rand(2, 3, 40, 50)
    torch.testing.assert_close(fused(pixels), plain(pixels))
    assert fused[0](pixels).max() == 6


def test_without_cudnn_a_network_stays_as_it_is():
    network = fuse_relu(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
    assert isinstance(network[0], nn.Conv2d)
