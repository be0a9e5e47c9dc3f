"""Summarise a plate: a row per well and per field, as Parquet and CSV, and heat maps as one picture.

    <store>.cellseg/<plate>/<name>.plate/wells.parquet, wells.csv, fields.parquet, fields.csv, heatmap.png

Every figure comes from the fields' tables of objects; no pixel is read again.  A summary covers every field that is
done or has failed, in this run or another.  Runs that share a plate write the summary in turn: the last is complete.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cellseg_batch.engine.errors import CellsegError, OutputError, brief
from cellseg_batch.engine.objects.columns import AREA, CELL_AREA, CLASS, INTENSITY_MEAN, TOUCHES_BORDER
from cellseg_batch.engine.objects.table import read_batches, read_provenance
from cellseg_batch.engine.reports.plate_heatmap import heatmaps
from cellseg_batch.engine.run.failed_images import FailedImages, location
from cellseg_batch.engine.run.output_paths import output_paths
from cellseg_batch.engine.run.results import PlateReport, RunReport, SlideReport
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.slides.discover import find_images
from cellseg_batch.engine.slides.ome_zarr import plate_names
from cellseg_batch.engine.slides.plate import PlatePosition
from cellseg_batch.engine.slides.slide import Slide, UnreadableImage
from cellseg_batch.engine.storage.atomic_files import whole_file
from cellseg_batch.engine.storage.journal import Journal
from cellseg_batch.engine.storage.lock import LOCK_SUFFIX, Locks
from cellseg_batch.engine.storage.paths import locate, printable


@dataclass(frozen=True)
class FieldResult:
    """Result of one field.

    Attributes:
        position: position on the plate.
        status: done, failed, or held by another run.
        reason: why the field is not done.
        table: its table of objects; None if there is none.
    """

    position: PlatePosition
    status: str
    reason: str
    table: Path | None


@dataclass
class _Tally:
    """Running totals of the figures of some fields."""

    areas: list[NDArray[np.int64]] = field(default_factory=list)
    cell_areas: list[NDArray[np.int64]] = field(default_factory=list)
    border: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    class_pixels: dict[str, float] = field(default_factory=dict)
    intensities: dict[str, float] = field(default_factory=dict)
    pixels: int = 0
    labelled: float = 0.0
    in_cells: float = 0.0
    has_cells: bool = False
    area_um2: float | None = None
    focus: list[float] = field(default_factory=list)
    saturation: list[float] = field(default_factory=list)

    def add(self, table: Path) -> None:
        """Add the objects of a field."""
        provenance = read_provenance(table)
        pixels = int(np.prod(provenance.shape))
        self.pixels += pixels
        self.labelled += provenance.labelled_fraction * pixels
        self.in_cells += provenance.cell_fraction * pixels
        self.has_cells |= provenance.cells is not None
        self.area_um2 = provenance.pixel_size_um and provenance.pixel_size_um**2
        quality = provenance.quality[provenance.segmented_channels[0]]
        self.focus += [quality.focus] if quality.focus is not None else []
        self.saturation.append(quality.saturation)
        means = {channel: INTENSITY_MEAN.name_for(channel) for channel in provenance.channels}
        self.classes = dict.fromkeys(provenance.classes, 0) | self.classes
        for name, fraction in provenance.class_fractions.items():
            self.class_pixels[name] = self.class_pixels.get(name, 0.0) + fraction * pixels
        of_class = [CLASS.name] if provenance.classes else []
        of_cell = [CELL_AREA.name] if provenance.cells else []
        for batch in read_batches(table, [AREA.name, TOUCHES_BORDER.name, *of_class, *of_cell, *means.values()]):
            for name in batch[CLASS.name].drop_null().to_pylist() if of_class else ():
                self.classes[name] += 1
            self.areas.append(batch[AREA.name].to_numpy())
            self.cell_areas += [batch[name].to_numpy() for name in of_cell]
            self.border += batch[TOUCHES_BORDER.name].true_count
            for channel, name in means.items():
                total = float(batch[name].to_numpy().sum())
                self.intensities[channel] = self.intensities.get(channel, 0.0) + total

    def figures(self) -> dict[str, Any]:
        """Column -> value; None for a figure that needs an object if there is none."""
        count = sum(map(len, self.areas))
        cells = {}
        if self.has_cells:
            cells = self._median("median_cell_area", self.cell_areas)
            cells["cell_confluence"] = self.in_cells / self.pixels
        return {
            "count": count if self.pixels else None,
            **{f"count_{name}": total for name, total in self.classes.items()},
            **self._median("median_area", self.areas),
            **{f"mean_intensity_{name}": total / count for name, total in self.intensities.items() if count},
            "confluence": self.labelled / self.pixels if self.pixels else None,
            **{f"confluence_{name}": total / self.pixels for name, total in self.class_pixels.items()},
            **cells,
            "border_fraction": self.border / count if count else None,
            "focus": median(self.focus) if self.focus else None,
            "saturation": float(np.mean(self.saturation)) if self.saturation else None,
        }

    def _median(self, name: str, areas: list[NDArray[np.int64]]) -> dict[str, Any]:
        """The columns of a median area, in px and µm²."""
        median_area = float(np.median(np.concatenate(areas))) if sum(map(len, areas)) else None
        in_um2 = median_area * self.area_um2 if median_area and self.area_um2 else None
        return {name: median_area, f"{name}_um2": in_um2}


def summarise_plates(report: RunReport, settings: Settings) -> RunReport:
    """Summarise every plate of which the run had fields; returns the report with the summaries.

    Args:
        report: report of the run.
        settings: settings of the run.
    """
    images = list(report.images)
    # A summary also covers the fields that this run left out.
    if settings.wells or settings.fields or settings.shard or settings.retry_failed:
        names = dict.fromkeys(image.plate_position.plate for image in images if image.plate_position is not None)
        images = [image for name in names for image in find_images(locate(name), settings.axes)]
    run = _Run(report.slides, settings.name, settings.output)
    plates: dict[str, list[Slide | UnreadableImage]] = {}
    for image in images:
        if image.plate_position is not None:
            plates.setdefault(image.plate_position.plate, []).append(image)
    locks = Locks()
    try:
        summaries = [_summarise(run, fields, locks) for fields in plates.values() if run.had_any(fields)]
    finally:
        locks.close()
    return replace(report, plates=summaries)


def _summarise(run: _Run, fields: list[Slide | UnreadableImage], locks: Locks) -> PlateReport:
    folder = run.folder(fields)
    if folder is None:
        return _report(run.results(fields), None, "no field could be opened")
    try:
        with locks.wait_for(folder.with_name(folder.name + LOCK_SUFFIX)):
            return summarise_plate(folder, run.results(fields))
    except OutputError as error:
        return _report(run.results(fields), None, error.detail)


class _Run:
    """Results of fields: from the reports of this run, and from the disk for fields of other runs."""

    def __init__(self, reports: list[SlideReport], name: str, output: Path | None) -> None:
        self._reports = {report.path: report for report in reports}
        self._failures = FailedImages(name, output)
        self._paths = partial(output_paths, name=name, output=output)

    def had_any(self, fields: list[Slide | UnreadableImage]) -> bool:
        """Whether this run had at least one of the fields."""
        return any(location(image) in self._reports for image in fields)

    def folder(self, fields: list[Slide | UnreadableImage]) -> Path | None:
        """Folder of the summary of the fields' plate; None if no field can be opened."""
        return next((self._paths(image).plate for image in fields if isinstance(image, Slide)), None)

    def results(self, fields: list[Slide | UnreadableImage]) -> list[FieldResult]:
        """Present results of the fields that any run has worked on."""
        return [result for image in fields if (result := self._result(image)) is not None]

    def _result(self, image: Slide | UnreadableImage) -> FieldResult | None:
        assert image.plate_position is not None
        report = self._reports.get(location(image))
        if report is not None and report.table is not None:
            return FieldResult(image.plate_position, "done", "", locate(report.table))
        # Another run may have finished a field that failed or was held in this run.
        note = self._failures.note_of(image)
        if note is not None:
            return FieldResult(image.plate_position, "failed", note.reason, None)
        if isinstance(image, Slide):
            paths = self._paths(image)
            if Journal(paths.journal).is_finished and paths.table.is_file():
                return FieldResult(image.plate_position, "done", "", paths.table)
        return FieldResult(image.plate_position, report.status, report.reason, None) if report is not None else None


