"""Metrics against hand-computed cases, targets, augmentation and a short training run."""

import csv
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from skimage.io import imsave

from cellseg_batch.trainer.augment import Augmenter
from cellseg_batch.trainer.bundle import Normalisation, load_bundle
from cellseg_batch.trainer.data.dataset import load_dataset
from cellseg_batch.trainer.data.sample import Entry, instance_distance, make_sample
from cellseg_batch.trainer.encoders import ENCODERS, load_encoder_weights
from cellseg_batch.trainer.evaluate import ImageScore, summarise
from cellseg_batch.trainer.losses import touching_border
from cellseg_batch.trainer.metrics import competition_metric, instance_ious, matches, pixel_score
from cellseg_batch.trainer.train import TrainSettings, learning_rate_at, train
from cellseg_batch.trainer.unet import build_network
from tests.conftest import TINY, blobs


def test_pixel_score_by_hand():
    predicted = np.array([[1, 1, 0, 0]], bool)
    truth = np.array([[1, 0, 1, 0]], bool)
    assert asdict(pixel_score(predicted, truth)) == pytest.approx({"dice": 0.5, "iou": 1 / 3, "accuracy": 0.5})
    empty = np.zeros((2, 2), bool)
    assert pixel_score(empty, empty).dice == 1
    assert pixel_score(empty, ~empty).dice == 0


def test_instance_metrics_by_hand():
    truth = np.array([[1, 1, 1, 1, 2, 2, 0, 0, 3]])
    predicted = np.array([[1, 1, 1, 0, 2, 2, 2, 2, 0]])
    ious = instance_ious(predicted, truth)
    np.testing.assert_allclose(ious, [[0.75, 0, 0], [0, 0.5, 0]])
    assert matches(ious, 0.5) == (1, 1, 2)
    # IoU 0.75 counts at 0.50, 0.55, 0.60, 0.65 and 0.70: five times 1 / (1 + 1 + 2), out of ten.
    assert competition_metric(ious) == pytest.approx(5 * 0.25 / 10)
    assert competition_metric(instance_ious(np.zeros((2, 2), int), np.zeros((2, 2), int))) == 1


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


def test_augmentation_moves_image_labels_and_distance_together():
    labels = np.zeros((80, 100), np.int32)
    labels[20:60, 30:80] = 1
    pixels = np.repeat((labels > 0)[..., None], 3, axis=-1).astype(np.float32)
    sample = make_sample(Entry("a", "fluo", "", lambda: (pixels, labels)), Normalisation("fixed", 0, 1))
    augmenter = Augmenter(64, (0.5, 2.0), seed=3)
    for _ in range(20):
        warped, ids, distance = augmenter._crop(sample)
        agree = ((warped[0] > 0.5) == (ids > 0)).float().mean()
        assert agree > 0.97
        assert not distance[ids == 0].any()
    first, second = (Augmenter(64, (0.5, 2.0), seed=5).batch([sample] * 2) for _ in range(2))
    assert torch.equal(first.pixels, second.pixels), "a seed fixes every draw"
    assert first.pixels.min() >= 0
    assert first.pixels.max() <= 1


def test_learning_rate_warms_up_stays_and_falls():
    settings = TrainSettings(steps=2000, learning_rate=1.0)
    assert learning_rate_at(0, settings) < 0.01
    assert learning_rate_at(900, settings) == 1
    assert learning_rate_at(1500, settings) == pytest.approx(0.5)
    assert learning_rate_at(1999, settings) < 0.001


