"""What is done to a network before int8: it computes the same, its channels are alike, its weights lie on the steps."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from cellseg_batch.engine.inference.backends import int8_round as rounding
from cellseg_batch.engine.inference.backends.fold_layers import fold_batch_norm, fold_upsampling
from cellseg_batch.engine.inference.backends.int8_equalise import equalise
from cellseg_batch.engine.inference.backends.int8_round import outputs, patches, round_weights
from cellseg_batch.trainer.unet import build_network
from tests.support.networks import NETWORKS, trained

TILES = torch.rand((2, 3, 64, 96), generator=torch.Generator().manual_seed(1)).split(1)


@pytest.mark.parametrize("architecture", [one for one, _ in NETWORKS], ids=str)
@torch.inference_mode()
def test_an_equalised_network_gives_the_same_logits(architecture):
    network = fold_upsampling(fold_batch_norm(trained(build_network(architecture))))
    expected = network(TILES[0])
    equalised = equalise(copy.deepcopy(network), TILES)
    torch.testing.assert_close(equalised(TILES[0]), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    if architecture["name"] == "stem-unet":
        weights = zip(equalised.state_dict().items(), network.state_dict().values(), strict=True)
        assert {name for (name, ours), before in weights if torch.equal(ours, before)} == {"head.bias"}


@pytest.mark.parametrize("architecture", [one for one, _ in NETWORKS], ids=str)
@torch.inference_mode()
def test_rounding_changes_little(architecture, monkeypatch):
    monkeypatch.setattr(rounding, "_WIDEST", 1000)  # wider ones take seconds each
    network = fold_upsampling(fold_batch_norm(trained(build_network(architecture))))
    expected = network(TILES[0])
    wrong = round_weights(network, TILES)(TILES[0]) - expected
    assert 0 < float(wrong.square().mean().sqrt()) < 0.02 * float(expected.std())


@torch.inference_mode()
def test_a_network_that_shows_nothing_is_left_as_it_is():
    network = chain(3, 8, 8, 1)
    network[0].bias.fill_(-1e9)
    expected = network(TILES[0])
    round_weights(equalise(network, TILES), TILES)
    assert all(torch.isfinite(weights).all() for weights in network.parameters())
    torch.testing.assert_close(network(TILES[0]), expected)


def chain(*channels, ends=()):
    """3x3 convolutions with ReLUs between, of random weights."""
    generator = torch.Generator().manual_seed(0)
    layers = []
    for before, after in pairwise(channels):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
        nn.init.normal_(layers[-2].weight, 0, (2 / 9 / before) ** 0.5, generator=generator)
        nn.init.constant_(layers[-2].bias, 0.1)
    return nn.Sequential(*layers[:-1], *ends).eval()


@torch.inference_mode()
def test_a_channel_a_hundred_times_as_bright_is_brought_near_the_others():
    network = chain(3, 8, 8)
    network[0].weight[5] *= 100
    network[2].weight[:, 5] /= 100

    def spread(one):
        most = one[:2](TILES[0]).amax((0, 2, 3))
        return float(most.max() / most.median())

    before = spread(network)
    assert before > 20
    assert spread(equalise(network, TILES)) < before / 5


@torch.inference_mode()
def test_features_that_something_else_looks_at_stay_as_they_are():
    network = chain(3, 8, 8, ends=[nn.ReLU(), nn.Sigmoid(), nn.Conv2d(8, 1, 1)])
    expected = network[:4](TILES[0])
    torch.testing.assert_close(equalise(network, TILES)[:4](TILES[0]), expected)


@pytest.mark.parametrize(
    "middle",
    [
        nn.Conv2d(24, 6, 3, padding=1),
        nn.Conv2d(24, 6, 4, stride=2, padding=1),
        nn.ConvTranspose2d(24, 6, 4, stride=2, padding=1),
        nn.ConvTranspose2d(24, 6, 2, stride=2),
    ],
    ids=str,
)
@torch.inference_mode()
def test_rounded_weights_lie_on_the_steps_and_change_the_features_less_than_the_nearest_would(middle):
    torch.manual_seed(0)
    nn.init.normal_(middle.weight)
    network = nn.Sequential(chain(3, 24), nn.Sigmoid(), middle, nn.Conv2d(6, 1, 1))
    features, weights = network[:2](TILES[0]), middle.weight.clone()
    expected, ends = middle(features), [network[0][0].weight.clone(), network[3].weight.clone()]
    round_weights(network, TILES)
    torch.testing.assert_close(network[0][0].weight, ends[0], rtol=0, atol=0)
    torch.testing.assert_close(network[3].weight, ends[1], rtol=0, atol=0)

    axes = (0, 2, 3) if isinstance(middle, nn.ConvTranspose2d) else (1, 2, 3)
    steps = weights.abs().amax(axes, keepdim=True) / 127
    whole = middle.weight / steps
    assert torch.equal(whole.abs().amax(axes).round(), torch.full((6,), 127.0))
    torch.testing.assert_close(whole, whole.round(), rtol=0, atol=1e-3)

    wrong = (middle(features) - expected).square().mean()
    middle.weight.copy_(steps * (weights / steps).round())
    assert wrong < 0.5 * (middle(features) - expected).square().mean()


@pytest.mark.parametrize(("size", "padding"), [(4, 1), (2, 0)])
@torch.inference_mode()
def test_the_patches_of_a_transposed_convolution_are_what_its_outputs_are_made_of(size, padding):
    convolution = nn.ConvTranspose2d(3, 5, size, stride=2, padding=padding, bias=False)
    features = TILES[0][:, :, :9, :7]
    weights = convolution.weight.transpose(0, 1).flatten(1)
    seen = patches(convolution, features)
    phases = [(weights[:, columns] @ seen[rows]).view(5, 9, 7) for columns, rows in outputs(convolution)]
    made = torch.stack(phases).view(2, 2, 5, 9, 7).permute(2, 3, 0, 4, 1).reshape(1, 5, 18, 14)
    torch.testing.assert_close(made, convolution(features))


@torch.inference_mode()
def test_of_a_large_tile_the_same_places_are_looked_at_each_time(monkeypatch):
    convolution = nn.Conv2d(3, 5, 3, padding=1)
    every = patches(convolution, TILES[0])
    monkeypatch.setattr(rounding, "_MAX_SAMPLED", 27 * 100)
    some = patches(convolution, TILES[0])
    assert some.shape == (27, 100)
    assert torch.equal(some, patches(convolution, TILES[0]))
    assert {tuple(one) for one in some.T.tolist()} <= {tuple(one) for one in every.T.tolist()}
