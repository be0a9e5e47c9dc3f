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
import zarr
from hypothesis import settings
from skimage.measure import regionprops_table
from typer.testing import CliRunner

from cellseg_batch.engine.campaign import run as run_campaign
from cellseg_batch.engine.cli import app
from cellseg_batch.engine.settings import Settings
from cellseg_batch.trainer.bundle import Bundle, Card, Normalisation, load_bundle, save_bundle
from cellseg_batch.trainer.footprint import measure_footprint
from cellseg_batch.trainer.unet import build_network

# The same examples on every machine and in every run: a red test stays red.
settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("fixed")

# Races and compiled networks of the tests are kept for the session, apart from the user's.
os.environ["CELLSEG_CACHE_DIR"] = tempfile.mkdtemp(prefix="cellseg-tests-")
atexit.register(shutil.rmtree, os.environ["CELLSEG_CACHE_DIR"], ignore_errors=True)

TINY = {"name": "stem-unet", "in_channels": 3, "outputs": 3, "width": 4, "depth": 3}


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
    card = Card(
        name="tiny",
        architecture=TINY,
        channels=3,
        outputs=("foreground", "border", "distance"),
        total_stride=footprint.total_stride,
        exact_margin=footprint.exact_margin,
        margin=footprint.total_stride,
        threshold=0.5,
        pixel_size_um=0.5,
        normalisation=Normalisation("fixed", 0.0, 255.0),
    )
    folder = tmp_path_factory.mktemp("tiny")
    save_bundle(Bundle(card, {name: value.numpy() for name, value in network.state_dict().items()}), folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model):
    return load_bundle(tiny_model)


class Watcher:
    """An observer that remembers."""

    def __init__(self):
        self.plans = []
        self.reports = []
        self.pixels = 0

    def racing(self):
        self.raced = True

    def found(self, images):
        self.images = images

    def planned(self, plan, peak_bytes, number, done):
        self.plans.append(plan)

    def advanced(self, pixels):
        self.pixels += pixels

    def ended(self, report):
        self.reports.append(report)


@pytest.fixture
def watcher():
    return Watcher()


@pytest.fixture
def segment(tiny_model, watcher):
    """Run the engine in this process, with the small network in torch fp32 unless told otherwise."""

    def call(*inputs, **changes):
        # One thread: on tiles this small a second one only waits for the first, the longer the busier the machine.
        usual = {"model": str(tiny_model), "backend": "torch", "precision": "fp32", "threads": 1}
        return run_campaign(list(inputs), Settings(**{**usual, "tile": 96, "block": 128, **changes}), watcher)

    return call


@pytest.fixture
def command():
    """Call the command line in this process; returns (exit code, everything it printed)."""

    def call(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, " ".join(result.output.split())

    return call


def blobs(height, width, channels=3, seed=0):
    """A uint8 image (C, H, W) of smooth bright blobs on a dark ground."""
    rng = np.random.default_rng(seed)
    image = np.zeros((height, width))
    for _ in range(max(1, height * width // 400)):
        centre_y, centre_x, radius = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(3, 8)
        around = np.s_[max(0, int(centre_y) - 24) : int(centre_y) + 25, max(0, int(centre_x) - 24) : int(centre_x) + 25]
        y, x = np.ogrid[around[0].start : around[0].start + 49, around[1].start : around[1].start + 49]
        blob = np.exp(-((y - centre_y) ** 2 + (x - centre_x) ** 2) / radius**2)
        image[around] = np.maximum(image[around], blob[: image[around].shape[0], : image[around].shape[1]])
    noise = rng.normal(0, 6, (channels, height, width))
    return np.clip(20 + 200 * image[None] + noise, 0, 255).astype(np.uint8)


def write_ome_zarr(path, pixels, axes="cyx", version="0.5", levels=2, um=0.5, chunk=64, **omero):
    """Write ``pixels`` as an OME-Zarr image of ``levels`` halvings; returns ``path``."""
    zarr_format = 3 if version == "0.5" else 2
    group = zarr.open_group(str(path), mode="w", zarr_format=zarr_format)
    return fill_ome_zarr(group, path, pixels, axes, version, levels, um, chunk, **omero)


def fill_ome_zarr(group, path, pixels, axes="cyx", version="0.5", levels=2, um=0.5, chunk=64, **omero):
    units = {"t": ("time", "second"), "c": ("channel", None), "z": ("space", "micrometer")}
    described = []
    for axis in axes:
        kind, unit = units.get(axis, ("space", "micrometer"))
        described.append({"name": axis, "type": kind, **({"unit": unit} if unit else {})})
    datasets = []
    for level in range(levels):
        step = tuple(slice(None, None, 2**level) if axis in "yx" else slice(None) for axis in axes)
        chunks = tuple(
            min(chunk, length) if axis in "yx" else 1 for axis, length in zip(axes, pixels[step].shape, strict=True)
        )
        array = group.create_array(
            str(level),
            shape=pixels[step].shape,
            dtype=pixels.dtype,
            chunks=chunks,
            **({"dimension_names": tuple(axes)} if version == "0.5" else {}),
        )
        array[...] = pixels[step]
        scale = [um * 2**level if axis in "yx" else 1.0 for axis in axes]
        datasets.append({"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
    metadata = {"multiscales": [{"axes": described, "datasets": datasets, "name": "test"}]}
    if omero:
        metadata["omero"] = omero
    if version == "0.5":
        group.attrs["ome"] = {"version": "0.5", **metadata}
    else:
        metadata["multiscales"][0]["version"] = "0.4"
        group.attrs.update(metadata)
    return path


def labels_of(report, index=0, level=0):
    """The written labels of a run's slide."""
    return zarr.open_array(f"{report.slides[index].labels}/{level}", mode="r")[...]


def check_table(table, labels, pixels, channels):
    """Hold a table of objects against scikit-image's of the labels (H, W) and pixels (C, H, W)."""
    exact = {"id": "label", "area": "area"}
    exact |= {f"bbox_{side}": f"bbox-{number}" for number, side in enumerate(("y0", "x0", "y1", "x1"))}
    close = {"centroid_y": "centroid-0", "centroid_x": "centroid-1", "perimeter": "perimeter"}
    close |= {"axis_major": "axis_major_length", "axis_minor": "axis_minor_length", "eccentricity": "eccentricity"}
    for number, channel in enumerate(channels):
        close |= {f"intensity_{name}_{channel}": f"intensity_{name}-{number}" for name in ("mean", "min", "max", "std")}
    names = {name.split("-")[0] for name in (*exact.values(), *close.values())}
    expected = regionprops_table(labels, np.moveaxis(pixels, 0, -1), names)
    for ours, theirs in exact.items():
        np.testing.assert_array_equal(table[ours], expected[theirs], err_msg=ours)
    for ours, theirs in close.items():
        np.testing.assert_allclose(table[ours], expected[theirs], rtol=1e-6, atol=1e-6, err_msg=ours)
    for number, channel in enumerate(channels):
        sums = expected[f"intensity_mean-{number}"] * expected["area"]
        np.testing.assert_allclose(table[f"intensity_sum_{channel}"], sums, rtol=1e-6)
    border = np.union1d(labels[[0, -1]], labels[:, [0, -1]])
    np.testing.assert_array_equal(table["touches_border"], np.isin(expected["label"], border))
