"""Whole training runs, small: what they leave behind, how they stop and how they go on."""

import csv
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from skimage.io import imsave

from cellseg_batch.trainer import train as training
from cellseg_batch.trainer.bundle import load_bundle
from cellseg_batch.trainer.card import Normalisation
from cellseg_batch.trainer.checkpoint import load_checkpoint
from cellseg_batch.trainer.data.dataset import load_dataset
from cellseg_batch.trainer.heads import HEADS
from cellseg_batch.trainer.recipe import Recipe
from cellseg_batch.trainer.train import train
from cellseg_batch.trainer.validate import Validation
from tests.support.images import blobs

SMALL = {"width": 4, "depth": 2, "size": 32, "batch": 2, "epoch_steps": 3, "epochs": 2, "warmup": 1, "dropout": 0.2}
FILES = ["card.json", "checkpoint.pt", "curves.png", "log.csv", "pictures.png", "weights.safetensors"]


def flags(**fields):
    return [part for name, value in fields.items() for part in (f"--{name.replace('_', '-')}", value)]


class Watch:
    """Remembers what a training run told."""

    def __init__(self):
        self.problems, self.steps, self.epochs, self.done = [], [], [], None

    def planned(self, dataset, steps, done, batch):
        self.problems, self.done = dataset.problems, done

    def stepped(self, step, loss):
        self.steps.append(step)

    def scored(self, epoch):
        self.epochs.append(epoch)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Eight small images with instance maps in the layout of a folder pair; one has no labels."""
    folder = tmp_path_factory.mktemp("data")
    for part in ("images", "labels"):
        (folder / part).mkdir()
    rows = []
    for number in range(9):
        image = blobs(70, 90, 1, seed=number)[0]
        imsave(folder / "images" / f"{number}.png", image, check_contrast=False)
        if number < 8:
            imsave(folder / "labels" / f"{number}.png", (image > 120).astype(np.uint16), check_contrast=False)
        rows.append({"id": number, "split": "val" if number < 2 else "train", "group": "fluo"})
    with open(folder / "index.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, ["id", "split", "group"])
        writer.writeheader()
        writer.writerows(rows)
    return folder


def test_samples_follow_the_index(dataset):
    loaded = load_dataset(dataset, Normalisation())
    samples = loaded.splits["val"]
    assert [sample.name for sample in samples] == loaded.names["val"] == ["0", "1"]
    assert samples[0].pixels.shape == (70, 90, 3)
    assert samples[0].pixels.max() == 1
    assert [problem.file for problem in loaded.problems] == ["8"]


def test_a_run_writes_a_bundle_that_the_engine_runs(dataset, tmp_path, segment):
    watch = Watch()
    bundle = train(dataset, tmp_path / "b", Recipe("smoke", network="stem-unet", head="instance", **SMALL), watch)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == FILES
    assert watch.steps == [1, 2, 3, 4, 5, 6]
    assert [epoch.step for epoch in watch.epochs] == [3, 6]
    assert [problem.file for problem in watch.problems] == ["8"]
    assert bundle.outputs == ("foreground", "border", "distance")
    assert bundle.card.total_stride == 4
    assert bundle.card.training["width"] == 4
    with open(tmp_path / "b" / "log.csv", newline="") as stream:
        assert [row["step"] for row in csv.DictReader(stream)] == ["3", "6"]
    stored = load_bundle(tmp_path / "b")
    assert all(array.dtype == np.float16 for name, array in stored.weights.items() if "num_batches" not in name)
    report = segment(dataset / "images" / "0.png", model=str(tmp_path / "b"), tile=256)
    assert report.status == "done", report.slides[0].reason


def test_the_best_weights_are_kept_and_patience_ends_a_run(dataset, tmp_path, monkeypatch):
    dice = iter([0.3, 0.9, 0.5, 0.6, 0.95])
    monkeypatch.setattr(training, "validate", lambda *_: Validation(1.0, next(dice), 0.5, np.nan))
    watch = Watch()
    bundle = train(dataset, tmp_path / "b", Recipe("a", **{**SMALL, "epochs": 9}, patience=2), watch)
    assert [epoch.best for epoch in watch.epochs] == [True, True, False, False]
    assert bundle.card.training["step"] == 6
    assert bundle.card.metrics["dice"] == 0.9


def test_a_loss_that_is_not_finite_keeps_the_last_good_bundle(dataset, tmp_path, monkeypatch, command):
    honest, calls = HEADS["semantic"], []

    def poisoned(logits, *arguments):
        if logits.requires_grad:  # a training step, not the scoring after it
            calls.append(1)
        return honest.loss(logits, *arguments) * (torch.nan if len(calls) > 4 else 1)

    monkeypatch.setitem(HEADS, "semantic", replace(honest, loss=poisoned))
    arguments = ["train", dataset, "--preset", "s3-unet", "--out", tmp_path / "b", *flags(**SMALL)]
    code, output = command(*arguments)
    assert code == 1
    assert "nan at step 5" in output
    assert load_checkpoint(tmp_path / "b").step == 3
    assert load_bundle(tmp_path / "b").card.training["step"] == 3


RESUME = {**SMALL, "epochs": 12, "averaging": 0.9, "precision": "fp32", "optimiser": "adamw", "seed": 7}


def test_kill_9_and_resume_give_the_weights_of_an_undisturbed_run(dataset, tmp_path, command):
    arguments = ["train", dataset, "--preset", "s3-unet", "--threads", 1, *flags(**RESUME)]
    assert command(*arguments, "--out", tmp_path / "whole")[0] == 0
    program = [
        sys.executable,
        "-m",
        "cellseg_batch.engine.cli.main",
        *map(str, arguments),
        "--out",
        str(tmp_path / "cut"),
    ]
    run = subprocess.Popen(program, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "cut" / "log.csv").exists():
        assert time.monotonic() < deadline
        assert run.poll() is None
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert 0 < load_checkpoint(tmp_path / "cut").step < 36
    assert command(*arguments, "--out", tmp_path / "cut")[0] == 2, "an unfinished run is not overwritten"
    code, output = command(*arguments, "--out", tmp_path / "cut", "--resume")
    assert code == 0, output
    whole, cut = (load_checkpoint(tmp_path / name) for name in ("whole", "cut"))
    for part in ("network", "averaged"):
        for name, value in getattr(whole, part).items():
            assert torch.equal(value, getattr(cut, part)[name]), name
    assert load_bundle(tmp_path / "whole").sha256 == load_bundle(tmp_path / "cut").sha256


def test_resume_refuses_another_recipe_or_nothing(dataset, tmp_path, command):
    arguments = ["train", dataset, "--preset", "s3-unet", "--out", tmp_path / "b", *flags(**SMALL)]
    code, output = command(*arguments, "--resume")
    assert code == 2
    assert "no checkpoint" in output
    assert command(*arguments, "--max-steps", 3)[0] == 0
    code, output = command(*arguments, "--max-steps", 3, "--resume", "--learning-rate", 0.5)
    assert code == 2
    assert "--learning-rate was 0.001, is 0.5" in output
    (tmp_path / "b" / "checkpoint.pt").write_bytes(b"not a checkpoint")
    code, output = command(*arguments, "--max-steps", 3, "--resume")
    assert code == 2
    assert "damaged" in output


def test_crops_are_whole_strides_of_the_network(dataset, tmp_path, command):
    arguments = ["--preset", "s3-unet", *flags(**{**SMALL, "framing": "crop", "size": 99})]
    code, output = command("train", dataset, "--out", tmp_path / "b", *arguments)
    assert code == 2
    assert "error --size: expected a multiple of the network's total stride, " in output
    assert "found 99" in output
    assert not (tmp_path / "b").exists()


def test_a_resumed_run_may_be_longer_or_bring_its_learning_rate_down(dataset, tmp_path):
    recipe = Recipe("a", **{**SMALL, "averaging": 0.9}, hold=1.0, learning_rate=0.01)
    train(dataset, tmp_path / "b", recipe, Watch())
    watch = Watch()
    train(dataset, tmp_path / "b", replace(recipe, epochs=4, epoch_steps=3, hold=0.5), watch, resume=True)
    assert watch.done == 6
    assert watch.steps == [7, 8, 9, 10, 11, 12]
    rates = [row["learning_rate"] for row in load_checkpoint(tmp_path / "b").history]
    assert rates[0] == rates[1] == 0.01
    assert 0 < rates[3] < rates[2] < 0.01
    assert load_checkpoint(tmp_path / "b").steps == 12
    assert load_checkpoint(tmp_path / "b").recipe["epochs"] == 4


def test_fine_tuning_starts_from_the_bundle_and_wants_its_architecture(dataset, tmp_path, command):
    arguments = ["train", dataset, "--preset", "s3-unet", *flags(**SMALL)]
    assert command(*arguments, "--out", tmp_path / "a")[0] == 0
    still = flags(learning_rate=0, max_steps=1)
    assert command(*arguments, *still, "--out", tmp_path / "b", "--fine-tune", tmp_path / "a")[0] == 0
    first, second = (load_bundle(tmp_path / name).weights["head.weight"] for name in "ab")
    np.testing.assert_array_equal(first, second)
    code, output = command(*arguments, "--out", tmp_path / "c", "--fine-tune", "nuclei")
    assert code == 2
    assert "--fine-tune: the recipe's network is" in output


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains(dataset, tmp_path, precision):
    watch = Watch()
    train(dataset, tmp_path / "b", Recipe("a", **SMALL, precision=precision, seed=2), watch, max_steps=3)
    assert np.isfinite(watch.epochs[0].loss)


def test_train_evaluate_and_export_commands(dataset, tmp_path, command):
    arguments = ["train", dataset, "--preset", "s3-unet", "--out", tmp_path / "b", *flags(**SMALL)]
    code, output = command(*arguments)
    assert code == 0, output
    assert "skipped 8: no annotation named 8" in output
    assert "epoch 2, step 6: loss" in output
    code, output = command(
        "evaluate", tmp_path / "b", dataset, "--json", tmp_path / "e.json", "--pictures", tmp_path / "p"
    )
    assert code == 0, output
    assert (tmp_path / "p" / "b.png").exists()
    result = json.loads((tmp_path / "e.json").read_text())[str(tmp_path / "b")]
    assert result["summary"]["all"]["images"] == len(result["images"]) == 2
    code, output = command("evaluate", tmp_path / "b", dataset, "--rescale", 2, "--json", tmp_path / "e.json")
    assert code == 0, output
    doubled = json.loads((tmp_path / "e.json").read_text())[str(tmp_path / "b")]
    assert doubled["images"][0]["megapixels"] == pytest.approx(4 * result["images"][0]["megapixels"])
    assert command("evaluate", tmp_path / "b", tmp_path / "nowhere")[0] == 2
    assert command("evaluate", dataset)[0] == 2
    code, output = command("export", tmp_path / "b", "--tile", 64, "--out", tmp_path / "b.pt2")
    assert code == 0, output
    assert (tmp_path / "b.pt2").stat().st_size > 1000
    assert command("export", tmp_path / "b", "--tile", 65, "--out", tmp_path / "b.pt2")[0] == 2
    assert command("export", "--tile", 64, "--out", tmp_path / "nowhere" / "b.pt2")[0] == 2
    assert command("train", dataset, "--preset", "s9", "--out", tmp_path / "c")[0] == 2
    assert command("train", dataset, "--loss", "l1", "--out", tmp_path / "c")[0] == 2
    assert command("train", tmp_path / "nowhere", "--out", tmp_path / "c")[0] == 2
