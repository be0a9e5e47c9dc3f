"""Runs that measure: tables of slides, and summaries of plates."""

import csv
import json
import os
import shutil
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from PIL import Image

from cellseg_batch.engine.errors import OutputError
from cellseg_batch.engine.objects import table as object_table
from cellseg_batch.engine.objects.table import read_provenance
from cellseg_batch.engine.reports import plates
from cellseg_batch.engine.reports.export_objects import export_objects
from cellseg_batch.engine.reports.plates import summarise_plate
from cellseg_batch.engine.reports.report import write_page
from cellseg_batch.engine.reports.verify import verify
from cellseg_batch.engine.run import measure_pass as measuring
from cellseg_batch.engine.storage.lock import Locks
from cellseg_batch.trainer.bundle import Bundle, load_bundle, save_bundle
from cellseg_batch.trainer.card import Instances, ModelClass, plain_output
from cellseg_batch.trainer.unet import load_network
from tests.support.images import blobs, check_table, fill_ome_zarr, labels_of, write_ome_zarr, write_plate


@pytest.fixture
def measure(segment, tiny_bundle, tmp_path):
    """Run with --objects and a model whose every component of the foreground is an object."""
    card = replace(tiny_bundle.card, instances=Instances(seed_level=-1.0, smallest_seed=3, growth=1))
    save_bundle(replace(tiny_bundle, card=card), tmp_path / "model")
    return partial(segment, model=str(tmp_path / "model"), objects=True)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_run_measures_what_it_writes(tmp_path, measure, version):
    pixels = blobs(200, 260)
    path = write_ome_zarr(tmp_path / "a.zarr", pixels, version=version)
    report = measure(path)
    (slide,) = report.slides
    assert (slide.status, report.plates) == ("done", [])
    labels = labels_of(report)
    table = pq.read_table(slide.table)
    assert len(table) == slide.objects == labels.max() > 20
    check_table(table, labels, pixels, ("red", "green", "blue"))
    assert 0.5 < np.mean(table["mean_probability"]) <= 1  # of nothing but foreground
    provenance = read_provenance(Path(slide.table))
    assert provenance.provenance["model"]["sha256"] == load_bundle(tmp_path / "model").sha256
    assert provenance.segmented_channels == ("red", "green", "blue")
    left = {path.suffix for path in Path(slide.table).parent.rglob("*") if path.is_file()}
    assert left <= {".json", ".parquet", ".npz", ".npy"}
    assert not list(Path(slide.table).parent.glob("scratch/*"))
    assert measure(path).slides[0].status == "skipped"


def test_a_name_that_is_no_utf8_goes_through_run_tables_and_reports(tmp_path, measure):
    folder, name = tmp_path / "in", os.fsdecode(b"0\xe4")
    pixels = blobs(100, 100)
    write_ome_zarr(folder / f"{name}.zarr", pixels)
    Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{name}.png")
    (folder / f"{name}x.tif").write_text("no image")
    report = measure(folder)
    assert [slide.status for slide in report.slides] == ["done", "done", "failed"], report.slides
    assert [slide.status for slide in measure(folder, output=tmp_path / "out").slides] == ["done", "done", "failed"]
    assert export_objects([folder], "csv", tmp_path / "objects.csv", "cellseg", None, None).images == 2
    assert "0\\udce4.png" in (tmp_path / "objects.csv").read_text()
    status = write_page([folder], tmp_path / "page.html", "cellseg", None, str)
    assert status.counts == {"done": 2, "failed": 1}
    assert (tmp_path / "page.html").read_text().count("<figure>") == 2
    assert not verify([folder], "cellseg", None, 1).damages
    json.dumps(report.to_json()).encode()


@pytest.mark.parametrize(("value", "dtype"), [(np.inf, "float32"), (-np.inf, "float32"), (1e200, "float64")])
def test_values_that_the_model_cannot_take_are_counted_and_noted(tmp_path, measure, value, dtype):
    image = blobs(100, 100, 1).astype(dtype)
    image[0, 40:50, 40:50] = value
    (slide,) = measure(write_ome_zarr(tmp_path / "a.zarr", image, levels=1), block=64, probability=True).slides
    assert (slide.status, slide.notes) == ("done", ("100 infinite pixels, or beyond 3.4e38",)), slide.reason


