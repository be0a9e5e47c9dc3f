"""Metrics against hand-computed cases, recipes, targets, losses, augmentation, networks and export."""

from dataclasses import replace

import numpy as np
import openvino
import pytest
import torch

from cellseg_batch.engine.inference import decoders
from cellseg_batch.engine.reports.scores import ImageScore, summarise
from cellseg_batch.trainer import decode
from cellseg_batch.trainer.augment import Augmenter, Batch, flatten
from cellseg_batch.trainer.bundle import load_bundle, save_bundle
from cellseg_batch.trainer.card import DECODER_OUTPUTS, Instances, Normalisation
from cellseg_batch.trainer.data.sample import Annotation, Entry, Sample, instance_distance, make_sample, rescale
from cellseg_batch.trainer.decode import decode_instances
from cellseg_batch.trainer.encoders import ENCODERS, load_encoder_weights
from cellseg_batch.trainer.export import export_network
from cellseg_batch.trainer.footprint import measure_footprint
from cellseg_batch.trainer.heads import HEADS
from cellseg_batch.trainer.losses import CLASS_LOSSES, LOSSES, bce_loss, dice_loss, focal_loss, touching_border
from cellseg_batch.trainer.metrics import (
    PixelScore,
    aggregated_jaccard,
    average_precisions,
    competition_metric,
    instance_overlaps,
    majority_classes,
    matches,
    panoptic_quality,
    pixel_score,
)
from cellseg_batch.trainer.recipe import Recipe, list_presets, load_preset
from cellseg_batch.trainer.schedule import build_optimiser, learning_rate_at
from cellseg_batch.trainer.unet import ARCHITECTURES, build_network, load_network
from tests.support.networks import TINY


def test_pixel_figures_by_hand():
    score = pixel_score(np.array([[1, 1, 1, 0, 0]], bool), np.array([[1, 0, 0, 1, 0]], bool))
    assert score == PixelScore(tp=1, fp=2, fn=1, tn=1)
    figures = (score.dice, score.iou, score.accuracy, score.precision, score.recall)
    assert figures == pytest.approx((2 / 5, 1 / 4, 2 / 5, 1 / 3, 1 / 2))
    empty = np.zeros((2, 2), bool)
    assert pixel_score(empty, empty).dice == 1
    assert pixel_score(empty, ~empty).dice == 0
    assert (score + score).dice == score.dice
    assert (score + PixelScore(3, 0, 0, 0)).precision == 4 / 6


def test_instance_figures_by_hand():
    truth = np.array([[1, 1, 1, 1, 2, 2, 0, 0, 3]])
    predicted = np.array([[1, 1, 1, 0, 2, 2, 2, 2, 0]])
    overlaps = instance_overlaps(predicted, truth)
    np.testing.assert_allclose(overlaps.ious, [[0.75, 0, 0], [0, 0.5, 0]])
    assert matches(overlaps.ious, 0.5) == (1, 1, 2)
    # IoU 0.75 counts at 0.50, 0.55, 0.60, 0.65 and 0.70: 1 / (1 + 1 + 2) each.
    assert average_precisions(overlaps.ious) == (0.25,) * 5 + (0,) * 5
    assert competition_metric(overlaps.ious) == pytest.approx(0.125)
    # 3 of 4 pixels, 2 of 4, and one true pixel that nothing matches.
    assert aggregated_jaccard(overlaps) == pytest.approx(5 / 9)
    nothing = instance_overlaps(np.zeros((2, 2), int), np.zeros((2, 2), int))
    assert competition_metric(nothing.ious) == aggregated_jaccard(nothing) == panoptic_quality(nothing.ious) == 1
    # One match of IoU 0.75; F1 is 2 / (2 + 1 + 2).
    assert panoptic_quality(overlaps.ious) == pytest.approx(0.75 * 2 / 5)
    assert panoptic_quality(overlaps.ious[:0]) == 0


