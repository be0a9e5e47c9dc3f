"""A folded network computes what the plain one does."""

import pytest
import torch
from torch import nn

from cellseg_batch.engine.inference.backends.fold_layers import fold_batch_norm, fold_upsampling, plain_clamps
from cellseg_batch.engine.models import build_torch_network, load_model
from cellseg_batch.trainer.blocks import Merge, conv_block
from cellseg_batch.trainer.unet import build_network
from tests.support.networks import NETWORKS, trained


def merges(network):
    return sum(isinstance(module, Merge) for module in network.modules())


@pytest.mark.parametrize(("architecture", "folded"), NETWORKS, ids=lambda value: str(value))
def test_a_folded_network_gives_the_same_logits(architecture, folded):
    network = trained(build_network(architecture))
    pixels = torch.rand((2, 3, 64, 96), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, before = network(pixels), merges(network)
        logits = plain_clamps(fold_upsampling(fold_batch_norm(network)))(pixels)
    assert before - merges(network) == folded
    # Also along the edges, where the padding of the two convolutions differs.
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_the_shipped_network_folds_at_any_downscale():
    pixels = torch.rand((1, 3, 128, 64), generator=torch.Generator().manual_seed(1))
    for factor in (1, 2):
        network = build_torch_network(load_model("nuclei").downscaled(factor))
        with torch.inference_mode():
            expected = network(pixels)
            logits = plain_clamps(fold_upsampling(fold_batch_norm(network)))(pixels)
        assert merges(network) == 0
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_bias_between_the_two_is_not_folded():
    network = nn.Sequential(Merge(nn.ConvTranspose2d(8, 4, 2, stride=2), conv_block(4, 4, 1)))
    assert merges(fold_upsampling(fold_batch_norm(network.eval()))) == 1
