"""A model of three classes, trained on composed pictures: what it makes is right wherever a run says it."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from skimage.io import imsave
from typer.testing import CliRunner

from cellseg_batch.engine.cli.main import app
from cellseg_batch.trainer.bundle import load_bundle
from tests.support.images import fill_ome_zarr, labels_of

pytestmark = pytest.mark.slow

NAMES, GIVEN = ("tumour", "stroma", "immune"), ("#C80000", "", "#0000c8")
LIGHT = np.array([(225, 225, 225), (200, 60, 60), (60, 180, 70), (70, 90, 210)])
SMALL = {"width": 8, "depth": 3, "size": 64, "batch": 4, "epoch-steps": 60, "max-steps": 120, "warmup": 10}
QUICK = {"augmentation": "flips", "averaging": 0, "learning-rate": 0.01, "threads": 1}


def discs(side, seed, kinds=(1, 2, 3), count=14):
    """A picture (H, W, 3) of discs on pale ground, the class of each pixel, and ids of the discs."""
    rng = np.random.default_rng(seed)
    classes, labels = np.zeros((side, side), np.uint8), np.zeros((side, side), np.uint16)
    y, x = np.mgrid[:side, :side]
    while labels.max() < count:
        radius = rng.uniform(6, 10)
        distance = np.hypot(*(grid - rng.uniform(8, side - 8) for grid in (y, x)))
        if not labels[distance < radius + 4].any():
            labels[distance < radius] = labels.max() + 1
            classes[distance < radius] = rng.choice(kinds)
    return np.clip(LIGHT[classes] + rng.normal(0, 8, (side, side, 3)), 0, 255).astype(np.uint8), classes, labels


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures with instance maps and class maps."""
    folder = tmp_path_factory.mktemp("data")
    rows = ["id,split"]
    for number in range(8):
        for part, values in zip(("images", "classes", "labels"), discs(128, number), strict=True):
            (folder / part).mkdir(exist_ok=True)
            imsave(folder / part / f"{number}.png", values, check_contrast=False)
        rows.append(f"{number},{'val' if number < 2 else 'train'}")
    (folder / "index.csv").write_text("\n".join(rows))
    named = (f"{number},{name},{colour}" for number, (name, colour) in enumerate(zip(NAMES, GIVEN, strict=True), 1))
    (folder / "classes.csv").write_text("\n".join(["value,name,colour", *named]))
    return folder


