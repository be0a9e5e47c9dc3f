"""Parts of objects on disk, merged by id, and the table that comes of them."""

import numpy as np
import pytest

from cellseg_batch.engine.errors import OutputError, ReadError
from cellseg_batch.engine.objects import moment_files as objects
from cellseg_batch.engine.objects.columns import Origin
from cellseg_batch.engine.objects.moment_files import merge_parts, whole_file, write_part
from cellseg_batch.engine.objects.table import read_batches, read_provenance, write_table
from cellseg_batch.kernels import moments_columns as columns
from tests.support.tables import PROVENANCE


def row(area, top=0, left=0):
    """A row of one channel: a horizontal line of ``area`` px at (top, left) with an intensity of 2."""
    x = np.arange(area)
    box = [top, left, top + 1, left + area, area]
    return [*box, area, 0, 0, 0, x.sum(), 0, 0, (x**2).sum(), 51 * area, 2, 2, 2 * area, 4 * area]


def test_parts_merge_into_ascending_ids_of_bounded_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(objects, "_IDS", 4)
    rng = np.random.default_rng(0)
    areas = {}
    for number in range(1100):
        ids = np.unique(rng.integers(number, number + 30, 6)).astype(np.uint64) + np.uint64(number // 500 * 10**12)
        for number_of_object in ids.tolist():
            areas[number_of_object] = areas.get(number_of_object, 0) + 1
        write_part(tmp_path, number, number // 500, ids, np.array([row(1, left=number)] * len(ids), float))
    write_part(tmp_path, 5000, 0, np.zeros(0, np.uint64), np.zeros((0, 18)))
    pieces = list(merge_parts(tmp_path))
    assert max(len(piece.ids) for piece in pieces) <= 4
    ids = np.concatenate([piece.ids for piece in pieces])
    assert ids.tolist() == sorted(areas)
    assert np.concatenate([piece.rows for piece in pieces])[:, columns.AREA].tolist() == [
        areas[i] for i in sorted(areas)
    ]
    np.testing.assert_array_equal(np.concatenate([piece.planes for piece in pieces]), ids // 10**12)


def test_no_parts_are_no_objects(tmp_path):
    assert list(merge_parts(tmp_path)) == []


@pytest.mark.parametrize(("error", "seen"), [(OSError("full"), OutputError), (RuntimeError("a bug"), RuntimeError)])
def test_a_file_that_fails_half_way_is_not_there(tmp_path, error, seen):
    def fail():
        with whole_file(tmp_path / "below" / "x.bin") as stream:
            stream.write(b"some")
            raise error

    with pytest.raises(seen, match=str(error)):
        fail()
    assert list((tmp_path / "below").iterdir()) == []


@pytest.fixture
def table(tmp_path):
    origin = Origin("plate/B/03/1", "B03", "1", (2, 3, 50, 40), "tz", 0.5, ("DAPI",))
    ids = np.array([3, 2**40], np.uint64)
    piece = objects.Objects(ids, np.array([0, 5]), np.array([row(4, 7, 9), row(31, 0, 9)], float))
    assert write_table(tmp_path / "objects.parquet", origin, [piece, piece], PROVENANCE) == 4
    return tmp_path / "objects.parquet"


def test_a_table_holds_places_sizes_and_intensities(table):
    first, second, *_ = [values for batch in read_batches(table) for values in batch.to_pylist()]
    assert (first["slide"], first["well"], first["field"]) == ("plate/B/03/1", "B03", "1")
    assert (first["id"], first["t"], first["z"]) == (3, 0, 0)
    assert (second["id"], second["t"], second["z"]) == (2**40, 1, 2)
    assert (first["centroid_y"], first["centroid_x"], first["centroid_x_um"]) == (7, 10.5, 5.25)
    assert [first[f"bbox_{side}"] for side in ("y0", "x0", "y1", "x1")] == [7, 9, 8, 13]
    assert (first["area"], first["area_um2"], first["bbox_x1_um"]) == (4, 1.0, 6.5)
    assert (first["perimeter"], first["perimeter_um"], first["eccentricity"]) == (4, 2, 1)
    assert [first[f"intensity_{name}_DAPI"] for name in ("mean", "min", "max", "std", "sum")] == [2, 2, 2, 0, 8]
    assert first["mean_probability"] == pytest.approx(0.2)
    assert (first["touches_border"], second["touches_border"]) == (False, True)
    assert read_provenance(table) == PROVENANCE


def test_what_is_not_known_is_null(tmp_path):
    origin = Origin("a.png", "", "", (50, 40), "", None, ("0",))
    piece = objects.Objects(np.array([1], np.uint64), np.array([0]), np.array([row(4)], float))
    write_table(tmp_path / "x.parquet", origin, [piece], PROVENANCE)
    (only,) = next(read_batches(tmp_path / "x.parquet")).to_pylist()
    assert [name for name, value in only.items() if value is None and not name.endswith("_um")] == ["area_um2"]
    assert only["bbox_y0_um"] is None


@pytest.mark.parametrize("package", ["pandas", "polars"])
def test_other_libraries_open_a_table(table, package):
    opened = pytest.importorskip(package).read_parquet(table)
    assert list(opened["id"]) == [3, 2**40] * 2
    assert list(opened["area"]) == [4, 31] * 2
    assert list(opened["well"]) == ["B03"] * 4


def test_what_is_no_table_is_refused(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"no such thing")
    for read in (read_provenance, lambda path: list(read_batches(path))):
        with pytest.raises(ReadError, match="expected a table of objects"):
            read(tmp_path / "x.parquet")