def test_an_instance_is_of_the_class_of_most_of_its_pixels():
    labels = np.array([[1, 1, 1, 2, 2, 3, 3, 4, 0]])
    classes = np.array([[2, 2, 1, 1, 2, 0, 0, 7, 1]])
    assert majority_classes(labels, classes, 2).tolist() == [2, 1, 0, 0]
    assert majority_classes(labels, 0 * classes, 2).tolist() == [0, 0, 0, 0]


def test_aggregated_jaccard_adds_what_nothing_claims():
    truth, predicted = np.array([[1, 1, 0, 0]]), np.array([[1, 1, 2, 2]])
    assert aggregated_jaccard(instance_overlaps(predicted, truth)) == 0.5
    assert aggregated_jaccard(instance_overlaps(np.zeros_like(truth), truth)) == 0


def test_every_preset_is_a_recipe():
    assert set(list_presets()) == {
        "classes",
        "nuclei",
        "s1-unet",
        "s1-unet-plus",
        "s2-mobilenetv2",
        "s3-unet",
        "s4-livecell-resnet34",
        "s5-transfer",
    }
    for name in list_presets():
        recipe = load_preset(name)
        assert recipe.name == name
        assert build_network(recipe.architecture)


def test_a_recipe_is_changed_field_by_field_and_checked(tmp_path):
    assert load_preset("s3-unet", width=8, name="mine").architecture == {
        **load_preset("s3-unet").architecture,
        "width": 8,
    }
    for changes in ({"network": "resnet"}, {"loss": "bce+iou"}, {"batch": 0}, {"zoom_min": 3.0, "zoom_max": 2.0}):
        with pytest.raises(ValueError, match=f"{next(iter(changes))}: expected"):
            load_preset("s3-unet", **changes)
    with pytest.raises(ValueError, match="there are classes"):
        load_preset("s9")
    (tmp_path / "mine.toml").write_text("width = 8\n")
    assert load_preset(str(tmp_path / "mine.toml")).name == "mine"
    (tmp_path / "mine.toml").write_text("wdth = 8\n")
    with pytest.raises(ValueError, match="wdth"):
        load_preset(str(tmp_path / "mine.toml"))
    (tmp_path / "mine.toml").write_text("width 8\n")
    with pytest.raises(ValueError, match="no TOML"):
        load_preset(str(tmp_path / "mine.toml"))


def test_distance_peaks_once_in_each_instance():
    labels = np.zeros((20, 20), np.int32)
    labels[2:9, 2:9], labels[2:9, 9:16] = 1, 2
    distance = instance_distance(labels)
    assert distance[5, 5] == distance[5, 12] == 1
    assert distance[5, 8] < 0.5
    assert distance[5, 9] < 0.5, "touching neighbours are kept apart"
    assert not distance[labels == 0].any()


def test_touching_border_lies_between_neighbours_only():
    labels = torch.zeros(1, 12, 12, dtype=torch.long)
    labels[0, 2:8, 1:5], labels[0, 2:8, 5:9] = 1, 2
    border = touching_border(labels)[0]
    assert border[4, 4]
    assert border[4, 5]
    assert not border[4, 1]
    assert not touching_border(labels.clamp(max=1)).any()


def test_losses_by_hand():
    z, target, once = torch.zeros(1, 1, 2), torch.tensor([[[1.0, 0.0]]]), torch.ones(1, 1, 2)
    assert bce_loss(z, target, once).item() == pytest.approx(np.log(2))
    assert bce_loss(z, target, 3 * once).item() == pytest.approx(3 * np.log(2))
    assert focal_loss(z, target, once).item() == pytest.approx(np.log(2) / 4)
    # Overlap 0.5, areas 1 and 1, one added above and below.
    assert dice_loss(z, target, once).item() == pytest.approx(1 - 2 / 3)


