"""What a run found on a plate: a row per well and per field, as Parquet and CSV, and heat maps as one picture.

    <store>.cellseg/<plate>/<name>.plate/wells.parquet, wells.csv, fields.parquet, fields.csv, heatmap.png

Everything is taken from the fields' tables of objects; no pixel is read again.  It covers the fields of one run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cellseg_batch.engine.errors import CellsegError
from cellseg_batch.engine.files import whole_file
from cellseg_batch.engine.heatmap import heatmaps
from cellseg_batch.engine.locations import locate
from cellseg_batch.engine.object_table import read_account, read_batches
from cellseg_batch.engine.place import place_output
from cellseg_batch.engine.report import PlateReport, SlideReport
from cellseg_batch.engine.slides.ome_zarr import plate_names
from cellseg_batch.engine.slides.plate import PlateField
from cellseg_batch.engine.slides.slide import Broken, Slide


@dataclass(frozen=True)
class FieldResult:
    """What became of one field.

    Attributes:
        spot: where it lies.
        status, reason: as in the run's report.
        table: its objects, None where there are none of this run.
    """

    spot: PlateField
    status: str
    reason: str
    table: Path | None


@dataclass
class _Tally:
    """The figures of some fields, as they add up."""

    areas: list[NDArray[np.int64]] = field(default_factory=list)
    border: int = 0
    intensities: dict[str, float] = field(default_factory=dict)
    pixels: int = 0
    labelled: float = 0.0
    area_um2: float | None = None
    focus: list[float] = field(default_factory=list)
    saturation: list[float] = field(default_factory=list)

    def add(self, table: Path) -> None:
        """Add the objects of a field."""
        account = read_account(table)
        pixels = int(np.prod(account["shape"]))
        self.pixels += pixels
        self.labelled += account["labelled_fraction"] * pixels
        self.area_um2 = account["pixel_size_um"] and account["pixel_size_um"] ** 2
        quality = account["quality"][account["segmented_channels"][0]]
        self.focus += [quality["focus"]] if quality["focus"] is not None else []
        self.saturation.append(quality["saturation"])
        columns = {channel: f"intensity_mean_{channel}" for channel in account["quality"]}
        for batch in read_batches(table, ["area", "touches_border", *columns.values()]):
            self.areas.append(batch["area"].to_numpy())
            self.border += batch["touches_border"].true_count
            for channel, column in columns.items():
                total = float(batch[column].to_numpy().sum())
                self.intensities[channel] = self.intensities.get(channel, 0.0) + total

    def figures(self) -> dict[str, Any]:
        """The columns of a table; what there is no object for is None."""
        areas = np.concatenate(self.areas) if self.areas else np.zeros(0, np.int64)
        count = len(areas)
        area = float(np.median(areas)) if count else None
        return {
            "count": count if self.pixels else None,
            "median_area": area,
            "median_area_um2": area * self.area_um2 if area and self.area_um2 else None,
            **{f"mean_intensity_{name}": total / count for name, total in self.intensities.items() if count},
            "confluence": self.labelled / self.pixels if self.pixels else None,
            "border_fraction": self.border / count if count else None,
            "focus": median(self.focus) if self.focus else None,
            "saturation": float(np.mean(self.saturation)) if self.saturation else None,
        }


def summarise_plates(
    images: list[Slide | Broken], reports: list[SlideReport], name: str, output: Path | None
) -> list[PlateReport]:
    """Summarise every plate of a run.

    Args:
        images: of the run.
        reports: what became of them, in the same order.
        name, output: as in the settings of the run.
    """
    results: dict[str, list[FieldResult]] = {}
    folders: dict[str, Path] = {}
    for image, report in zip(images, reports, strict=True):
        if image.spot is None:
            continue
        table = locate(report.table) if report.table and report.status != "failed" else None
        one = FieldResult(image.spot, report.status, report.reason, table)
        results.setdefault(image.spot.plate, []).append(one)
        if isinstance(image, Slide):
            folders[image.spot.plate] = place_output(image, name, output).plate
    return [summarise_plate(folders.get(plate), fields) for plate, fields in results.items()]


def summarise_plate(folder: Path | None, results: list[FieldResult]) -> PlateReport:
    """Write the tables and the picture of one plate; what goes wrong with them is in the report.

    Args:
        folder: where to; None where no field could be opened.
        results: its fields, in the order of the plate.
    """
    plate = results[0].spot.plate
    wells = [list(members) for _, members in groupby(results, key=lambda one: one.spot.well)]
    failed = sum(one.status == "failed" for one in results)
    counts = len(wells), len(results), failed
    if folder is None:
        return PlateReport(plate, None, *counts, "no field could be opened")
    try:
        rows = [_well_row(members) for members in wells]
        _write_tables(folder / "fields", [_field_row(one) for one in results], plate)
        _write_tables(folder / "wells", rows, plate)
        picture = heatmaps(Path(plate).name, rows, *plate_names(locate(plate)))
        with whole_file(folder / "heatmap.png") as stream:
            stream.write(picture)
    except CellsegError as error:
        return PlateReport(plate, None, *counts, error.detail)
    return PlateReport(plate, str(folder), *counts)


def _field_row(result: FieldResult) -> dict[str, Any]:
    spot = result.spot
    row = {"well": spot.well, "row": spot.row, "column": spot.column, "field": spot.field}
    return {**row, "status": result.status, "reason": result.reason, **_tally([result]).figures()}


def _well_row(results: list[FieldResult]) -> dict[str, Any]:
    spot, missing = results[0].spot, [one for one in results if one.table is None]
    row = {"well": spot.well, "row": spot.row, "column": spot.column, "fields": len(results)}
    reasons = "; ".join(f"{one.spot.field}: {one.reason}" for one in missing)
    failed = sum(one.status == "failed" for one in missing)
    return {**row, "failed_fields": failed, "reason": reasons, **_tally(results).figures()}


def _tally(results: Iterable[FieldResult]) -> _Tally:
    tally = _Tally()
    for one in results:
        if one.table is not None:
            tally.add(one.table)
    return tally


def _write_tables(path: Path, rows: list[dict[str, Any]], plate: str) -> None:
    columns = {name: None for row in rows for name in row}
    table = pa.table([pa.array([row.get(name) for row in rows], _type_of(name)) for name in columns], list(columns))
    table = table.replace_schema_metadata({"cellseg-batch": json.dumps({"plate": plate})})
    with whole_file(path.with_suffix(".parquet")) as stream:
        pq.write_table(table, stream)
    with whole_file(path.with_suffix(".csv")) as stream:
        pa.csv.write_csv(table, stream)


def _type_of(column: str) -> pa.DataType:
    if column in ("well", "row", "column", "field", "status", "reason"):
        return pa.string()
    return pa.int64() if column in ("count", "fields", "failed_fields") else pa.float64()
