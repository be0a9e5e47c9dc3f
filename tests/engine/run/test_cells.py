"""Runs that expand nuclei into cells."""

import json
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import zarr
from PIL import Image
from skimage.draw import polygon2mask
from skimage.measure import regionprops_table
from skimage.segmentation import expand_labels

from cellseg_batch import open_labels
from cellseg_batch.engine.errors import UsageError
from cellseg_batch.engine.objects.merge import FinalIds
from cellseg_batch.engine.reports.export_objects import export_objects
from cellseg_batch.engine.reports.report import write_page
from cellseg_batch.engine.reports.verify import verify
from cellseg_batch.engine.run import instance_passes, slide_region
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.storage.journal import Journal
from cellseg_batch.trainer.bundle import save_bundle
from cellseg_batch.trainer.card import Instances
from tests.support.images import blobs, check_table, labels_of, write_ome_zarr, write_plate
from tests.support.processes import kill_when
from tests.support.regions import polygon, write_geojson
from tests.support.stained import stained, write_scan

HEIGHT, WIDTH = 300, 250


@pytest.fixture
def expanded(segment, tiny_bundle, tmp_path):
    """Run with cells, and a model whose larger components of the foreground are nuclei."""
    card = replace(tiny_bundle.card, instances=Instances(seed_level=-1.0, smallest_seed=12, growth=1))
    save_bundle(replace(tiny_bundle, card=card), tmp_path / "model")
    return partial(segment, model=str(tmp_path / "model"), downscale=1, expand=3.0)


def cells_of(report, index=0):
    return open_labels(report.slides[index].outputs["cells"])[...]


WAYS = [{"block": 80, "workers": 1}, {"block": 80, "workers": 4}, {"block": 400, "workers": 4}]


# 60 µm are more than a block.
@pytest.mark.parametrize("um", [0.5, 2.7, 60.0])
def test_cells_are_those_of_scikit_image_on_the_whole_slide_for_any_blocks(tmp_path, expanded, um):
    pixels = blobs(HEIGHT, WIDTH)
    for number, how in enumerate(WAYS):
        path = write_ome_zarr(tmp_path / f"{number}.zarr", pixels)
        report = expanded(path, expand=um, **how)
        (slide,) = report.slides
        assert slide.status == "done", slide.reason
        nuclei, cells = labels_of(report), cells_of(report)
        np.testing.assert_array_equal(cells, expand_labels(nuclei, um / 0.5))
        assert slide.objects == nuclei.max() > 20
        assert np.count_nonzero(cells) > np.count_nonzero(nuclei)
        assert (slide.expansion_px, slide.notes) == (um / 0.5, ())
    assert list(zarr.open_group(path / "labels").attrs["ome"]["labels"]) == ["cellseg", "cellseg_cells"]
    assert not verify([path], "cellseg", None, 1).damages


def test_the_table_measures_nucleus_cell_and_ring(tmp_path, expanded):
    pixels = blobs(HEIGHT, WIDTH)
    tables = []
    for how in WAYS:
        path = write_ome_zarr(tmp_path / str(len(tables)) / "a.zarr", pixels)
        report = expanded(path, objects=True, **how)
        tables.append(pq.read_table(report.slides[0].table))
    table, nuclei, cells = tables[0], labels_of(report), cells_of(report)
    assert table.equals(tables[1])
    assert table.equals(tables[2])
    check_table(table, nuclei, pixels, ("red", "green", "blue"))
    rings = np.where(nuclei, 0, cells)
    figures = {
        part: regionprops_table(ids, np.moveaxis(pixels, 0, -1), ("label", "area", "intensity_mean"))
        for part, ids in (("cell", cells), ("ring", rings))
    }
    np.testing.assert_array_equal(figures["cell"]["label"], table["id"])
    has_ring = np.isin(table["id"], figures["ring"]["label"])
    for part, rows in (("cell", np.ones_like(has_ring)), ("ring", has_ring)):
        np.testing.assert_array_equal(np.asarray(table[f"{part}_area"])[rows], figures[part]["area"])
        for number, channel in enumerate(("red", "green", "blue")):
            means = np.asarray(table[f"{part}_intensity_mean_{channel}"])[rows]
            np.testing.assert_allclose(means, figures[part][f"intensity_mean-{number}"])
    areas = {name: np.asarray(table[name]) for name in ("area", "cell_area", "ring_area", "cell_area_um2")}
    np.testing.assert_array_equal(areas["area"] + areas["ring_area"], areas["cell_area"])
    np.testing.assert_array_equal(areas["cell_area_um2"], areas["cell_area"] / 4)
    np.testing.assert_array_equal(table["nucleus_cell_area_ratio"], areas["area"] / areas["cell_area"])
    ratios = np.asarray(table["intensity_mean_red"])[has_ring] / figures["ring"]["intensity_mean-0"]
    np.testing.assert_allclose(np.asarray(table["nucleus_ring_intensity_ratio_red"])[has_ring], ratios)
    assert table["ring_intensity_mean_red"].null_count == np.count_nonzero(~has_ring)