def summarise_plate(folder: Path, results: list[FieldResult]) -> PlateReport:
    """Write the tables and the picture of one plate; an error becomes the reason in the report.

    Args:
        folder: folder of the summary.
        results: results of the fields, in the order of the plate.
    """
    plate = results[0].position.plate
    try:
        rows = [_well_row(members) for members in _wells(results)]
        _write_tables(folder / "fields", [_field_row(result) for result in results], plate)
        _write_tables(folder / "wells", rows, plate)
        picture = heatmaps(printable(Path(plate).name), rows, *plate_names(locate(plate)))
        with whole_file(folder / "heatmap.png") as stream:
            stream.write(picture)
    except Exception as error:  # the fields are done, whatever keeps their summary from being written
        return _report(results, None, error.detail if isinstance(error, CellsegError) else brief(error))
    return _report(results, folder)


def _report(results: list[FieldResult], folder: Path | None, reason: str = "") -> PlateReport:
    failed = sum(result.status == "failed" for result in results)
    folder_text = None if folder is None else str(folder)
    return PlateReport(results[0].position.plate, folder_text, len(_wells(results)), len(results), failed, reason)


def _wells(results: list[FieldResult]) -> list[list[FieldResult]]:
    return [list(members) for _, members in groupby(results, key=lambda result: result.position.well)]


def _field_row(result: FieldResult) -> dict[str, Any]:
    position = result.position
    row = {"well": position.well, "row": position.row, "column": position.column, "field": position.field}
    return {**row, "status": result.status, "reason": result.reason, **_tally([result]).figures()}


def _well_row(results: list[FieldResult]) -> dict[str, Any]:
    position, missing = results[0].position, [result for result in results if result.table is None]
    row = {"well": position.well, "row": position.row, "column": position.column, "fields": len(results)}
    reasons = "; ".join(f"{result.position.field}: {result.reason}" for result in missing)
    failed = sum(result.status == "failed" for result in missing)
    return {**row, "failed_fields": failed, "reason": reasons, **_tally(results).figures()}


def _tally(results: Iterable[FieldResult]) -> _Tally:
    tally = _Tally()
    for result in results:
        if result.table is not None:
            tally.add(result.table)
    return tally


def _write_tables(path: Path, rows: list[dict[str, Any]], plate: str) -> None:
    rows = [
        {name: printable(value) if isinstance(value, str) else value for name, value in row.items()} for row in rows
    ]
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
    is_count = column in ("count", "fields", "failed_fields") or column.startswith("count_")
    return pa.int64() if is_count else pa.float64()
