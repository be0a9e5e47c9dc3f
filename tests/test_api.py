"""The Python API gives what the command line gives, and leaves its process as it was."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from PIL import Image

import cellseg_batch
from cellseg_batch import CellsegError, Progress, load_model, open_labels, read_objects, segment
from tests.support.images import blobs, write_ome_zarr

ROOT = Path(__file__).parents[1]
TINY = {"backend": "torch", "precision": "fp32", "threads": 1, "tile": 96, "block": 128}
FLAGS = ["--backend", "torch", "--precision", "fp32", "--threads", 1, "--tile", 96, "--block", 128]


def labels_at(folder):
    return zarr.open_array(str(next(folder.rglob("labels/cellseg/0"))), mode="r")[...]


def test_a_run_has_the_bits_of_the_command_line(tmp_path, tiny_model, command):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(300, 260))
    assert command("run", path, "--model", tiny_model, "-o", tmp_path / "cli", "--objects", *FLAGS)[0] == 0
    report = segment(path, model=str(tiny_model), output=tmp_path / "api", objects=True, **TINY)
    (slide,) = report.slides
    assert (report.status, slide.status, slide.shape) == ("done", "done", (300, 260))
    np.testing.assert_array_equal(open_labels(slide)[...], labels_at(tmp_path / "cli"))
    assert open_labels(slide, level=1).shape == (150, 130)
    table = read_objects(slide)
    assert table.equals(read_objects(next((tmp_path / "cli").rglob("objects.parquet"))))
    assert table.num_rows == slide.objects > 0
    again = segment([path], model=str(tiny_model), output=str(tmp_path / "api"), objects=True, **TINY)
    assert again.slides[0].status == "skipped"


@pytest.mark.parametrize("channels", [1, 3])
def test_an_array_has_the_bits_of_an_image_of_its_pixels(tmp_path, tiny_model, command, channels):
    pixels = np.ascontiguousarray(np.moveaxis(blobs(300, 260, channels), 0, -1).squeeze())
    Image.fromarray(pixels).save(tmp_path / "a.png")
    asked = ["--instances", "--probability", "--pixel-size", 0.5]
    assert command("run", tmp_path / "a.png", "--model", tiny_model, *asked, *FLAGS)[0] == 0
    model = load_model(str(tiny_model), **TINY)
    for _ in range(2):
        ids = model.segment(pixels, pixel_size=0.5)
        np.testing.assert_array_equal(ids, labels_at(tmp_path))
        assert ids.max() > 1
    probability = next(tmp_path.rglob("cellseg_probability/0"))
    np.testing.assert_array_equal(model.probability(pixels, 0.5), zarr.open_array(str(probability), mode="r")[...])


def test_a_channel_can_be_named_by_its_index(tiny_model):
    pixels = np.moveaxis(blobs(96, 96, 2), 0, -1).astype("uint16")
    model = load_model(str(tiny_model), **TINY)
    np.testing.assert_array_equal(model.segment(pixels, channel=1), model.segment(pixels[..., 1]))


def test_progress_is_told_and_ends_at_the_end(tmp_path, tiny_model):
    paths = [write_ome_zarr(tmp_path / f"{name}.zarr", blobs(200, 200)) for name in "ab"]
    told = []
    report = segment(paths, model=str(tiny_model), instances=True, progress=told.append, **TINY)
    assert all(isinstance(step, Progress) for step in told)
    ends = [step.ending for step in told if step.ending]
    assert sorted(ends, key=lambda slide: slide.path) == report.slides
    assert (told[-1].images, told[-1].ended, told[-1].pixels) == (2, 2, 80_000)
    assert told[-1].pixels_done == pytest.approx(80_000)


def test_nothing_is_printed_and_the_process_stays_as_it_was(tmp_path, tiny_model, capfd):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(100, 100))
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    environment = dict(os.environ)
    segment(path, model=str(tiny_model), **TINY)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    assert environment == dict(os.environ)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: segment("a.zarr", magrin=3), "did you mean margin"),
        (lambda: segment("a.zarr", margin=-1), "margin"),
        (lambda: segment("nowhere.zarr"), "nowhere.zarr"),
        (lambda: load_model("no-such-model"), "no-such-model"),
        (lambda: load_model(**TINY).segment(np.zeros(3)), r"\(Y, X\)"),
        (lambda: load_model(**TINY).segment(np.array([["a"]])), r"\(Y, X\)"),
    ],
)
def test_errors_speak_of_arguments(call, said):
    with pytest.raises(CellsegError, match=said) as raised:
        call()
    assert "--" not in str(raised.value)


def test_importing_it_imports_nothing_else():
    code = "import sys, cellseg_batch; print(sorted(set(sys.modules) & {'numpy', 'torch', 'zarr', 'rich', 'pyarrow'}))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
    assert set(cellseg_batch.__all__) <= {*dir(cellseg_batch), *cellseg_batch._LAZY}


def test_the_example_of_the_readme_runs_as_it_stands(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    subprocess.run([sys.executable, "-m", "cellseg_batch.engine.cli", "demo"], cwd=tmp_path, check=True)
    subprocess.run([sys.executable, "-c", example], cwd=tmp_path, check=True)
