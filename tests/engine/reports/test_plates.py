"""Summaries of plates: rows per well and field, and heat maps."""

import csv
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cellseg_batch.engine.objects.columns import Origin
from cellseg_batch.engine.objects.moment_files import Objects
from cellseg_batch.engine.objects.table import ChannelQuality, write_table
from cellseg_batch.engine.reports import plate_heatmap as heatmap
from cellseg_batch.engine.reports.plates import FieldResult, summarise_plate
from cellseg_batch.engine.slides.plate import PlatePosition
from tests.support.images import write_plate
from tests.support.tables import PROVENANCE


def field(folder, plate, row, column, name, areas, quality=(2.0, 0.0)):
    """The result of a field whose objects have these areas; the first one touches the border."""
    position = PlatePosition(str(plate), row, column, name)
    lines = [[5 * y, 5, 5 * y + 1, 5 + area, area, *[0] * 9, 1, 3, 2 * area, 4 * area] for y, area in enumerate(areas)]
    rows = np.array(lines, float).reshape(-1, 18)
    origin = Origin("s", position.well, name, (100, 50), "", 0.5, ("DAPI",))
    provenance = replace(
        PROVENANCE,
        labelled_fraction=sum(areas) / 5000,
        quality={"DAPI": ChannelQuality(*quality)},
        class_fractions={"tumour": max(areas, default=0) / 5000, "stroma": 0.0},
    )
    path = folder / f"{position.well}-{name}.parquet"
    objects = Objects(np.arange(1, len(areas) + 1).astype(np.uint64), rows[:, 0] * 0, rows)
    write_table(path, origin, [objects], provenance)
    return FieldResult(position, "done", "", path)


@pytest.fixture
def plate(tmp_path):
    return write_plate(tmp_path / "p.zarr", ["A/01", "A/02", "B/01"], ["0", "1"])


def test_wells_add_up_their_fields(tmp_path, plate):
    results = [
        field(tmp_path, plate, "A", "01", "0", [10, 20, 30], quality=(2.0, 0.1)),
        field(tmp_path, plate, "A", "01", "1", [40], quality=(4.0, 0.3)),
        field(tmp_path, plate, "A", "02", "0", []),
        FieldResult(PlatePosition(str(plate), "A", "02", "1"), "failed", "a damaged chunk, alas", None),
        FieldResult(PlatePosition(str(plate), "B", "01", "0"), "failed", "no such level", None),
    ]
    report = summarise_plate(tmp_path / "out", results)
    assert (report.wells, report.fields, report.failed, report.reason) == (3, 5, 2, "")
    first, second, third = pq.read_table(tmp_path / "out" / "wells.parquet").to_pylist()
    assert (first["well"], first["fields"], first["failed_fields"], first["count"]) == ("A01", 2, 0, 4)
    assert (first["median_area"], first["median_area_um2"]) == (25, 6.25)
    assert first["mean_intensity_DAPI"] == 2
    assert first["confluence"] == pytest.approx(100 / 10000)
    assert first["confluence_tumour"] == pytest.approx((30 + 40) / 10000)
    assert (first["confluence_stroma"], third["confluence_tumour"]) == (0, None)
    assert (first["border_fraction"], first["focus"], first["saturation"]) == (0.5, 3, pytest.approx(0.2))
    assert (second["count"], second["failed_fields"], second["median_area"]) == (0, 1, None)
    assert second["reason"] == "1: a damaged chunk, alas"
    assert (third["count"], third["confluence"]) == (None, None)
    fields = pq.read_table(tmp_path / "out" / "fields.parquet").to_pylist()
    assert [(one["field"], one["count"]) for one in fields] == [("0", 3), ("1", 1), ("0", 0), ("1", None), ("0", None)]
    assert fields[3]["reason"] == "a damaged chunk, alas"
    with open(tmp_path / "out" / "wells.csv") as stream:
        assert [row["well"] for row in csv.DictReader(stream)] == ["A01", "A02", "B01"]


def test_heat_maps_show_every_well_of_the_plate(tmp_path, plate):
    summarise_plate(tmp_path, [field(tmp_path, plate, "A", "01", "0", [10, 20])])
    picture = np.asarray(Image.open(tmp_path / "heatmap.png").convert("RGB"))
    assert picture.shape[1] > 800
    grey = (picture == round(0.88 * 255)).all(-1).mean()
    assert 0.1 < grey < 0.6  # two of the three wells of each panel were not run


def test_a_picture_that_cannot_be_drawn_costs_nothing_but_itself(tmp_path, plate, monkeypatch):
    monkeypatch.setattr(heatmap.sys, "executable", "false")
    report = summarise_plate(tmp_path / "out", [field(tmp_path, plate, "A", "01", "0", [10])])
    assert "a process that draws them, found exit 1" in report.reason
    assert pq.read_table(tmp_path / "out" / "wells.parquet").num_rows == 1


def test_a_plate_whose_summary_cannot_be_written_says_so(tmp_path, plate):
    (tmp_path / "out").write_text("in the way")
    report = summarise_plate(tmp_path / "out", [field(tmp_path, plate, "A", "01", "0", [10])])
    assert report.folder is None
    assert "expected a file that can be written" in report.reason