def test_a_slide_without_objects_has_empty_labels_and_an_empty_table(tmp_path, measure):
    report = measure(write_ome_zarr(tmp_path / "a.zarr", blobs(200, 260)), threshold=1 - 1e-12)
    (slide,) = report.slides
    assert (slide.status, slide.objects, slide.unreached_pixels) == ("done", 0, 0)
    assert not labels_of(report).any()
    assert len(pq.read_table(slide.table)) == 0
    assert read_provenance(Path(slide.table)).labelled_fraction == 0


def test_tables_do_not_depend_on_blocks_and_workers(tmp_path, measure):
    tables = []
    for block, workers in ((96, 1), (128, 3), (400, 2)):
        path = write_ome_zarr(tmp_path / str(block) / "a.zarr", blobs(300, 250))
        tables.append(pq.read_table(measure(path, block=block, workers=workers).slides[0].table))
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])


@pytest.fixture
def model_with_classes(tiny_bundle, tmp_path):
    """The small network with a class map: tumour above the usual difference of border and distance, stroma below it."""
    classes = (ModelClass("tumour", "#c80000"), ModelClass("stroma", "#00c800"))
    card = replace(
        tiny_bundle.card,
        architecture={**tiny_bundle.card.architecture, "outputs": 6},
        output=plain_output(*tiny_bundle.outputs, "no class", "tumour", "stroma"),
        instances=Instances(seed_level=-1.0, smallest_seed=3, growth=1),
        classes=classes,
    )
    heads = {name: array for name, array in tiny_bundle.weights.items() if name.startswith("head.")}
    for name, array in heads.items():
        difference = array[4:8] - array[8:]
        heads[name] = np.concatenate([array, 0 * difference, difference, -difference])
    shown = torch.from_numpy(blobs(128, 128)[None] / np.float32(255))
    with torch.inference_mode():
        logits = load_network(Bundle(card, tiny_bundle.weights | heads))(shown)[0]
    inside = logits[4][logits[0] > 0]
    usual = inside.median()
    heads["head.bias"][12:] += np.repeat([(inside - usual).abs().quantile(0.3), -usual, usual], 4)
    save_bundle(Bundle(card, tiny_bundle.weights | heads), tmp_path / "classes")
    return load_bundle(tmp_path / "classes")


def test_objects_are_of_the_class_of_most_of_their_pixels(tmp_path, segment, model_with_classes):
    pixels, margin = blobs(200, 260), 64
    how = {"model": str(tmp_path / "classes"), "objects": True, "tile": 160, "margin": "exact", "downscale": 1}
    reports = [
        segment(write_ome_zarr(tmp_path / str(block) / "a.zarr", pixels), block=block, **how) for block in (32, 500)
    ]
    table, other = (pq.read_table(report.slides[0].table) for report in reports)
    assert table.equals(other)
    labels = labels_of(reports[0])
    shown = np.pad(pixels / np.float32(255), ((0, 0), (margin, margin + 8), (margin, margin + 12)), "reflect")
    with torch.inference_mode():
        logits = load_network(model_with_classes)(torch.from_numpy(shown[None]))[0].numpy()
    codes = logits[3:, margin : margin + 200, margin : margin + 260].argmax(0)
    votes = np.stack([np.bincount(labels[codes == code], minlength=len(table) + 1)[1:] for code in (1, 2)])
    names = np.where(votes.max(0) > 0, np.array(["tumour", "stroma"], object)[votes.argmax(0)], None)
    assert {None, "tumour", "stroma"} >= set(names) >= {"tumour", "stroma"}
    assert table["class"].to_pylist() == names.tolist()
    np.testing.assert_array_equal(table["class_share"], votes.max(0) / table["area"].to_numpy())

    store = tmp_path / "32" / "a.zarr"
    export_objects([store], "geojson", tmp_path / "a.geojson", "cellseg", None, None)
    colours = {"tumour": [200, 0, 0], "stroma": [0, 200, 0], None: None}
    for feature, name in zip(json.loads((tmp_path / "a.geojson").read_text())["features"], names, strict=True):
        given = feature["properties"].get("classification", {"name": None, "color": None})
        assert given == {"name": name, "color": colours[name]}
    export_objects([store], "csv", tmp_path / "a.csv", "cellseg", None, None)
    with open(tmp_path / "a.csv") as stream:
        assert [row["class"] or None for row in csv.DictReader(stream)] == names.tolist()


