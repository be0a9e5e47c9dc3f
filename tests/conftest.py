"""Small models, slides and helpers that the tests share.

Nothing is downloaded.  Larger real data are used only by tests marked slow, from the folder that the environment
variable CELLSEG_TEST_DATA names.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from typer.testing import CliRunner

from cellseg_batch.engine import machine
from cellseg_batch.engine.cli.main import app
from cellseg_batch.engine.reports.plates import summarise_plates
from cellseg_batch.engine.run.campaign import run as run_campaign
from cellseg_batch.engine.settings import Settings
from cellseg_batch.trainer.bundle import Bundle, load_bundle, save_bundle
from cellseg_batch.trainer.card import Card, Input, Normalisation, Size, plain_output
from cellseg_batch.trainer.footprint import measure_footprint
from cellseg_batch.trainer.unet import build_network
from tests.support.images import blobs
from tests.support.networks import TINY
from tests.support.watcher import Watcher

# The same examples on every machine and in every run: a red test stays red.
settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("fixed")

# Races and compiled networks of the tests are kept for the session, apart from the user's.
os.environ["CELLSEG_CACHE_DIR"] = tempfile.mkdtemp(prefix="cellseg-tests-")
atexit.register(shutil.rmtree, os.environ["CELLSEG_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def data_folder():
    """Folder with real data, for slow tests."""
    folder = os.environ.get("CELLSEG_TEST_DATA")
    if not folder:
        pytest.skip("CELLSEG_TEST_DATA is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a bundle with a small random network none of whose outputs is all low or all high."""
    torch.manual_seed(0)
    network = build_network(TINY)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    with torch.no_grad():
        network.head.weight *= 8
        logits = network.eval()(torch.from_numpy(blobs(128, 128)[None] / np.float32(255)))
        # Each of the pixel shuffle's four phases by itself, or masks might be stripes.
        network.head.bias -= torch.pixel_unshuffle(logits[0], 2).flatten(1).median(dim=1).values
    footprint = measure_footprint(network, in_channels=3)
    stride = footprint.total_stride
    card = Card(
        name="tiny",
        architecture=TINY,
        input=Input(("rgb",), Normalisation("fixed", (0.0,), (255.0,)), Size(stride, stride), 0.5),
        output=plain_output("foreground", "border", "distance"),
        decoder="seeds",
        total_stride=stride,
        exact_margin=footprint.exact_margin,
        margin=stride,
        threshold=0.5,
    )
    folder = tmp_path_factory.mktemp("tiny")
    save_bundle(Bundle(card, {name: value.numpy() for name, value in network.state_dict().items()}), folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model):
    return load_bundle(tiny_model)


@pytest.fixture
def watcher():
    return Watcher()


@pytest.fixture
def segment(tiny_model, watcher):
    """Run the engine in this process, with the small network in torch fp32 unless told otherwise."""

    def call(*inputs, **changes):
        # One thread: on tiles this small a second one only waits for the first, the longer the busier the machine.
        usual = {"model": str(tiny_model), "backend": "torch", "precision": "fp32", "threads": 1}
        settings = Settings(**{**usual, "tile": 96, "block": 128, **changes})
        report = run_campaign(list(inputs), settings, watcher)
        return summarise_plates(report, settings) if settings.objects else report

    return call


@pytest.fixture
def nvidia_driver(monkeypatch, tmp_path):
    """Put a driver of GPUs there, as its tool describes it; without one on this machine."""
    if machine.gpus():
        pytest.skip("this machine has a GPU")
    functions = (machine._driver_gpus, machine.gpu_driver)
    folder = tmp_path / "nvidia"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def call(names, version):
        answers = {"name": names, "driver_version": version}
        cases = "".join(f"--query-gpu={what}) echo '{answer}';;\n" for what, answer in answers.items())
        (folder / "nvidia-smi").write_text(f"#!/bin/sh\ncase $1 in\n{cases}esac\n")
        (folder / "nvidia-smi").chmod(0o755)
        for function in functions:
            function.cache_clear()

    yield call
    for function in functions:
        function.cache_clear()


@pytest.fixture
def command():
    """Call the command line in this process; returns (exit code, everything it printed)."""

    def call(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, " ".join(result.output.split())

    return call


@pytest.fixture
def refusal():
    """Call the command line, which refuses in one line and nothing else, with exit code 2; returns the line."""

    def call(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 2, result.output or result.exception
        (line,) = result.output.splitlines()
        assert line.startswith("error")
        return line

    return call
