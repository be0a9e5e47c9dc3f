"""The table of objects of a slide against scikit-image, however the slide is cut, and its exports."""

import csv
import json
import os
from dataclasses import asdict

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from skimage.draw import polygon2mask
from skimage.measure import label as components
from skimage.measure import regionprops_table

from cellseg_batch.engine.inference.normalise import Bounds
from cellseg_batch.engine.objects import columns
from cellseg_batch.engine.objects.columns import Column
from cellseg_batch.engine.objects.scratch import Scratch
from cellseg_batch.engine.objects.table import read_provenance
from cellseg_batch.engine.run.measure_pass import measure_block, measured_channels, write_objects
from cellseg_batch.engine.run.output_paths import output_paths
from cellseg_batch.engine.run.records import TableRecord
from cellseg_batch.engine.run.slide_plan import plan_slide
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.slides.discover import find_images
from cellseg_batch.engine.slides.reader import SlideReader
from cellseg_batch.kernels.moments import HALO
from cellseg_batch.kernels.moments_columns import BOTTOM, HIGH, LOW, TOP
from tests.support.images import blobs, check_table, fill_ome_zarr, write_ome_zarr


@pytest.fixture
def measured(tmp_path, tiny_bundle):
    """Write an image of two channels with labels, measure it in blocks, return the table's path."""

    def call(pixels, labels, axes="cyx", block=128, name="a.zarr", channels="ab"):
        path = tmp_path / name
        described = [{"label": label} for label in channels]
        write_ome_zarr(path, pixels, axes=axes, levels=2, um=0.25, channels=described)
        (slide,) = find_images(path)
        paths = output_paths(slide, "cellseg", None)
        group = zarr.open_group(str(paths.store), mode="r+").require_group(paths.labels)
        fill_ome_zarr(group, path, labels, axes=axes.replace("c", ""), levels=1)
        group.attrs["cellseg-batch-output"] = {"model": "tiny"}
        settings = Settings(tile=96, block=block, level=0)
        plan = plan_slide(slide, paths, settings, tiny_bundle.card, Bounds((0,), (255,)))
        records = []
        probability = Scratch(paths.journal, "probability", "uint8", frame=0)
        probability.create()
        planes = np.pad(np.atleast_3d(labels.T).T, ((0, 0), (HALO, HALO), (HALO, HALO)))
        with SlideReader(slide, 0, measured_channels(slide)) as reader:
            for block in plan.grid:
                probability.write(block, probability_of(labels.shape[-2:])[block.box.slices()])
                around = planes[block.plane][block.box.shifted((HALO, HALO)).grown(HALO).slices()]
                records.append(measure_block(plan, block, block, around, None, reader, probability, None))
        assert len(plan.grid) > 1
        assert write_objects(plan, probability, records) == TableRecord(len(np.unique(labels)) - 1)
        return paths.table

    return call


def example(height=300, width=340, seed=0):
    """Two channels of blobs, and labels of which some touch, some are strewn and some lie at the border."""
    pixels = blobs(height, width, channels=2, seed=seed)
    labels = components(pixels[0] > 90).astype(np.uint32)
    labels[140:, 150:152] = labels.max() + 1
    labels[7, ::31] = labels.max() + 1
    return pixels, labels