def test_plates_count_the_objects_of_each_class(tmp_path, segment, model_with_classes):
    plate = write_plate(tmp_path / "p.zarr", ["A/01", "B/02"], ["0", "1"], side=64)
    report = segment(plate, model=str(tmp_path / "classes"), objects=True)
    found = {}
    for slide in report.slides:
        for row in pq.read_table(slide.table).to_pylist():
            found.setdefault(row["well"], []).append(row["class"])
    (summary,) = report.plates
    for row in pq.read_table(Path(summary.folder) / "wells.parquet").to_pylist():
        for name in ("tumour", "stroma"):
            assert row[f"count_{name}"] == found[row["well"]].count(name) > 0


@pytest.mark.parametrize("victim", ["write_part", "write_table"])
def test_a_run_that_failed_while_it_measured_ends_with_the_same_table(tmp_path, measure, monkeypatch, victim):
    whole = write_ome_zarr(tmp_path / "whole" / "a.zarr", blobs(300, 250))
    broken = write_ome_zarr(tmp_path / "broken" / "a.zarr", blobs(300, 250))
    expected = pq.read_table(measure(whole).slides[0].table)

    def full(*_):
        raise OutputError("a disk", expected="room", found="none", remedy="make room")

    with monkeypatch.context() as patch:
        patch.setattr(object_table if victim == "write_table" else measuring, victim, full)
        assert measure(broken).slides[0].status == "failed"
    report = measure(broken)
    assert report.slides[0].status == "done"
    assert pq.read_table(report.slides[0].table).equals(expected)


@pytest.mark.parametrize("victim", ["labels", "probability", "table", "pyramid"])
def test_what_is_forgotten_of_a_finished_slide_is_made_again_though_its_scratch_is_gone(tmp_path, measure, victim):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(300, 250))
    first = measure(path, probability=True).slides[0]
    folders = [Path(first.labels), tmp_path / "a.cellseg.zarr" / "cellseg_probability"]
    expected = [zarr.open_array(folder / level, mode="r")[...] for folder in folders for level in "01"]
    table = pq.read_table(first.table)
    damaged = {"labels": folders[0] / "0", "probability": folders[1] / "0", "pyramid": folders[0] / "1"}
    if victim == "table":
        (Path(first.table).parent / "table" / "0" / "0.json").unlink()
    else:
        next(one for one in sorted((damaged[victim] / "c").rglob("*")) if one.is_file()).write_bytes(b"")
    assert len(verify([path], "cellseg", None, 2, forget=True).damages) == 1
    again = measure(path, probability=True).slides[0]
    assert (again.status, again.objects) == ("done", first.objects)
    assert again.pixels == (0 if victim == "pyramid" else first.pixels)
    for before, folder, level in zip(expected, np.repeat(folders, 2), "0101", strict=True):
        np.testing.assert_array_equal(zarr.open_array(folder / level, mode="r")[...], before)
    assert pq.read_table(again.table).equals(table)
    assert verify([path], "cellseg", None, 2).damages == []