@pytest.fixture(scope="module")
def model(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "m"
    flags = [str(part) for name, value in (SMALL | QUICK).items() for part in (f"--{name}", value)]
    result = CliRunner().invoke(app, ["train", str(data), "--out", str(folder), "--preset", "classes", *flags])
    assert result.exit_code == 0, result.output
    return folder


def evaluate(command, model, data, folder):
    code, said = command("evaluate", model, data, "--json", folder / "e.json")
    assert code == 0, said
    return json.loads((folder / "e.json").read_text())[str(model)]["summary"]["all"]


def test_labels_table_geojson_plate_and_page_have_the_classes(model, tmp_path, segment, command):
    card = load_bundle(model).card
    assert [one.name for one in card.classes] == list(NAMES)
    assert [card.classes[number].colour for number in (0, 2)] == ["#c80000", "#0000c8"]
    plate = tmp_path / "plate.zarr"
    root = zarr.open_group(str(plate), mode="w", zarr_format=3)
    root.attrs["ome"] = {"version": "0.5", "plate": {"wells": [{"path": "A/1"}, {"path": "A/2"}]}}
    truth = {}
    for column, kinds in ((1, (1, 2, 3)), (2, (3,))):
        well = root.create_group(f"A/{column}")
        well.attrs["ome"] = {"version": "0.5", "well": {"images": [{"path": "0"}]}}
        picture, *truth[f"A/{column}/0"] = discs(200, 90 + column, kinds, 24)
        fill_ome_zarr(well.create_group("0"), plate, np.moveaxis(picture, -1, 0), levels=1)

    pixels = segment(plate, model=str(model), name="pixels", margin=32, tile=128)
    for number, slide in enumerate(pixels.slides):
        classes, found = truth[slide.path[-5:]][0], labels_of(pixels, number)
        assert found.dtype == np.uint8
        assert np.mean(found == classes) > 0.95
        assert slide.classes == {name: np.mean(found == value) for value, name in enumerate(NAMES, 1)}

    objects = segment(plate, model=str(model), objects=True, margin=32, tile=128)
    counts = {}
    for number, slide in enumerate(objects.slides):
        (classes, drawn), ids = truth[slide.path[-5:]], labels_of(objects, number)
        table = pq.read_table(slide.table)
        y, x = (table[f"centroid_{axis}"].to_numpy().round().astype(int) for axis in "yx")
        assert table.num_rows == drawn.max()
        assert table["class"].to_pylist() == [NAMES[value - 1] for value in classes[y, x]]
        counts[slide.path[-5:]] = [np.count_nonzero(classes[y, x] == value) for value in (1, 2, 3)]
        assert sum(slide.classes.values()) == pytest.approx(np.mean(ids > 0))
        out = tmp_path / f"{number}.geojson"
        assert command("export-objects", slide.path, "--format", "geojson", "--out", out)[0] == 0
        features = json.loads(out.read_text())["features"]
        shown = [feature["properties"]["classification"]["name"] for feature in features]
        assert shown == table["class"].to_pylist()

    wells = pq.read_table(f"{objects.plates[0].folder}/wells.parquet").to_pylist()
    for well, (path, (classes, _)) in zip(wells, truth.items(), strict=True):
        assert [well[f"count_{name}"] for name in NAMES] == counts[path]
        for value, name in enumerate(NAMES, 1):
            assert well[f"confluence_{name}"] == pytest.approx(np.mean(classes == value), rel=0.35, abs=0.003)

    for name in ("cellseg", "pixels"):
        code, said = command("report", plate, "--name", name, "--out", tmp_path / "page.html")
        assert code == 0, said
        page = (tmp_path / "page.html").read_text()
        assert "<h2>Classes" in page
        report = objects if name == "cellseg" else pixels
        assert all(f"{100 * slide.classes['immune']:.1f} %" in page for slide in report.slides)
        assert all(one.colour in page for one in card.classes)
        assert ("% immune, the highest darkest" in page) == (name == "pixels")


def test_scores_and_the_way_through_onnx_and_back(model, data, tmp_path, command, segment):
    figures = evaluate(command, model, data, tmp_path)
    for name in NAMES:
        assert figures["classes"][name]["dice"] > 0.75, name
        assert figures["classes"][name]["f1"] > 0.9, name
    code, said = command("export", model, "--format", "onnx", "--tile", 64, "--out", tmp_path / "m.onnx")
    assert code == 0, said
    code, said = command("import-model", tmp_path / "m.onnx", "--out", tmp_path / "back")
    assert code == 0, said
    ours, theirs = (load_bundle(folder).card for folder in (model, tmp_path / "back"))
    same = ("name", "classes", "decoder", "input", "margin", "exact_margin", "total_stride", "threshold", "training")
    assert [getattr(ours, field) for field in same] == [getattr(theirs, field) for field in same]
    back = evaluate(command, tmp_path / "back", data, tmp_path)
    for name in NAMES:
        for figure in ("dice", "iou", "f1"):
            assert back["classes"][name][figure] == pytest.approx(figures["classes"][name][figure], abs=0.002)
    picture = discs(200, 77)[0]
    imsave(tmp_path / "a.png", picture, check_contrast=False)
    labels = [
        labels_of(segment(tmp_path / "a.png", model=str(folder), backend=backend, name=backend, margin=32, tile=128))
        for folder, backend in ((model, "torch"), (tmp_path / "back", "onnxruntime"))
    ]
    assert np.mean(labels[0] != labels[1]) < 1e-3


def test_a_run_that_goes_on_wants_the_same_classes(model, data, tmp_path, command):
    flags = [part for name, value in (SMALL | QUICK).items() for part in (f"--{name}", value)]
    named = (data / "classes.csv").read_text()
    (data / "classes.csv").write_text(named.replace("stroma", "muscle"))
    try:
        code, said = command("train", data, "--out", model, "--preset", "classes", *flags, "--resume")
    finally:
        (data / "classes.csv").write_text(named)
    assert code == 2
    assert "classes were tumour, stroma, immune, are tumour, muscle, immune" in said
