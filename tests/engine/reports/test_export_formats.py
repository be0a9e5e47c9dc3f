"""Exports for other libraries, read by these: SpatialData, ngio, tifffile, and gzip for GeoJSON.

spatialdata and ngio pin other versions of what this program stands on, so each lives in an environment of its own.
"""

import gzip
import json
import os
import subprocess
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
import zarr

from cellseg_batch.engine.objects.table import read_provenance
from cellseg_batch.engine.reports.spatialdata_store import SpatialDataStore, element_names
from cellseg_batch.engine.slides.ome_zarr import open_written
from cellseg_batch.engine.storage.paths import locate
from cellseg_batch.trainer.bundle import save_bundle
from cellseg_batch.trainer.card import Instances
from tests.support.images import blobs, fill_ome_zarr, labels_of, write_ome_zarr, write_plate

SPATIALDATA = os.environ.get("CELLSEG_SPATIALDATA")
NGIO = os.environ.get("CELLSEG_NGIO")
"""Interpreters of environments with these libraries."""

# A threshold that no pixel reaches.
NOWHERE = 1 - 1e-12
# Between anndata and pandas.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def measure(segment, tiny_bundle, tmp_path):
    """Run with --objects and a model whose every component of the foreground is an object."""
    card = replace(tiny_bundle.card, instances=Instances(seed_level=-1.0, smallest_seed=3, growth=1))
    save_bundle(replace(tiny_bundle, card=card), tmp_path / "model")
    return partial(segment, model=str(tmp_path / "model"), objects=True)