def test_a_nucleus_without_a_ring_has_no_figures_of_it(tmp_path, expanded):
    """With a pixel of expansion, nuclei between others have no ring."""
    path = write_ome_zarr(tmp_path / "a.zarr", np.full((1, 96, 96), 255, np.uint8), levels=1)
    report = expanded(path, objects=True, threshold=1e-6)
    table = pq.read_table(report.slides[0].table).to_pylist()
    assert [row["ring_area"] for row in table] == [0]
    assert table[0]["cell_intensity_mean_0"] == 255
    assert table[0]["ring_intensity_mean_0"] is table[0]["nucleus_ring_intensity_ratio_0"] is None


def test_a_run_that_fails_and_one_that_goes_on_make_the_same_cells(tmp_path, expanded, monkeypatch):
    pixels = blobs(HEIGHT, WIDTH)
    whole = expanded(write_ome_zarr(tmp_path / "whole.zarr", pixels), objects=True, block=80)
    path = write_ome_zarr(tmp_path / "a.zarr", pixels)
    expand, calls = instance_passes.expand, []

    def broken(*arguments):
        calls.append(1)
        if len(calls) > 3:
            raise MemoryError("no more")
        return expand(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(instance_passes, "expand", broken)
        assert expanded(path, objects=True, block=80, workers=1).slides[0].status == "failed"
    (other,) = expanded(path, objects=True, block=80, expand=4.0).slides
    assert "cells distance (`expand`) was 6.0, now 8.0" in other.reason
    report = expanded(path, objects=True, block=80)
    np.testing.assert_array_equal(cells_of(report), cells_of(whole))
    assert (
        pq.read_table(report.slides[0].table)
        .drop_columns("slide")
        .equals(pq.read_table(whole.slides[0].table).drop_columns("slide"))
    )
    assert expanded(path, objects=True).slides[0].status == "skipped"


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_same_cells(tmp_path, expanded):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(700, 700), chunk=128)
    whole = expanded(path, name="whole", objects=True, block=400)
    flags = ["--model", tmp_path / "model", "--backend", "torch", "--precision", "fp32", "--tile", 96, "--block", 64]
    flags += ["--threads", 1, "--downscale", 1, "--objects", "--expand", 3, "--quiet"]
    run = [sys.executable, "-m", "cellseg_batch.engine.cli", "run", str(path), *map(str, flags)]
    journal = Journal(tmp_path / "a.zarr.cellseg" / "labels" / "cellseg")
    kill_when(run, lambda: len(journal.numbers("instances")) >= 5)
    assert len(journal.numbers("instances")) < 50, "it was killed too late to prove anything"
    report = expanded(path, objects=True, block=400)
    assert report.slides[0].pixels == 0
    np.testing.assert_array_equal(cells_of(report), cells_of(whole))
    assert pq.read_table(report.slides[0].table).equals(pq.read_table(whole.slides[0].table))


def test_cells_of_very_many_nuclei_are_as_wide_as_their_ids(tmp_path, expanded, monkeypatch):
    monkeypatch.setattr(FinalIds, "dtype", "uint64")
    report = expanded(write_ome_zarr(tmp_path / "a.zarr", blobs(100, 100)), objects=True)
    assert cells_of(report).dtype == labels_of(report).dtype == np.uint64
    np.testing.assert_array_equal(cells_of(report), expand_labels(labels_of(report), 6))