def test_losses_of_two_classes_are_those_of_a_foreground():
    """The softmax of (0, z) is the sigmoid of z."""
    generator = torch.Generator().manual_seed(2)
    z, target = torch.randn(2, 6, 6, generator=generator), torch.randint(0, 2, (2, 6, 6), generator=generator)
    both, once = torch.stack([torch.zeros_like(z), z], dim=1), torch.ones_like(z)
    for term in ("bce", "focal"):
        expected = LOSSES[term](z, target.float(), once).item()
        assert CLASS_LOSSES[term](both, target).item() == pytest.approx(expected, abs=1e-5)
    expected = (dice_loss(z, target.float(), once) + dice_loss(-z, 1 - target.float(), once)) / 2
    assert CLASS_LOSSES["dice"](both, target).item() == pytest.approx(expected.item())
    assert CLASS_LOSSES.keys() == LOSSES.keys()


def test_the_loss_is_the_sum_of_its_terms():
    labels = torch.zeros(1, 16, 16, dtype=torch.long)
    labels[0, 4:12, 4:12] = 1
    batch = Batch(torch.zeros(1, 3, 16, 16), labels, (labels > 0).float(), (labels > 0).long())
    logits = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    semantic, instance = HEADS["semantic"].loss, HEADS["instance"].loss
    parts = [semantic(logits, batch, (term,)) for term in ("bce", "dice", "focal")]
    assert semantic(logits, batch, ("bce", "dice", "focal")).item() == pytest.approx(float(sum(parts)))
    right = torch.where(labels > 0, 20.0, -20.0)[:, None]
    three = torch.cat([right, torch.full_like(right, -20.0), right], dim=1)
    assert instance(three, batch, ("bce", "dice")).item() < 1e-2
    assert instance(-three, batch, ("bce", "dice")).item() > 10


@pytest.mark.parametrize("downscale", [1, 2])
def test_touching_instances_are_told_apart_by_their_distance(downscale):
    y, x = np.indices((48, 96)) * 1.0
    distance = np.maximum(1 - np.hypot(y - 24, x - 30) / 18, 1 - np.hypot(y - 24, x - 64) / 18)
    logits = np.stack([20 * distance, np.full_like(distance, -9), 8 * distance - 4]).astype(np.float32)
    logits[:, 2:5, 2:5] = 9  # nine px, no object
    labels = decode_instances(logits, "seeds", 0.5, Instances(), downscale)
    assert labels.max() == 2
    assert labels[24, 30] != labels[24, 64]
    assert decode_instances(logits[:1], "mask", 0.5, Instances(), downscale).max() == 1


def test_learning_rates():
    cosine = Recipe("a", learning_rate=1.0, schedule="cosine", warmup=300, hold=0.5)
    assert learning_rate_at(0, 2000, cosine) < 0.01
    assert learning_rate_at(900, 2000, cosine) == 1
    assert learning_rate_at(1500, 2000, cosine) == pytest.approx(0.5)
    assert learning_rate_at(1999, 2000, cosine) < 0.001
    cycle = Recipe("a", learning_rate=1.0, schedule="one-cycle")
    assert learning_rate_at(0, 1000, cycle) == pytest.approx(0.04)
    assert learning_rate_at(300, 1000, cycle) == 1
    assert learning_rate_at(650, 1000, cycle) == pytest.approx(0.5)
    constant = Recipe("a", learning_rate=1.0, schedule="constant", warmup=10)
    assert [learning_rate_at(step, 100, constant) for step in (4, 9, 99)] == [0.5, 1, 1]


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_every_optimiser_goes_downhill(name):
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    optimiser = build_optimiser([weight], Recipe("a", optimiser=name, learning_rate=0.01))
    for _ in range(5):
        optimiser.zero_grad()
        (weight**2).sum().backward()
        optimiser.step()
    assert 0 < weight.item() < 1