def answer(interpreter, code, *arguments):
    """What ``code`` prints as JSON."""
    done = subprocess.run(
        [interpreter, "-W", "ignore", "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def give_classes_and_large_ids(slide, shift=70_000):
    """Shift the ids of a finished slide, and give each object a class, as a model of classes does."""
    array = zarr.open_array(f"{slide.labels}/0", mode="r+")
    array[...] = np.where(array[...] > 0, array[...] + shift, 0).astype(array.dtype)
    table, classes = pq.read_table(slide.table), {"tumour": "#c80000", "stroma": "#00c800"}
    names = pa.array([(*classes, None)[number % 3] for number in range(len(table))]).dictionary_encode()
    table = table.set_column(0, "id", pa.array(np.array(table["id"]) + shift)).append_column("class", names)
    provenance = asdict(replace(read_provenance(locate(slide.table)), classes=classes))
    pq.write_table(table.replace_schema_metadata({b"cellseg-batch": json.dumps(provenance)}), slide.table)
    return pq.read_table(slide.table)


READ_SPATIALDATA = """
import json, sys
import numpy as np
import spatialdata
from spatialdata import get_element_instances, join_spatialelement_table
from spatialdata.transformations import get_transformation

data = spatialdata.read_zarr(sys.argv[1])
table = data["table"]
said = {"labels": {}, "obs": {}, "systems": {}, "areas": {}, "levels": {}, "region": None}
for name in data.labels:
    ids = np.asarray(get_element_instances(data[name]))
    said["labels"][name] = sorted(int(number) for number in ids if number)
    levels = data[name].values() if hasattr(data[name], "children") else [data[name]]
    said["levels"][name] = [list(level["image"].shape if hasattr(level, "image") else level.shape) for level in levels]
    said["systems"][name] = {
        system: np.diag(one.to_affine_matrix(("y", "x"), ("y", "x")))[:2].tolist()
        for system, one in get_transformation(data[name], get_all=True).items()
    }
    said["areas"][name] = {}
    if said["labels"][name]:
        outlines = data[name.replace("_labels", "_shapes")]
        assert outlines.is_valid.all()
        assert get_transformation(outlines, get_all=True).keys() == said["systems"][name].keys()
        said["areas"][name] = {int(number): float(shape.area) for number, shape in outlines.geometry.items()}
if "spatialdata_attrs" in table.uns:
    said["region"] = table.uns["spatialdata_attrs"]["region"]
    for name in said["region"]:
        _, of_labels = join_spatialelement_table(
            sdata=data, spatial_element_names=name, table_name="table", how="left"
        )
        classes = of_labels.obs["class"].astype(object) if "class" in of_labels.obs else of_labels.obs["id"] * 0
        said["obs"][name] = {
            int(number): [float(area), None if other != other else other]
            for number, area, other in zip(of_labels.obs["id"], of_labels[:, "area"].X[:, 0], classes)
        }
print(json.dumps(said))
"""


@pytest.mark.slow
@pytest.mark.skipif(SPATIALDATA is None, reason="no interpreter with spatialdata in CELLSEG_SPATIALDATA")
def test_spatialdata_reads_labels_shapes_and_a_table_that_annotates_them(tmp_path, measure, command):
    path = write_ome_zarr(tmp_path / "Zellkerne µ ü.zarr", blobs(700, 600), levels=3, um=0.25)
    (slide,) = measure(path, level=1).slides
    table = give_classes_and_large_ids(slide)
    code, printed = command("export-objects", path, "--format", "spatialdata", "--out", tmp_path / "x.zarr")
    assert code == 0, printed
    said = answer(SPATIALDATA, READ_SPATIALDATA, tmp_path / "x.zarr")
    (element,) = said["region"]
    ids, areas, classes = (table[name].to_pylist() for name in ("id", "area", "class"))
    assert said["labels"] == {element: ids}
    assert said["areas"][element] == dict(zip(map(str, ids), areas, strict=True))
    expected = {str(number): [area, name] for number, area, name in zip(ids, areas, classes, strict=True)}
    assert said["obs"][element] == expected
    assert said["systems"] == {element: {"global": [2.0, 2.0], "micrometer": [0.5, 0.5]}}
    assert element == "Zellkerne_µ_ü.zarr_labels"


@pytest.mark.slow
@pytest.mark.skipif(SPATIALDATA is None, reason="no interpreter with spatialdata in CELLSEG_SPATIALDATA")
def test_spatialdata_reads_a_plate_stacks_and_images_without_objects(tmp_path, measure, command):
    folder, stack = tmp_path / "in", np.stack([blobs(80, 90, 1)] * 3, axis=1)[None]
    plate = write_plate(folder / "p.zarr", ["A/01", "B/02"], ["0", "1"], side=64)
    write_ome_zarr(folder / "stack.zarr", stack, axes="tczyx", levels=1)
    write_ome_zarr(folder / "none.zarr", blobs(60, 70), levels=1)
    runs = [measure(folder / "none.zarr", threshold=NOWHERE), measure(plate), measure(folder / "stack.zarr")]
    slides = {slide.path.removeprefix(f"{folder}/"): slide for run in runs for slide in run.slides}
    assert [path for path, slide in slides.items() if slide.objects == 0] == ["none.zarr"]
    code, printed = command("export-objects", tmp_path / "in", "--format", "spatialdata", "--out", tmp_path / "x.zarr")
    assert code == 0, printed
    said = answer(SPATIALDATA, READ_SPATIALDATA, tmp_path / "x.zarr")
    elements = {path: f"in_{path.replace('/', '_')}" for path in slides}
    for path, slide in slides.items():
        name, table = f"{elements[path]}_labels", pq.read_table(slide.table)
        assert said["labels"][name] == table["id"].to_pylist()
        assert said["areas"][name] == dict(
            zip(map(str, table["id"].to_pylist()), table["area"].to_pylist(), strict=True)
        )
        assert said["systems"][name].keys() == {elements[path], f"{elements[path]}_micrometer"}
        assert (name in said["region"]) == (slide.objects > 0)
    assert said["levels"]["in_stack.zarr_labels"] == [[3, 80, 90]]
    command("export-objects", folder / "none.zarr", "--format", "spatialdata", "--out", tmp_path / "y.zarr")
    said = answer(SPATIALDATA, READ_SPATIALDATA, tmp_path / "y.zarr")
    assert (said["labels"], said["region"]) == ({"none.zarr_labels": []}, None)


def test_a_store_is_written_whole_or_not_at_all(tmp_path, measure, command, monkeypatch):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(100, 120))
    measure(path)
    (tmp_path / "there.zarr").mkdir()
    for out, found in (("there.zarr", "one there"), ("x", "another name"), ("s3://bucket/x.zarr", "a URL")):
        target = out if "://" in out else tmp_path / out
        code, printed = command("export-objects", path, "--format", "spatialdata", "--out", target)
        assert (code, f"found {found}" in printed) == (2, True), printed
    assert not list((tmp_path / "there.zarr").iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("anndata.io.write_elem", full)
    code, printed = command("export-objects", path, "--format", "spatialdata", "--out", tmp_path / "x.zarr")
    assert (code, "No space left on device" in printed) == (1, True), printed
    assert sorted(tmp_path.iterdir()) == before


def test_a_store_has_no_time_points(tmp_path, measure, command):
    path = write_ome_zarr(tmp_path / "a.zarr", np.stack([blobs(60, 70, 1)] * 2), axes="tcyx", levels=1)
    measure(path)
    code, printed = command("export-objects", path, "--format", "spatialdata", "--out", tmp_path / "x.zarr")
    assert (code, "found 2 time points" in printed) == (2, True), printed
    assert not list(tmp_path.glob("x.zarr*"))


def test_elements_have_names_that_differ_by_more_than_capitals():
    assert element_names(["a/b", "A_b", "µ~x", "__", ""]) == ["a_b", "A_b_2", "µ_x", "image", "image_2"]


READ_NGIO = """
import json, sys
import ngio

image = ngio.open_ome_zarr_container(sys.argv[1], mode="r")
table = image.get_table("cellseg")
said = {"tables": image.list_tables(), "kind": type(table).__name__, "backend": table.backend_name}
said |= {"labels": table.reference_label, "rows": table.dataframe.reset_index().to_dict("list")}
said["lazy"] = table.lazy_frame.collect().height
print(json.dumps(said))
"""


@pytest.mark.slow
@pytest.mark.skipif(NGIO is None, reason="no interpreter with ngio in CELLSEG_NGIO")
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ngio_reads_the_table_of_each_image(tmp_path, measure, command, version):
    path = write_ome_zarr(tmp_path / "ä.zarr", blobs(200, 260), version=version)
    group = zarr.open_group(str(path), mode="r+").require_group("tables")
    group.attrs["tables"] = ["ROIs"]
    measure(path)
    measure(write_ome_zarr(tmp_path / "empty.zarr", blobs(60, 70), version=version), threshold=NOWHERE)
    expected = give_classes_and_large_ids(measure(path).slides[0])
    for _ in range(2):  # a second export replaces the first
        code, printed = command("export-objects", path, tmp_path / "empty.zarr", "--format", "ngio")
        assert (code, f"{len(expected):,} objects of 2 images" in printed) == (0, True), printed
    said = answer(NGIO, READ_NGIO, path)
    assert said["tables"] == ["ROIs", "cellseg"]
    assert (said["kind"], said["backend"], said["labels"]) == ("FeatureTableV1", "parquet", "cellseg")
    assert said["lazy"] == len(expected)
    assert said["rows"].pop("label") == expected["id"].to_pylist()
    assert said["rows"] == expected.drop_columns("id").to_pydict()
    assert answer(NGIO, READ_NGIO, tmp_path / "empty.zarr")["rows"]["label"] == []
    assert command("info", path)[0] == 0
    assert measure(path).slides[0].status == "skipped"


def test_a_table_of_something_else_stays(tmp_path, measure, command):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(100, 120))
    measure(path)
    zarr.open_group(str(path), mode="r+").require_group("tables/cellseg").attrs["type"] = "roi_table"
    code, printed = command("export-objects", path, "--format", "ngio")
    assert (code, "found one of something else" in printed) == (1, True), printed
    assert not (path / "tables" / "cellseg" / "table.parquet").exists()
    for arguments in (("ngio", "--out", tmp_path / "x"), ("csv",)):
        code, printed = command("export-objects", path, "--format", *arguments)
        assert (code, "--out" in printed) == (2, True), printed


def test_labels_are_a_tiled_pyramid_of_ome_tiff(tmp_path, measure, command):
    path = write_ome_zarr(tmp_path / "Zellen µ.zarr", blobs(1100, 700), levels=2, um=0.25)
    report = measure(path, level=0)
    give_classes_and_large_ids(report.slides[0])
    labels = labels_of(report)
    code, printed = command("export-labels", path, "--out", tmp_path / "a.ome.tif")
    assert code == 0, printed
    with tifffile.TiffFile(tmp_path / "a.ome.tif") as tiff:
        (series,) = tiff.series
        assert [level.shape for level in series.levels] == [(1100, 700), (550, 350), (275, 175)]
        np.testing.assert_array_equal(series.asarray(), labels)
        np.testing.assert_array_equal(series.levels[1].asarray(), labels[1::2, 1::2])
        page = series.pages[0]
        assert (page.dtype, page.tile, page.compression.name) == (np.uint32, (512, 512), "ZSTD")
        image = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]
    assert image["Name"] == "Zellen µ.zarr"
    assert [image["Pixels"][f"PhysicalSize{axis}"] for axis in "XY"] == [0.25, 0.25]
    assert image["Pixels"]["PhysicalSizeXUnit"] == "µm"
    assert open_written(path, "labels/cellseg").pixel_size_um(0) == 0.25
    assert not list((tmp_path).glob("*.partial"))


