"""The Python API gives what the command line gives, and leaves its process as it was."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from PIL import Image

import cellseg_batch
from cellseg_batch import (
    CellsegError,
    CellsegWarning,
    Progress,
    Settings,
    load_model,
    open_labels,
    read_objects,
    segment,
)
from tests.support.images import blobs, write_ome_zarr, write_plate

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


def test_a_channel_can_be_named_by_its_index(tmp_path, tiny_model):
    pixels = np.moveaxis(blobs(96, 96, 2), 0, -1).astype("uint16")
    first, second = (load_model(tiny_model, **TINY, channel=number) for number in (0, 1))
    expected = first.segment(pixels[..., 1])
    np.testing.assert_array_equal(second.segment(pixels), expected)
    np.testing.assert_array_equal(first.segment(pixels, channel=np.int64(1)), expected)
    path = write_ome_zarr(tmp_path / "a.zarr", np.moveaxis(pixels, -1, 0))
    assert segment(path, model=tiny_model, channel=1, **TINY).slides[0].channels == ("1",)


def test_a_lone_well_or_field_is_one(tmp_path, tiny_model):
    plate = write_plate(tmp_path / "plate.zarr", ["A/01", "B/02"], ["0", "10"])
    for names in ({"wells": "A01", "fields": 10}, {"wells": ["A01"], "fields": {"10"}}):
        report = segment(plate, model=tiny_model, **names, **TINY)
        assert [slide.path for slide in report.slides] == [str(plate / "A" / "01" / "10")]


def test_remarks_on_an_array_are_warnings(tiny_model):
    pixels = blobs(96, 96, 1)[0].astype("float32")
    pixels[:2, :5] = np.nan
    with pytest.warns(CellsegWarning, match="array: 10 NaN pixels taken as 0") as caught:
        load_model(tiny_model, **TINY).segment(pixels)
    assert caught[0].filename == __file__


def test_progress_is_told_and_ends_at_the_end(tmp_path, tiny_model):
    paths = [write_ome_zarr(tmp_path / f"{name}.zarr", blobs(200, 200)) for name in "ab"]
    told = []
    report = segment(paths, model=str(tiny_model), instances=True, progress=told.append, **TINY)
    assert all(isinstance(step, Progress) for step in told)
    ends = [step.ending for step in told if step.ending]
    assert sorted(ends, key=lambda slide: slide.path) == report.slides
    assert (told[-1].images, told[-1].ended, told[-1].pixels) == (2, 2, 80_000)
    assert told[-1].pixels_done == pytest.approx(80_000)


STEPS = {
    "found": lambda step: step.images,
    "planned": lambda step: step.pixels,
    "advanced": lambda step: step.pixels_done,
    "ended": lambda step: step.ending,
}


@pytest.mark.parametrize("event", STEPS)
def test_an_exception_of_progress_ends_the_run_and_finished_work_stays(tmp_path, tiny_model, event):
    paths = [write_ome_zarr(tmp_path / f"{name}.zarr", blobs(100, 100)) for name in "ab"]
    usual = {"model": tiny_model, **TINY, "block": 64}

    def end(step):
        if STEPS[event](step):
            raise KeyError(event)

    with pytest.raises(KeyError, match=event):
        segment(paths, progress=end, **usual)
    assert not [path for path in tmp_path.rglob("*") if path.name == "failed" or path.suffix == ".lock"]
    again = segment(paths, **usual)
    assert {slide.status for slide in again.slides} <= {"done", "skipped"}
    if event in ("advanced", "ended"):
        assert sum(slide.pixels for slide in again.slides) < 20_000


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
        (lambda: segment("a.zarr", tile="big"), "`tile`: expected int or None, found 'big'"),
        (lambda: segment("a.zarr", tile=True), "`tile`: expected int or None, found True"),
        (lambda: segment("a.zarr", workers=2.5), "`workers`: expected int, found 2.5"),
        (lambda: segment("a.zarr", objects="yes"), "`objects`: expected bool, found 'yes'"),
        (lambda: segment("a.zarr", threshold="low"), "`threshold`: expected float or None, found 'low'"),
        (lambda: segment("a.zarr", axes=5), "`axes`: expected str or None, found 5"),
        (lambda: segment("a.zarr", output=5), "`output`: expected Path or None, found 5"),
        (lambda: segment("a.zarr", pixel_size=float("inf")), "`pixel_size`: expected a finite"),
        (lambda: segment(""), "expected a path or a URL, found an empty text"),
        (lambda: segment([]), "expected at least one path"),
        (lambda: segment("nowhere.zarr"), "nowhere.zarr"),
        (lambda: segment(None), "slides: expected paths or URLs, found None"),
        (lambda: segment(["a.zarr", 3]), "slides: expected paths or URLs, found 3"),
        (lambda: segment(b"a.zarr"), "slides: expected paths or URLs, found b'a.zarr'"),
        (lambda: segment("a.zarr", progress=3), "progress: expected a function, found 3"),
        (lambda: segment("a.zarr", fields=[b"0"]), "`fields`: expected tuple of str"),
        (lambda: segment("a.zarr", batch=10**20), "`batch`: expected 1 or more, and at most"),
        (lambda: segment("a.zarr", threads=10**20), "`threads`: expected 1 or more, and at most"),
        (lambda: segment("a.zarr", workers=10**20), "`workers`: expected 1 or more, and at most"),
        (lambda: load_model("no-such-model"), "no-such-model"),
        (lambda: load_model(3), "`model`: expected str, found 3"),
    ],
)
def test_errors_speak_of_arguments(call, said):
    with pytest.raises(CellsegError, match=said) as raised:
        call()
    assert "--" not in str(raised.value)


NO_NAMES = ["x" * 300, "a\0b", "\ud800"]


@pytest.mark.parametrize("name", NO_NAMES, ids=ascii)
def test_texts_that_no_file_can_be_named_by_are_refused(name):
    for call in (
        lambda: segment(name),
        lambda: segment("a.zarr", output=f"folder/{name}"),
        lambda: segment("a.zarr", name=name),
        lambda: load_model(name),
        lambda: open_labels(name),
        lambda: read_objects(Path(name)),
    ):
        with pytest.raises(CellsegError, match=r"expected .*, found .*; "):
            call()


@pytest.mark.parametrize("name", ["", " ", "a ", ".a", "a/b", "a\nb", "zarr.json", "é" * 65])
def test_names_that_no_label_group_can_have_are_refused(name):
    with pytest.raises(CellsegError, match="`name`: expected a plain name"):
        segment("a.zarr", name=name)


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return load_model(tiny_model, **TINY)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (None, "found NoneType"),
        ("a.png", "found str"),
        (np.array([["a"]]), "found str32 of shape"),
        (np.zeros((9, 9), object), "found object of shape"),
        (np.zeros((9, 9), complex), "found complex128 of shape"),
        ([[1, 2], [3]], "found ValueError: .*; convert it"),
        (np.zeros(3), r"axes \(Y, X\) or \(Y, X, C\), found shape \(3,\)"),
        (np.zeros((0, 9)), r"found shape \(0, 9\)"),
        (np.zeros((9, 9, 0)), r"found shape \(9, 9, 0\)"),
        (np.zeros((2, 64, 64)), "64 channels; move the channels last"),
        (np.zeros((300, 500, 200)), "200 channels; move the channels last"),
        (np.ma.masked_less(np.ones((9, 9)), 2), "a masked array"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_image_is_refused(tiny, array, said):
    for call in (tiny.segment, tiny.probability):
        with pytest.raises(CellsegError, match=f"^array: expected .*{said}"):
            call(array)


@pytest.mark.parametrize(
    "stored",
    [
        np.asfortranarray,
        lambda pixels: np.repeat(pixels, 2, axis=1)[:, ::2],
        lambda pixels: pixels[::-1].copy()[::-1],
        lambda pixels: np.frombuffer(pixels.tobytes(), pixels.dtype).reshape(pixels.shape),
        lambda pixels: pixels.astype(">u2"),
        lambda pixels: pixels.astype(">f8"),
        lambda pixels: pixels.tolist(),
        np.ma.masked_array,
    ],
    ids=["columns first", "with gaps", "backwards", "read-only", ">u2", ">f8", "list", "nothing masked"],
)
def test_the_same_pixels_have_the_same_objects_however_they_are_stored(tiny, stored):
    pixels = blobs(96, 96, 1)[0]
    ids = tiny.segment(pixels)
    assert ids.max() > 1
    np.testing.assert_array_equal(tiny.segment(stored(pixels)), ids)


def test_a_channel_that_an_array_lacks_is_refused(tiny):
    with pytest.raises(CellsegError, match=r"^array: expected a channel index from 0 to 1 .*; choose one of these$"):
        tiny.segment(blobs(96, 96, 2).transpose(1, 2, 0), channel=2)


def test_booleans_are_an_image(tiny):
    mask = blobs(96, 96, 1)[0] > 128
    np.testing.assert_array_equal(tiny.segment(mask), tiny.segment(mask.astype("uint8")))


def test_numbers_of_numpy_are_settings(tiny_model):
    model = load_model(tiny_model, **{**TINY, "batch": np.int64(2), "tile": np.uint16(96), "gate": np.bool_(True)})
    same = load_model(tiny_model, **{**TINY, "batch": 2, "threshold": np.float32(0.5)})
    pixels = blobs(96, 96, 1)[0]
    np.testing.assert_array_equal(model.segment(pixels, np.float16(0.5)), same.segment(pixels, 0.5))


def test_a_model_takes_the_settings_that_matter_to_arrays_and_refuses_the_others(tiny_model):
    defaults = {field.name: getattr(Settings, field.name) for field in fields(Settings)}
    for_runs = (
        "output name stitch scheduler cluster level axes wells fields instances objects probability tissue expand"
    )
    for name in (*for_runs.split(), "overwrite", "retry_failed", "mask", "mask_class", "manifest", "shard"):
        with pytest.raises(CellsegError, match=f"^{name}: .*; leave it out"):
            load_model(tiny_model, **{name: defaults.pop(name)})
    model = load_model(**{**defaults, **TINY, "model": tiny_model, "pixel_size": 0.5})
    for size in (-1, 0, np.nan, np.inf, "0.5"):
        with pytest.raises(CellsegError, match="`pixel_size`: expected"):
            model.segment(blobs(96, 96, 1)[0], pixel_size=size)


def test_labels_and_tables_that_cannot_be_opened_are_named(tmp_path, tiny_model):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(64, 64))
    (slide,) = segment(path, model=tiny_model, **TINY).slides
    (tmp_path / "text").write_text("no table")
    pq.write_table(pa.table({"area": [1]}), tmp_path / "other")
    for open_output, *arguments in (
        (open_labels, slide, 7),
        (open_labels, slide, -1),
        (open_labels, path / "0"),
        (open_labels, path),
        (open_labels, None),
        (read_objects, 3),
        (open_labels, tmp_path / "text"),
        (open_labels, tmp_path / "nowhere"),
        (read_objects, slide),
        (read_objects, tmp_path),
        (read_objects, tmp_path / "text"),
        (read_objects, tmp_path / "other"),
        (read_objects, tmp_path / "nowhere"),
    ):
        with pytest.raises(CellsegError, match=r"expected .*, found .*; "):
            open_output(*arguments)


def test_importing_it_imports_nothing_else():
    code = "import sys, cellseg_batch; print(sorted(set(sys.modules) & {'numpy', 'torch', 'zarr', 'rich', 'pyarrow'}))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
    assert set(cellseg_batch.__all__) <= {*dir(cellseg_batch), *cellseg_batch._LAZY}


@pytest.mark.slow
def test_the_example_of_the_readme_runs_as_it_stands(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    subprocess.run([sys.executable, "-m", "cellseg_batch.engine.cli", "demo"], cwd=tmp_path, check=True)
    subprocess.run([sys.executable, "-c", example], cwd=tmp_path, check=True)