def probability_of(shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def test_the_table_is_that_of_scikit_image(measured):
    pixels, labels = example()
    table = pq.read_table(measured(pixels, labels))
    check_table(table, labels, pixels, "ab")
    np.testing.assert_allclose(table["area_um2"], np.array(table["area"]) / 16)
    mean = regionprops_table(labels, probability_of(labels.shape) / 255, ["intensity_mean"])["intensity_mean"]
    np.testing.assert_allclose(table["mean_probability"], mean)


def test_the_table_does_not_depend_on_blocks(measured):
    pixels, labels = example()
    small, large = (measured(pixels, labels, block=block, name=f"{block}.zarr") for block in (96, 300))
    kept = [name for name in pq.read_schema(small).names if name != "slide"]
    assert pq.read_table(small, columns=kept).equals(pq.read_table(large, columns=kept))
    first, second = read_provenance(small), read_provenance(large)
    for channel in "ab":
        assert vars(first.quality[channel]) == pytest.approx(vars(second.quality[channel]))
    assert first.labelled_fraction == second.labelled_fraction == (labels > 0).mean()


def test_every_plane_has_its_objects(measured):
    pixels, labels = example(120, 130)
    later = np.where(labels > 0, labels + labels.max(), 0)
    stack = np.stack([labels, labels * 0, later])
    table = pq.read_table(measured(np.stack([pixels] * 3, axis=1), stack, axes="czyx", block=96))
    half = labels.max()
    assert table["z"].to_pylist() == [0] * half + [2] * half
    assert table["id"].to_pylist() == list(range(1, 2 * half + 1))
    assert table["area"].to_pylist()[:half] == table["area"].to_pylist()[half:]


def test_fields_of_a_table_name_their_units(measured):
    schema = pq.read_schema(measured(*example()))
    names = ("id", "centroid_x", "bbox_y0", "bbox_y0_um", "area_um2", "perimeter_um", "intensity_mean_a")
    assert [schema.field(name).metadata[b"unit"].decode() for name in names] == ["", "px", "px", "µm", "µm²", "µm", ""]


def test_a_new_entry_is_a_column_of_tables_and_exports(measured, command, tmp_path, monkeypatch):
    added = [
        Column("thickness", "px", columns.INT, lambda some: some.moment(BOTTOM) - some.moment(TOP)),
        Column("intensity_range", "", columns.FLOAT, contrast, per_channel=True),
        Column("quadrant", "", columns.INT, lambda some: some.objects.ids % 4, is_measurement=False),
    ]
    monkeypatch.setattr(columns, "COLUMNS", (*columns.COLUMNS, *added))
    pixels, labels = example()
    path = measured(pixels, labels)
    table = pq.read_table(path)
    assert table.column_names[-4:] == ["thickness", "intensity_range_a", "intensity_range_b", "quadrant"]
    assert pq.read_schema(path).field("thickness").metadata == {b"unit": b"px"}
    heights = np.array(table["bbox_y1"]) - np.array(table["bbox_y0"])
    np.testing.assert_array_equal(table["thickness"], heights)
    spans = np.array(table["intensity_max_b"]) - np.array(table["intensity_min_b"])
    np.testing.assert_array_equal(table["intensity_range_b"], spans)
    command("export-objects", tmp_path / "a.zarr", "--format", "geojson", "--out", tmp_path / "x.json")
    first, *_ = json.loads((tmp_path / "x.json").read_text())["features"]
    exported = first["properties"]["measurements"]
    assert exported["thickness"] == heights[int(first["properties"]["name"]) - 1]
    sides = [f"bbox_{side}" for side in ("y0", "x0", "y1", "x1")]
    places = [f"{name}{unit}" for name in ("centroid_y", "centroid_x", *sides) for unit in ("", "_um")]
    described = {"id", "slide", "well", "field", "t", "z", *places, "touches_border", "quadrant"}
    assert exported.keys() == set(table.column_names) - described


def contrast(some):
    return some.channel_moment(HIGH) - some.channel_moment(LOW)


def test_no_object_is_an_empty_table(measured):
    pixels, labels = example(200, 100)
    table = pq.read_table(measured(pixels, labels * 0))
    assert len(table) == 0
    assert "intensity_mean_b" in table.column_names


def test_an_empty_table_can_be_exported(measured, command, tmp_path):
    pixels, labels = example(200, 100)
    measured(pixels, labels * 0)
    for kind in ("csv", "geojson"):
        code, printed = command("export-objects", tmp_path / "a.zarr", "--format", kind, "--out", tmp_path / kind)
        assert code == 0, printed
    assert (tmp_path / "csv").read_text().startswith('"id","slide"')
    assert json.loads((tmp_path / "geojson").read_text())["features"] == []


def test_tables_tell_where_they_come_from(measured):
    path = measured(*example())
    provenance = read_provenance(path)
    assert provenance.provenance == {"model": "tiny"}
    assert provenance.shape == (300, 340)
    assert provenance.level0_scale == (1, 1)
    assert provenance.quality["a"].focus > 0
    assert provenance.image.endswith("a.zarr")


def test_csv_holds_every_object_of_every_image(measured, command, tmp_path):
    pixels, labels = example()
    measured(pixels, labels, name="all/a.zarr")
    measured(pixels, labels, name="all/b.zarr")
    write_ome_zarr(tmp_path / "all" / "c.zarr", pixels)
    code, printed = command("export-objects", tmp_path / "all", "--format", "csv", "--out", tmp_path / "x.csv")
    assert code == 0, printed
    assert f"{tmp_path / 'all' / 'c.zarr'}: no table of objects" in printed
    with open(tmp_path / "x.csv") as stream:
        rows = list(csv.DictReader(stream))
    expected = regionprops_table(labels, properties=["label", "area", "centroid"])
    assert [row["slide"] for row in rows] == ["a.zarr"] * labels.max() + ["b.zarr"] * labels.max()
    assert [int(row["id"]) for row in rows] == expected["label"].tolist() * 2
    assert [int(row["area"]) for row in rows] == expected["area"].tolist() * 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # between anndata and pandas
def test_images_of_one_name_are_told_apart(measured, command, tmp_path):
    anndata = pytest.importorskip("anndata")
    pixels, labels = example()
    folders = [tmp_path / "x", tmp_path / "y"]
    for folder in folders:
        measured(pixels, labels, name=f"{folder.name}/a.zarr")
    for kind in ("csv", "anndata"):
        code, printed = command("export-objects", *folders, "--format", kind, "--out", tmp_path / kind)
        assert code == 0, printed
    with open(tmp_path / "csv") as stream:
        slides = [row["slide"] for row in csv.DictReader(stream)]
    count = labels.max()
    assert slides == [str(folder / "a.zarr") for folder in folders for _ in range(count)]
    data = anndata.read_h5ad(tmp_path / "anndata")
    assert data.obs["slide"].tolist() == slides
    assert data.obs_names.is_unique


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # between anndata and pandas
def test_images_of_different_channels_share_a_file(measured, command, tmp_path):
    pixels, labels = example()
    means = {}
    for name, channels in (("a", "ab"), ("b", "bc")):
        table = pq.read_table(measured(pixels, labels, name=f"all/{name}.zarr", channels=channels))
        means |= {name + channel: table[f"intensity_mean_{channel}"].to_pylist() for channel in channels}
    count = len(means["aa"])
    expected = {
        "a": means["aa"] + [None] * count,
        "b": means["ab"] + means["bb"],
        "c": [None] * count + means["bc"],
    }
    assert command("export-objects", tmp_path / "all", "--format", "csv", "--out", tmp_path / "x.csv")[0] == 0
    with open(tmp_path / "x.csv") as stream:
        rows = list(csv.DictReader(stream))
    for channel, values in expected.items():
        written = [row[f"intensity_mean_{channel}"] for row in rows]
        assert [float(text) if text else None for text in written] == values
    anndata = pytest.importorskip("anndata")
    assert command("export-objects", tmp_path / "all", "--format", "anndata", "--out", tmp_path / "x.h5ad")[0] == 0
    data = anndata.read_h5ad(tmp_path / "x.h5ad")
    for channel, values in expected.items():
        np.testing.assert_allclose(data[:, f"intensity_mean_{channel}"].X[:, 0], np.array(values, "float32"))


def test_geojson_polygons_are_the_labels(measured, command, tmp_path):
    pixels, labels = example()
    labels[20:40, 20:40], labels[25:30, 25:30] = labels.max() + 1, 0  # a hole, which holds another object
    labels[27, 27] = labels.max() + 1
    measured(pixels, labels)
    code, printed = command("export-objects", tmp_path / "a.zarr", "--format", "geojson", "--out", tmp_path / "x.json")
    assert code == 0, printed
    collection = json.loads((tmp_path / "x.json").read_text())
    assert collection["type"] == "FeatureCollection"
    drawn = np.zeros_like(labels)
    for feature in collection["features"]:
        assert feature["type"] == "Feature"
        assert feature["properties"]["objectType"] == "detection"
        number, shape = int(feature["properties"]["name"]), feature["geometry"]
        parts = [shape["coordinates"]] if shape["type"] == "Polygon" else shape["coordinates"]
        inside = np.zeros(labels.shape, bool)
        for rings in parts:
            for ring in rings:
                assert ring[0] == ring[-1]
                # Pixel centres lie at whole numbers for scikit-image, half a pixel from the corner.
                inside ^= polygon2mask(labels.shape, np.array(ring)[:, ::-1] - 0.5)
        drawn[inside] = number
        assert feature["properties"]["measurements"]["area"] == (labels == number).sum()
    overlap, union = ((drawn == labels) & (labels > 0)).sum(), ((drawn > 0) | (labels > 0)).sum()
    assert overlap / union > 0.99


def test_geojson_is_in_pixels_of_the_full_resolution(measured, command, tmp_path):
    pixels, _ = example()
    table = measured(pixels, components(pixels[0] > 90, connectivity=1).astype(np.uint32))
    provenance = asdict(read_provenance(table))
    whole = pq.read_table(table)
    meta = {b"cellseg-batch": json.dumps({**provenance, "level0_scale": [2.0, 4.0]})}
    pq.write_table(whole.replace_schema_metadata(meta), table)
    command("export-objects", tmp_path / "a.zarr", "--format", "geojson", "--out", tmp_path / "x.json")
    first, *_ = json.loads((tmp_path / "x.json").read_text())["features"]
    (row,) = whole.filter(whole["id"].to_numpy() == int(first["properties"]["name"])).to_pylist()
    x, y = np.array(first["geometry"]["coordinates"][0]).T
    assert (y.min(), y.max()) == (2 * row["bbox_y0"], 2 * row["bbox_y1"])
    assert (x.min(), x.max()) == (4 * row["bbox_x0"], 4 * row["bbox_x1"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # between anndata and pandas
def test_exports_say_in_which_plane_an_object_lies(measured, command, tmp_path):
    anndata = pytest.importorskip("anndata")
    labels = np.zeros((3, 130, 100), np.uint32)
    labels[2, 5:9, 5:9], labels[0, 5:9, 5:9] = 1, 2
    measured(np.zeros((2, 3, 130, 100), np.uint8), labels, axes="czyx")
    for kind in ("geojson", "anndata"):
        code, said = command("export-objects", tmp_path / "a.zarr", "--format", kind, "--out", tmp_path / kind)
        assert code == 0, said
    features = json.loads((tmp_path / "geojson").read_text())["features"]
    planes = {feature["properties"]["name"]: feature["geometry"]["plane"] for feature in features}
    assert planes == {"1": {"c": -1, "z": 2, "t": 0}, "2": {"c": -1, "z": 0, "t": 0}}
    observed = anndata.read_h5ad(tmp_path / "anndata").obs
    assert sorted(observed[["id", "t", "z"]].to_numpy().tolist()) == [[1, 0, 2], [2, 0, 0]]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # between anndata and pandas
def test_anndata_holds_figures_and_places(measured, command, tmp_path):
    anndata = pytest.importorskip("anndata")
    pixels, labels = example()
    measured(pixels, labels)
    code, printed = command("export-objects", tmp_path / "a.zarr", "--format", "anndata", "--out", tmp_path / "x.h5ad")
    assert code == 0, printed
    data = anndata.read_h5ad(tmp_path / "x.h5ad")
    expected = regionprops_table(labels, properties=["label", "area", "centroid"])
    np.testing.assert_array_equal(data[:, "area"].X[:, 0], expected["area"])
    np.testing.assert_allclose(data.obsm["spatial"][:, 0], expected["centroid-1"] / 4)
    assert data.obs["id"].tolist() == expected["label"].tolist()
    assert "mean_probability" in data.var_names
    assert json.loads(data.uns["cellseg_batch"])[0]["provenance"] == {"model": "tiny"}


def test_exports_refuse_what_they_cannot_write(measured, command, tmp_path, monkeypatch):
    pixels, labels = example()
    write_ome_zarr(tmp_path / "bare.zarr", pixels)
    measured(pixels, labels, name="all/a.zarr")
    measured(pixels, labels, name="all/b.zarr")
    monkeypatch.setitem(__import__("sys").modules, "anndata", None)
    for source, kind, message in (
        ("bare.zarr", "csv", "expected a table of objects"),
        ("all", "geojson", "found 2 images"),
        ("all", "xlsx", "expected one of csv, anndata, geojson"),
        ("all", "anndata", "pip install 'cellseg-batch[anndata]'"),
    ):
        code, printed = command("export-objects", tmp_path / source, "--format", kind, "--out", tmp_path / "x")
        assert code == 2
        assert message in printed
    assert not (tmp_path / "x").exists()
    os.mkfifo(tmp_path / "x")
    code, printed = command("export-objects", tmp_path / "all", "--format", "csv", "--out", tmp_path / "x")
    assert (code, "found a device or a pipe" in printed) == (2, True)
    assert (tmp_path / "x").is_fifo()