def square_sample():
    labels = np.zeros((80, 100), np.int32)
    labels[20:60, 30:80] = 1
    pixels = np.repeat((labels > 0)[..., None], 3, axis=-1).astype(np.float32)
    return make_sample(Entry("a", "fluo", "", lambda: Annotation(pixels, labels)), Normalisation("fixed", (0,), (1,)))


@pytest.mark.parametrize("framing", ["crop", "resize"])
@pytest.mark.parametrize("augmentation", ["none", "flips", "full"])
def test_augmentation_moves_image_labels_and_distance_together(framing, augmentation):
    recipe = Recipe("a", framing=framing, augmentation=augmentation, size=64, zoom_min=0.5, zoom_max=2.0)
    augmenter = Augmenter(recipe, np.random.default_rng(3))
    for _ in range(10):
        warped, ids, distance, _ = augmenter._picture(square_sample(), plain=augmentation != "full")
        agree = ((warped[0] > 0.5) == (ids > 0)).float().mean()
        assert agree > 0.97
        assert not distance[ids == 0].any()


def test_augmentation_moves_classes_with_the_pixels_and_keeps_their_colours():
    labels = np.zeros((80, 100), np.int32)
    labels[10:40, 10:90], labels[45:75, 10:90] = 1, 2
    colours = np.array([(240, 240, 240), (150, 30, 30), (30, 30, 150)], np.uint8)
    sample = make_sample(
        Entry("a", "", "", lambda: Annotation(colours[labels], labels, labels)), Normalisation("fixed", (0,), (255,)), 2
    )
    for head in ("classes", "semantic"):
        batch = Augmenter(Recipe("a", head=head, size=64), np.random.default_rng(3)).batch([sample] * 80)
        assert torch.equal(batch.classes, batch.labels)
        alike = 0
        for pixels, classes in zip(batch.pixels, batch.classes, strict=True):
            if (classes == 1).any() and (classes == 2).any():
                red, blue = (pixels[:, classes == number].mean(dim=1) for number in (1, 2))
                alike += bool(abs((red - blue)[0] - (red - blue)[2]) < 0.003)
        assert alike == 0 if head == "classes" else alike > 5


def test_resize_shows_the_whole_image():
    recipe = Recipe("a", framing="resize", augmentation="none", size=64)
    _, ids, *_ = Augmenter(recipe, np.random.default_rng(0))._picture(square_sample(), plain=True)
    assert ids.float().mean().item() == pytest.approx(40 * 50 / 80 / 100, abs=0.02)


def test_a_generator_fixes_every_draw():
    recipe = Recipe("a", size=64)
    first, second = (Augmenter(recipe, np.random.default_rng(5)).batch([square_sample()] * 2) for _ in range(2))
    assert torch.equal(first.pixels, second.pixels)
    assert first.pixels.min() >= 0
    assert first.pixels.max() <= 1


@pytest.mark.parametrize("size", [32, 33, 64])
@pytest.mark.parametrize("side", [63, 64])
def test_plain_crops_lie_on_whole_pixels(size, side):
    ids = np.arange(1, side * side + 1, dtype=np.int32).reshape(side, side)
    sample = Sample(
        "a", "", ids.astype(np.float32)[..., None], (0.0, float(side * side)), ids, np.zeros_like(ids, np.uint8)
    )
    augmenter = Augmenter(Recipe("a", size=size, plain=1.0), np.random.default_rng(5))
    for _ in range(4):
        batch = augmenter.batch([sample])
        torch.testing.assert_close(batch.pixels[:, 0] * side * side, batch.labels.float(), atol=0.01, rtol=0)