def test_stacks_masks_and_empty_images_are_label_tiffs(tmp_path, segment, command):
    path = write_ome_zarr(tmp_path / "a.zarr", np.stack([blobs(600, 90, 1)] * 3, axis=1), axes="czyx", levels=1)
    labels = labels_of(segment(path))
    assert command("export-labels", path, "--out", tmp_path / "a.tif")[0] == 0
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        assert (tiff.series[0].axes, tiff.series[0].dtype) == ("ZYX", np.uint8)
        np.testing.assert_array_equal(tiff.asarray(), labels)
        np.testing.assert_array_equal(tiff.series[0].levels[1].asarray(), labels[:, 1::2, 1::2])
    segment(write_ome_zarr(tmp_path / "b.zarr", blobs(60, 50), levels=1), instances=True, threshold=NOWHERE)
    assert command("export-labels", tmp_path / "b.zarr", "--out", tmp_path / "b.tif")[0] == 0
    assert not tifffile.imread(tmp_path / "b.tif").any()


def test_label_tiffs_are_of_one_finished_image(tmp_path, segment, command):
    path = write_ome_zarr(tmp_path / "in" / "a.zarr", blobs(100, 120))
    other = write_ome_zarr(tmp_path / "in" / "b.zarr", blobs(100, 120))
    segment(path)

    def refused(source, *flags):
        code, printed = command("export-labels", source, "--out", tmp_path / "x.tif", *flags)
        assert not (tmp_path / "x.tif").exists()
        return code, printed

    code, printed = refused(other)
    assert (code, "found none below" in printed) == (2, True), printed
    segment(other)
    code, printed = refused(tmp_path / "in")
    assert (code, "found 2 below" in printed) == (2, True), printed
    (tmp_path / "in" / "a.zarr.cellseg" / "labels" / "cellseg" / "finished.json").unlink()
    code, printed = refused(path)
    assert (code, "those of a run that has not ended" in printed) == (1, True), printed
    labels = zarr.open_group(str(path), mode="r+").require_group("labels/large")
    fill_ome_zarr(labels, path, np.full((100, 120), 1 << 40, np.uint64), axes="yx", levels=1)
    code, printed = refused(path, "--name", "large")
    assert (code, "found uint64" in printed) == (1, True), printed