def test_cells_are_refused_or_replaced_beside_labels_without_them(tmp_path, expanded):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(100, 100))
    assert expanded(path, expand=None, instances=True).slides[0].status == "done"
    (refused,) = expanded(path).slides
    assert refused.status == "failed"
    assert "cells (`expand`) was off, now on" in refused.reason
    assert expanded(path, expand=None, name="other_cells").slides[0].status == "done"
    (refused,) = expanded(path, name="other", overwrite=True).slides
    assert "the run `name=other_cells`" in refused.reason
    assert expanded(path, expand=None, name="more_tissue").slides[0].status == "done"
    (refused,) = expanded(path, name="more", tissue=True, overwrite=True).slides
    assert "the run `name=more_tissue`" in refused.reason
    assert expanded(path, name="third").slides[0].status == "done"
    (refused,) = expanded(path, name="third_cells", overwrite=True).slides
    assert "the cells of the run `name=third`" in refused.reason
    assert not verify([path], "third", None, 1).damages
    report = expanded(path, overwrite=True)
    np.testing.assert_array_equal(cells_of(report), expand_labels(labels_of(report), 6))


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_distances_are_those_of_the_level_and_of_pixels_that_are_no_squares(tmp_path, expanded, version):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(200, 160), version=version)
    report = expanded(path, level=1)
    np.testing.assert_array_equal(cells_of(report), expand_labels(labels_of(report), 3))
    flat = zarr.open_group(path, mode="r+")
    meta = dict(flat.attrs["ome"] if version == "0.5" else flat.attrs)
    for level, dataset in enumerate(meta["multiscales"][0]["datasets"]):
        dataset["coordinateTransformations"][0]["scale"] = [1.0, 2.0**level, 0.5 * 2**level]
    flat.attrs.update({"ome": meta} if version == "0.5" else meta)
    report = expanded(path, level=0, name="flat", block=80)
    np.testing.assert_array_equal(cells_of(report), expand_labels(labels_of(report), 6, spacing=(2, 1)))


def test_without_a_pixel_size_the_distance_is_in_pixels_and_a_note_says_so(tmp_path, expanded):
    Image.fromarray(blobs(120, 100).transpose(1, 2, 0)).save(tmp_path / "a.png")
    report = expanded(tmp_path / "a.png", expand=3.5)
    np.testing.assert_array_equal(cells_of(report), expand_labels(labels_of(report), 3.5))
    (note,) = report.slides[0].notes
    assert "expanded by 3.5 px and not µm" in note
    write_page([tmp_path / "a.png"], tmp_path / "page.html", "cellseg", None, str)
    assert "expanded by 3.5 px and not µm" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("um", [0.0, -1.0, float("nan"), 1001.0])
def test_what_is_no_distance_is_refused(um):
    with pytest.raises(UsageError, match="`expand`"):
        Settings(expand=um)


def test_stacks_are_expanded_plane_by_plane(tmp_path, expanded):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(100, 130, 2), axes="zyx", um=0.4)
    report = expanded(path, expand=1.2, objects=True, block=80)
    for nuclei, cells in zip(labels_of(report), cells_of(report), strict=True):
        assert nuclei.any()
        np.testing.assert_array_equal(cells, expand_labels(nuclei, 3))
    assert report.slides[0].expansion_px == 3


def test_less_than_a_pixel_is_refused(tmp_path, expanded):
    (slide,) = expanded(write_ome_zarr(tmp_path / "a.zarr", blobs(100, 100)), expand=0.6, level=1).slides
    assert slide.status == "failed"
    assert "`expand` of a pixel or more" in slide.reason


def test_an_empty_slide_has_empty_cells(tmp_path, expanded):
    report = expanded(write_ome_zarr(tmp_path / "a.zarr", blobs(100, 100)), objects=True, threshold=1 - 1e-12)
    (slide,) = report.slides
    assert (slide.status, slide.objects) == ("done", 0)
    assert not cells_of(report).any()
    assert "cell_area" in pq.read_table(slide.table).column_names


def test_cells_in_a_region_are_those_of_a_run_without_region(tmp_path, expanded, monkeypatch):
    monkeypatch.setattr(slide_region, "LARGEST_OBJECT", 48)
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(420, 380))
    mask = write_geojson(
        tmp_path / "region.geojson", polygon([(40.5, 30), (190, 12), (170, 120), (230, 150), (60, 210)])
    )
    how = {"objects": True, "tile": 64, "skip_background": "off"}
    whole = expanded(path, **how)
    table = pq.read_table(whole.slides[0].table)
    cells = cells_of(whole)
    for number, way in enumerate(({"block": 48}, {"block": 1000})):
        report = expanded(path, mask=mask, name=f"part{number}", **how, **way)
        (slide,) = report.slides
        assert (slide.status, slide.notes) == ("done", ())
        assert slide.outside_tiles > 0
        part = pq.read_table(slide.table)
        kept = table.filter(pa.array(np.isin(places(table), places(part))))
        assert 10 < len(kept) < len(table) / 2
        assert part.drop_columns("id").equals(kept.drop_columns("id"))
        new_ids = np.zeros(cells.max() + 1, cells.dtype)
        new_ids[np.asarray(kept["id"])] = np.arange(1, len(kept) + 1)
        np.testing.assert_array_equal(cells_of(report), new_ids[cells])