@pytest.fixture
def dataset(tmp_path):
    """Eight small images with instance maps in the layout that the trainer reads."""
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    rows = []
    for number in range(8):
        image = blobs(70, 90, 1, seed=number)[0]
        imsave(tmp_path / "images" / f"{number}.png", image, check_contrast=False)
        labels = (image > 120).astype(np.uint16)
        imsave(tmp_path / "labels" / f"{number}.png", labels, check_contrast=False)
        rows.append({"id": number, "split": "val" if number < 2 else "train", "group": "fluo"})
    with open(tmp_path / "index.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, ["id", "split", "group"])
        writer.writeheader()
        writer.writerows(rows)
    return tmp_path


def test_a_short_training_writes_a_bundle_that_the_engine_runs(dataset, tmp_path, segment):
    reports = []
    settings = TrainSettings(name="smoke", width=4, steps=6, batch=2, crop=64, score_every=3)
    train(dataset, tmp_path / "bundle", settings, reports.append)
    assert [report.step for report in reports] == [3, 6]
    bundle = load_bundle(tmp_path / "bundle")
    assert bundle.card.total_stride == 16
    assert bundle.card.exact_margin == 96
    assert all(array.dtype == np.float16 for name, array in bundle.weights.items() if "num_batches" not in name)
    report = segment(dataset / "images" / "0.png", model=str(tmp_path / "bundle"), tile=256)
    assert report.status == "done", report.slides[0].reason


def test_samples_follow_the_index(dataset):
    samples = load_dataset(dataset, Normalisation()).splits["val"]
    assert [sample.name for sample in samples] == ["0", "1"]
    assert samples[0].pixels.shape == (70, 90, 3)
    assert samples[0].pixels.max() == 1


def test_networks_keep_the_size_of_their_input():
    assert build_network(TINY)(torch.zeros(2, 3, 48, 80)).shape == (2, 3, 48, 80)


def test_encoders_have_the_published_number_of_parameters():
    counts = {name: sum(one.numel() for one in encoder().parameters()) for name, encoder in ENCODERS.items()}
    # torchvision: 21,797,672 and 3,504,872 with their classifiers of 513,000 and 1,281,000.
    assert counts == {"resnet34": 21_797_672 - 513_000, "mobilenetv2": 3_504_872 - 1_281_000}


@pytest.mark.parametrize("name", ["resnet34", "mobilenetv2"])
def test_encoder_weights_load_from_a_file_of_torchvisions_format(tmp_path, name):
    donor, encoder = ENCODERS[name](), ENCODERS[name]()
    classifier = {"fc.weight": torch.zeros(2), "classifier.1.bias": torch.zeros(2)}
    torch.save({**donor.state_dict(), **classifier}, tmp_path / "w.pth")
    load_encoder_weights(encoder, name, str(tmp_path / "w.pth"))
    assert all(torch.equal(value, donor.state_dict()[key]) for key, value in encoder.state_dict().items())
    with pytest.raises(FileNotFoundError, match="encoder-weights"):
        load_encoder_weights(encoder, name, str(tmp_path / "missing.pth"))
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(RuntimeError):
        load_encoder_weights(encoder, name, str(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    ("architecture", "millions", "stride"),
    [
        ({"name": "stem-unet", "width": 32, "depth": 4}, 1.94, 16),
        ({"name": "unet", "width": 64}, 31.0, 16),
        ({"name": "unet", "width": 16, "up": "bilinear"}, 1.8, 16),
        ({"name": "encoder-unet", "encoder": "resnet34"}, 24.4, 32),
        ({"name": "encoder-unet", "encoder": "mobilenetv2"}, 5.56, 32),
    ],
)
def test_published_architectures_have_their_size(architecture, millions, stride):
    network = build_network(architecture).eval()
    assert sum(one.numel() for one in network.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    with torch.inference_mode():
        assert network(torch.zeros(1, 3, 2 * stride, 3 * stride)).shape[-2:] == (2 * stride, 3 * stride)


def test_train_and_evaluate_commands(dataset, tmp_path, command):
    arguments = ["--out", tmp_path / "b", "--steps", 4, "--score-every", 2, "--batch", 2, "--crop", 64, "--width", 4]
    code, output = command("train", dataset, *arguments)
    assert code == 0, output
    assert "step 4/4" in output
    code, output = command("train", dataset, *arguments, "--fine-tune", tmp_path / "b")
    assert code == 0, output
    code, output = command("evaluate", tmp_path / "b", dataset, "--json", tmp_path / "e.json")
    assert code == 0, output
    result = json.loads((tmp_path / "e.json").read_text())[str(tmp_path / "b")]
    assert result["summary"]["all"]["images"] == len(result["images"]) == 2
    assert command("evaluate", tmp_path / "b", tmp_path / "nowhere")[0] == 2
    assert command("evaluate", dataset)[0] == 2
    assert command("train", dataset, *arguments, "--fine-tune", "nuclei")[0] == 2


def test_summary_pools_instances_and_averages_images():
    rows = [
        ImageScore("a", "k", 1.0, 1.0, 1.0, 0.8, found=3, spurious=0, missed=1, megapixels=2.0, seconds=1.0),
        ImageScore("b", "k", 0.5, 0.4, 0.9, 0.2, found=1, spurious=2, missed=0, megapixels=2.0, seconds=3.0),
    ]
    summary = summarise(rows)
    assert (summary.dice, summary.metric, summary.mpx_per_s) == (0.75, pytest.approx(0.5), 1.0)
    assert summary.f1 == pytest.approx(8 / (8 + 2 + 1))