def test_a_plate_is_summarised_with_the_reasons_of_its_failed_fields(tmp_path, measure):
    plate = write_plate(tmp_path / "plate.zarr", ["A/01", "B/02"], ["0", "1"])
    for number, field in enumerate(sorted(plate.glob("*/*/*"))):
        if field.is_dir():
            fill_ome_zarr(zarr.open_group(str(field), mode="w"), field, blobs(90, 100, 1, seed=number), levels=1)
    shutil.rmtree(plate / "B" / "02" / "1" / "0")
    report = measure(plate)
    (summary,) = report.plates
    assert (summary.wells, summary.fields, summary.failed) == (2, 4, 1)
    assert summary.folder == str(tmp_path / "plate.zarr.cellseg" / "cellseg.plate")
    first, second = pq.read_table(Path(summary.folder) / "wells.parquet").to_pylist()
    counts = [slide.objects for slide in report.slides]
    assert (first["well"], first["count"]) == ("A01", counts[0] + counts[1])
    assert (second["well"], second["count"], second["failed_fields"]) == ("B02", counts[2], 1)
    assert "none of them in the store" in second["reason"]
    foreground = [slide.foreground_fraction for slide in report.slides[:2]]
    assert first["confluence"] <= np.mean(foreground) + 1e-9
    assert first["focus"] > 0
    fields = pq.read_table(Path(summary.folder) / "fields.parquet").to_pylist()
    assert [one["status"] for one in fields] == ["done", "done", "done", "failed"]
    assert (Path(summary.folder) / "heatmap.png").stat().st_size > 10_000
    again = measure(plate, wells=("B*",))
    assert [slide.status for slide in again.slides] == ["skipped", "failed"]
    assert again.plates == report.plates, "the other well and its reasons are still in it"
    retried = measure(plate, retry_failed=True)
    assert [slide.status for slide in retried.slides] == ["failed"]
    assert retried.plates == report.plates
    assert pq.read_table(Path(summary.folder) / "fields.parquet").to_pylist() == fields


def write_filled_plate(path, wells):
    """A plate with one field of blobs in each well."""
    plate = write_plate(path, wells, ["0"])
    for number, field in enumerate(sorted(one for one in plate.glob("*/*/0") if one.is_dir())):
        fill_ome_zarr(zarr.open_group(str(field), mode="w"), field, blobs(90, 100, 1, seed=number), levels=1)
    return plate


@pytest.mark.parametrize("last", ["who held a field", "who found it held"])
def test_of_two_runs_that_share_a_plate_the_last_one_summarises_all_of_it(
    tmp_path, measure, monkeypatch, watcher, last
):
    alone = measure(write_filled_plate(tmp_path / "alone" / "plate.zarr", ["A/01", "B/02"])).plates[0]
    plate = write_filled_plate(tmp_path / "plate.zarr", ["A/01", "B/02"])
    beside = tmp_path / "plate.zarr.cellseg"
    locks, written = Locks(), []

    def summarise(folder, results):
        assert (beside / "cellseg.plate.lock").is_file()
        written.append([one.status for one in results])
        return summarise_plate(folder, results)

    def other_run(report):
        """While the first run goes on, the one that holds a field does it and ends."""
        if report.status == "held":
            other.close()
            measure(plate, wells=("A01",))

    monkeypatch.setattr(plates, "summarise_plate", summarise)
    with ExitStack() as other:
        other.enter_context(locks.hold(beside / "A" / "01" / "0" / "labels" / "cellseg.lock"))
        if last == "who found it held":
            monkeypatch.setattr(watcher, "ended", other_run)
        assert {one.status for one in measure(plate).slides} == {"held", "done"}
    if last == "who held a field":
        assert written.pop() == ["held", "done"]
        measure(plate, wells=("A01",))
    locks.close()
    assert written[-1] == ["done", "done"]
    for name in ("wells", "fields"):
        expected = pq.read_table(Path(alone.folder) / f"{name}.parquet")
        assert pq.read_table(beside / "cellseg.plate" / f"{name}.parquet").equals(expected)


def test_json_names_tables_and_plates(tmp_path, command, tiny_model, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    plate = write_plate(tmp_path / "plate.zarr", ["A/01"], ["0"])
    options = ["--model", tiny_model, "--backend", "torch", "--precision", "fp32", "--json", tmp_path / "r.json"]
    code, printed = command("run", plate, "--objects", *options)
    assert code == 0, printed
    report = json.loads((tmp_path / "r.json").read_text())
    assert Path(report["slides"][0]["table"]).exists()
    assert report["plates"][0]["fields"] == 1
    assert "1 well, 1 field" in printed