def test_geojson_is_compressed_by_the_name_of_its_file(tmp_path, measure, command):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(100, 120))
    measure(path)
    for name in ("a.geojson", "a.geojson.gz"):
        code, printed = command("export-objects", path, "--format", "geojson", "--out", tmp_path / name)
        assert code == 0, printed
    assert gzip.decompress((tmp_path / "a.geojson.gz").read_bytes()) == (tmp_path / "a.geojson").read_bytes()


def test_ids_and_outlines_of_any_image_open_again(tmp_path):
    """Outlines with holes and in parts are well-known binary as GeoParquet stores it."""
    hole = {"type": "Polygon", "coordinates": [[[0, 0], [4, 0], [4, 4], [0, 0]], [[1, 1], [2, 1], [2, 2], [1, 1]]]}
    parts = {"type": "MultiPolygon", "coordinates": [hole["coordinates"], [[[9, 9], [9, 8], [8, 8], [9, 9]]]]}
    store = SpatialDataStore(tmp_path / "x.zarr")
    assert store.add_shapes("x", [(70_000, hole), (3, parts)], {"global": ("pixel", {"y": 1, "x": 1})}) == 2
    table = pq.read_table(tmp_path / "x.zarr" / "shapes" / "x" / "shapes.parquet")
    assert table["id"].to_pylist() == [70_000, 3]
    first, second = (value.hex() for value in table["geometry"].to_pylist())
    assert first.startswith("010300000002000000" + "04000000")
    assert second.startswith("010600000002000000" + first)


def test_pictures_and_labels_that_were_exported_are_not_images(tmp_path, segment, command):
    folder = tmp_path / "in"
    folder.mkdir()
    tifffile.imwrite(folder / "scan.tif", blobs(100, 120)[0])
    segment(folder)
    assert command("preview", folder / "scan.tif", "--out", folder / "scan.png")[0] == 0
    assert command("export-labels", folder / "scan.tif", "--out", folder / "labels.ome.tif")[0] == 0
    assert [slide.path for slide in segment(folder).slides] == [str(folder / "scan.tif")]
    code, printed = command("run", folder / "scan.png")
    assert (code, "exported by cellseg-batch" in printed) == (2, True), printed