def test_cells_reach_onto_glass_and_are_measured_there_also_in_a_region(tmp_path, expanded):
    path = write_scan(tmp_path / "scan.tif", stained(448).pixels)
    mask = write_geojson(tmp_path / "half.geojson", polygon([(0, 0), (280, 0), (220, 448), (0, 448)]))
    for block in (128, 2000):
        how = {"expand": 60.0, "objects": True, "tile": 128, "block": block, "tissue": True}
        report = expanded(path, name=f"whole{block}", **how)
        part = expanded(path, name=f"part{block}", mask=mask, **how)
        assert 0 < report.slides[0].skipped_tiles < report.slides[0].tiles
        assert part.slides[0].notes == ()
        nuclei, cells = labels_of(report), cells_of(report)
        np.testing.assert_array_equal(cells, expand_labels(nuclei, 120))
        table, kept = (pq.read_table(one.slides[0].table) for one in (report, part))
        np.testing.assert_array_equal(table["cell_area"], np.bincount(cells.ravel())[np.asarray(table["id"])])
        are_kept = np.isin(places(table), places(kept))
        assert 0 < are_kept.sum() == len(kept) < len(table)
        new_ids = np.zeros(cells.max() + 1, cells.dtype)
        new_ids[np.asarray(table["id"])[are_kept]] = np.asarray(kept["id"])
        np.testing.assert_array_equal(cells_of(part), new_ids[cells])
        assert kept.drop_columns("id").equals(table.filter(pa.array(are_kept)).drop_columns("id"))


def places(table):
    return np.asarray(table["centroid_y"]) + 1000j * np.asarray(table["centroid_x"])


def test_qupath_gets_cells_with_their_nuclei(tmp_path, expanded):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(100, 120))
    report = expanded(path, objects=True, level=1, expand=2.0)
    nuclei, cells = labels_of(report), cells_of(report)
    export_objects([path], "geojson", tmp_path / "a.geojson", "cellseg", None, None)
    features = json.loads((tmp_path / "a.geojson").read_text())["features"]
    assert len(features) == nuclei.max() > 3
    for one in features:
        assert one["properties"]["objectType"] == "cell"
        assert one["properties"]["measurements"]["cell_area"] > one["properties"]["measurements"]["area"]
        for geometry, image in ((one["geometry"], cells), (one["nucleusGeometry"], nuclei)):
            np.testing.assert_array_equal(filled(geometry, image.shape), image == int(one["properties"]["name"]))


def filled(geometry, shape):
    """The pixels of level 1 in a geometry of level 0."""
    polygons = [geometry["coordinates"]] if geometry["type"] == "Polygon" else geometry["coordinates"]
    inside = np.zeros(shape, bool)
    for ring in (ring for rings in polygons for ring in rings):
        inside ^= polygon2mask(shape, np.array(ring)[:, ::-1] / 2 - 0.5 + 1e-9)
    return inside


def test_plates_and_the_page_show_cells(tmp_path, expanded):
    path = write_plate(tmp_path / "plate.zarr", ["A/1", "A/2"], ["0"], side=100)
    report = expanded(path, objects=True)
    wells = pyarrow.csv.read_csv(f"{report.plates[0].folder}/wells.csv").to_pylist()
    for well, slide in zip(wells, report.slides, strict=True):
        areas = np.asarray(pq.read_table(slide.table)["cell_area"])
        assert well["median_cell_area"] == np.median(areas)
        assert well["median_cell_area_um2"] == np.median(areas) / 4
        assert well["cell_confluence"] == pytest.approx(areas.sum() / 100**2)
    write_page([path], tmp_path / "page.html", "cellseg", None, str)
    assert "median cell area" in (tmp_path / "page.html").read_text()