def test_crops_reach_beyond_the_image_and_mirror_it():
    side = 64
    ids = np.arange(1, side * side + 1, dtype=np.int32).reshape(side, side)
    sample = Sample(
        "a", "", ids.astype(np.float32)[..., None], (0.0, float(side * side)), ids, np.zeros_like(ids, np.uint8)
    )
    augmenter = Augmenter(Recipe("a", size=side, augmentation="none"), np.random.default_rng(5))
    mirrored = np.pad(ids, side // 8, mode="symmetric")
    windows = {
        mirrored[y : y + side, x : x + side].tobytes() for y in range(side // 4 + 1) for x in range(side // 4 + 1)
    }
    crops = [augmenter.batch([sample]).labels[0].int().numpy() for _ in range(8)]
    assert all(crop.tobytes() in windows for crop in crops)
    assert any((crop != ids).any() for crop in crops)


def test_changed_crops_show_labels_where_their_pixels_are():
    # A ramp: were labels taken half a pixel beside the pixels, the mean difference would be half a step.
    side = 64
    ids = np.repeat(np.arange(1, side + 1, dtype=np.int32)[None], side, axis=0)
    sample = Sample("a", "", ids.astype(np.float32)[..., None], (0.0, float(side)), ids, np.zeros_like(ids, np.uint8))
    recipe = Recipe("a", size=32, zoom_min=1.5, zoom_max=1.5)
    pictures = [Augmenter(recipe, np.random.default_rng(seed))._picture(sample, plain=False) for seed in range(40)]
    offset = torch.stack([pixels[0] * side - labels for pixels, labels, *_ in pictures]).mean()
    assert abs(float(offset)) < 0.1


def test_flat_pictures_show_every_object_and_the_ground_in_its_mean_colour():
    pixels, labels = torch.rand(3, 6, 9), torch.tensor([0, 7, 2]).repeat(6, 3)
    flat = flatten(pixels, labels)
    for label in (0, 2, 7):
        of_it = labels == label
        torch.testing.assert_close(flat[:, of_it], pixels[:, of_it].mean(dim=1, keepdim=True).expand(3, 18))


def test_a_share_of_the_pictures_is_flat():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.repeat(rng.integers(0, 3, (8, 8), np.int32), 16, axis=0), 16, axis=1)
    sample = Sample("a", "", rng.random((128, 128, 1), np.float32), (0.0, 1.0), labels, np.zeros_like(labels, np.uint8))
    augmenter = Augmenter(Recipe("a", size=64, flat=0.5), rng)
    spreads = [augmenter._picture(sample, plain=False)[0].std() for _ in range(40)]
    assert 10 < sum(bool(spread < 0.1) for spread in spreads) < 30
    assert all(augmenter._picture(sample, plain=True)[0].std() > 0.2 for _ in range(5))


def test_a_share_of_the_pictures_shows_noise_alone():
    labels = np.ones((64, 64), np.int32)
    sample = Sample("a", "", np.ones((64, 64, 1), np.float32), (0.0, 1.0), labels, np.full_like(labels, 9, np.uint8))
    recipe = Recipe("a", size=64, plain=1.0, blank=0.5)
    batch = Augmenter(recipe, np.random.default_rng(0)).batch([sample] * 40)
    empty = ~(batch.labels > 0).any(dim=(1, 2))
    assert 10 < int(empty.sum()) < 30
    assert not batch.distance[empty].any()
    assert (batch.pixels[~empty] == 1).all()
    noise = batch.pixels[empty].flatten(1)
    assert (noise.amin(1) == 0).all()
    assert (noise.amax(1) == 1).all()
    assert (noise.std(1) > 0.01).all()


def test_networks_keep_the_size_of_their_input():
    assert build_network(TINY)(torch.zeros(2, 3, 48, 80)).shape == (2, 3, 48, 80)


def test_a_grey_network_sees_the_mean_of_the_channels():
    network = build_network({"name": "unet", "width": 4, "depth": 2, "grey": True}).eval()
    pixels = torch.rand(1, 3, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(network(pixels), network(pixels.mean(dim=1, keepdim=True).expand(1, 3, 8, 8)))


@pytest.mark.parametrize("factor", [2, 4])
def test_a_downscaled_network_sees_the_image_downscaled(tiny_bundle, factor):
    downscaled = tiny_bundle.downscaled(factor)
    small = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    large = small.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    with torch.inference_mode():
        expected = load_network(tiny_bundle)(small)
        given = load_network(downscaled)(large)
    assert given.shape[2:] == large.shape[2:]
    torch.testing.assert_close(
        torch.nn.functional.avg_pool2d(given, factor)[..., 1:-1, 1:-1],
        torch.nn.functional.avg_pool2d(
            torch.nn.functional.interpolate(expected, scale_factor=factor, mode="bilinear"), factor
        )[..., 1:-1, 1:-1],
    )
    measured = measure_footprint(build_network(downscaled.card.architecture))
    assert measured.total_stride == downscaled.card.total_stride
    assert measured.exact_margin <= downscaled.card.exact_margin
    assert tiny_bundle.downscaled(1) is tiny_bundle
    assert downscaled.sha256 != tiny_bundle.sha256


def test_a_model_can_be_cut_down_to_some_of_its_outputs(tiny_bundle):
    pixels = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = load_network(tiny_bundle)(pixels)[:, [2, 0]]
        given = load_network(tiny_bundle.with_outputs(("distance", "foreground")))(pixels)
    torch.testing.assert_close(given, expected)
    assert tiny_bundle.with_outputs(tiny_bundle.outputs) is tiny_bundle


def test_every_head_has_a_decoder_that_takes_its_outputs():
    assert all(DECODER_OUTPUTS[head.decoder] == head.outputs for head in HEADS.values())
    # What is not trained here is not scored here.
    assert decode.DECODERS.keys() | {"stardist"} == decoders.DECODERS.keys() == DECODER_OUTPUTS.keys()
    for name, decoder in decoders.DECODERS.items():
        assert set(decoder.mask_outputs) <= set(DECODER_OUTPUTS[name])


def test_classes_are_decoded_as_in_a_run():
    logits = np.random.default_rng(0).normal(0, 2, (4, 40, 50)).astype(np.float32)
    for threshold in (0.3, 0.5, 0.8):
        expected = decoders.DECODERS["classes"].mask(logits[None], threshold)[0]
        np.testing.assert_array_equal(decode.class_map(logits, threshold), expected)


def test_encoders_have_the_published_number_of_parameters():
    counts = {name: sum(one.numel() for one in ENCODERS[name]().parameters()) for name in ("resnet34", "mobilenetv2")}
    # torchvision: 21,797,672 and 3,504,872 with their classifiers of 513,000 and 1,281,000.
    assert counts == {"resnet34": 21_797_672 - 513_000, "mobilenetv2": 3_504_872 - 1_281_000}


@pytest.mark.parametrize("name", ["resnet34", "mobilenetv2"])
def test_encoder_weights_load_from_a_file_of_torchvisions_format(tmp_path, name):
    donor, encoder = ENCODERS[name](), ENCODERS[name]()
    classifier = {"fc.weight": torch.zeros(2), "classifier.1.bias": torch.zeros(2)}
    torch.save({**donor.state_dict(), **classifier}, tmp_path / "w.pth")
    load_encoder_weights(encoder, str(tmp_path / "w.pth"))
    assert all(torch.equal(value, donor.state_dict()[key]) for key, value in encoder.state_dict().items())
    with pytest.raises(FileNotFoundError, match="encoder_weights"):
        load_encoder_weights(encoder, str(tmp_path / "missing.pth"))
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="is not of"):
        load_encoder_weights(encoder, str(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    ("architecture", "millions", "stride"),
    [
        ({"name": "stem-unet", "width": 32, "depth": 4}, 1.94, 16),
        ({"name": "unet", "width": 64}, 31.0, 16),
        ({"name": "unet", "width": 16, "up": "bilinear"}, 1.8, 16),
        ({"name": "unet-plus", "width": 64}, 21.6, 16),
        ({"name": "unet-resnet34"}, 24.4, 32),
        ({"name": "unet-mobilenetv2"}, 5.56, 32),
    ],
)
def test_published_architectures_have_their_size(architecture, millions, stride):
    network = build_network(architecture).eval()
    assert sum(one.numel() for one in network.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    with torch.inference_mode():
        assert network(torch.zeros(1, 3, 2 * stride, 3 * stride)).shape[-2:] == (2 * stride, 3 * stride)


def score_of(name, pixels, ap, found, spurious, missed, seconds):
    return ImageScore(name, "k", pixels, (ap,) * 10, ap, ap, found, spurious, missed, 2.0, seconds, 1, {})


def test_summary_pools_instances_and_averages_images():
    perfect, half = PixelScore(10, 0, 0, 10), PixelScore(5, 5, 5, 5)
    summary = summarise([score_of("a", perfect, 0.8, 3, 0, 1, 1.0), score_of("b", half, 0.2, 1, 2, 0, 3.0)])
    assert summary.mean["dice"] == 0.75
    assert summary.pooled["dice"] == pytest.approx(30 / 40)
    assert summary.pooled["accuracy"] == pytest.approx(30 / 40)
    assert summary.competition == summary.aji == summary.pq == pytest.approx(0.5)
    assert summary.mpx_per_s == 1.0
    assert summary.f1 == pytest.approx(8 / (8 + 2 + 1))


def test_rescaled_samples_keep_their_instances():
    sample = square_sample()
    for factor in (0.5, 2.0):
        scaled = rescale(sample, factor)
        assert scaled.labels.shape == (80 * factor, 100 * factor)
        assert np.count_nonzero(scaled.labels) == np.count_nonzero(sample.labels) * factor**2
        assert scaled.pixels.shape == (*scaled.labels.shape, 3)
        assert scaled.pixels.max() == 1


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_an_exported_network_takes_any_batch_and_gives_the_same_logits(kind, tiny_model, tmp_path):
    bundle = load_bundle(tiny_model)
    export_network(bundle, kind, 32, tmp_path / "network")
    for count in (1, 5):
        pixels = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))
        with torch.inference_mode():
            expected = load_network(bundle)(pixels).numpy()
        if kind == "torch":
            given = torch.export.load(tmp_path / "network").module()(pixels).detach().numpy()
        else:
            (tmp_path / "network").replace(tmp_path / "network.onnx")
            exact = {"INFERENCE_PRECISION_HINT": "f32"}
            given = openvino.Core().compile_model(tmp_path / "network.onnx", "CPU", exact)(pixels.numpy())[0]
            (tmp_path / "network.onnx").replace(tmp_path / "network")
        np.testing.assert_allclose(given, expected, atol=1e-4)


def test_export_refuses_a_tile_that_does_not_fit(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="multiple"):
        export_network(load_bundle(tiny_model), "torch", 33, tmp_path / "network")
    with pytest.raises(ValueError, match="onnx"):
        export_network(load_bundle(tiny_model), "tflite", 32, tmp_path / "network")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_bundle_of_every_network_can_be_exported(name):
    small = {"width": 4} if "net" not in name[4:] and "mobilenet" not in name else {}
    network = build_network({"name": name, **small}).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(network, (torch.zeros(2, 3, 64, 64),), dynamic_shapes={"pixels": {0: batch}})
    with torch.inference_mode():
        assert program.module()(torch.zeros(3, 3, 64, 64)).shape[0] == 3


def test_weights_too_large_for_float16_are_stored_as_they_are(tiny_bundle, tmp_path):
    large = {name: array.astype(np.float32) for name, array in tiny_bundle.weights.items()}
    name = next(name for name in large if name.endswith("running_var"))
    large[name] = large[name] * np.float32(1e6)
    save_bundle(replace(tiny_bundle, weights=large), tmp_path)
    stored = load_bundle(tmp_path).weights
    np.testing.assert_array_equal(stored[name], large[name])
    assert {array.dtype.name for other, array in stored.items() if other != name} <= {"float16", "int64"}
