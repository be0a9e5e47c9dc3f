"""OME-Zarr images of either version, plates and other hierarchies are found, and read right."""

import json

import numpy as np
import pytest
import zarr

from cellseg_batch.engine.errors import NoImageError
from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.slides.discover import find_images
from cellseg_batch.engine.slides.formats import format_of
from cellseg_batch.engine.slides.plate import FieldChoice
from cellseg_batch.engine.slides.slide import UnreadableImage
from tests.support.images import fill_ome_zarr, write_ome_zarr, write_plate
from tests.support.slides import coordinates, only, read


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("axes", ["yx", "xy", "cyx", "zyx", "czyx", "tczyx", "tyx", "ztcyx", "zyxt"])
def test_ome_zarr_pixels_are_where_they_belong(tmp_path, version, axes):
    shape = tuple({"t": 2, "c": 3, "z": 2, "y": 7, "x": 9}[axis] for axis in axes)
    path = write_ome_zarr(tmp_path / "a.zarr", coordinates(axes, shape), axes, version, levels=1, chunk=4)
    slide = only(path)
    channel = 1 if "c" in axes else 0
    for plane in range(slide.planes(0)):
        place = dict(zip(slide.plane_axes, np.unravel_index(plane, slide.plane_grid(0) or (1,)), strict=False))
        base = 3000 * place.get("t", 0) + 1000 * place.get("z", 0) + 100 * channel
        y, x = np.mgrid[2:6, 3:9]
        np.testing.assert_array_equal(read(slide, 0, (channel,), plane, Box(2, 3, 6, 9))[0], base + 10 * y + x)
    assert format_of(slide).describe(slide) == f"ome-zarr {version}"


def test_levels_without_transformations_lie_by_their_shapes(tmp_path):
    path = write_ome_zarr(tmp_path / "a.zarr", coordinates("cyx", (1, 64, 64)), levels=3)
    metadata = json.loads((path / "zarr.json").read_text())
    for dataset in metadata["attributes"]["ome"]["multiscales"][0]["datasets"]:
        del dataset["coordinateTransformations"]
    (path / "zarr.json").write_text(json.dumps(metadata))
    assert [level.scale for level in only(path).levels] == [(1, 1, 1), (1, 2, 2), (1, 4, 4)]


@pytest.mark.parametrize("unit", ["micrometer", "µm", "um", "micron"])
def test_spellings_of_micrometre(tmp_path, unit):
    path = write_ome_zarr(tmp_path / "a.zarr", coordinates("cyx", (1, 16, 16)), um=0.25)
    (path / "zarr.json").write_text((path / "zarr.json").read_text().replace("micrometer", unit))
    assert only(path).pixel_size_um(0) == 0.25
    assert only(path).units == (None, "micrometer", "micrometer")


@pytest.mark.parametrize(
    ("wells", "fields", "expected"),
    [
        ((), (), ["A01 0", "A01 1", "B02 0", "B02 1", "B12 0", "B12 1"]),
        (("A01",), (), ["A01 0", "A01 1"]),
        (("b*",), ("1",), ["B02 1", "B12 1"]),
        (("a1", "B2"), ("0", "7"), ["A01 0", "B02 0"]),
    ],
)
def test_wells_and_fields_of_a_plate_can_be_chosen(tmp_path, wells, fields, expected):
    plate = write_plate(tmp_path / "all" / "plate.zarr", ["A/01", "B/02", "B/12"], ["0", "1"])
    write_ome_zarr(tmp_path / "all" / "single.zarr", np.zeros((1, 8, 8), np.uint8))
    found = find_images(plate, choice=FieldChoice(wells, fields))
    assert [f"{image.plate_position.well} {image.plate_position.field}" for image in found] == expected
    assert {image.plate_position.plate for image in found} == {str(plate)}
    *fields_found, single = find_images(tmp_path / "all", choice=FieldChoice(wells, fields))
    assert [image.plate_position for image in fields_found] == [image.plate_position for image in found]
    assert single.plate_position is None


def test_wells_that_do_not_exist_are_no_images(tmp_path):
    plate = write_plate(tmp_path / "plate.zarr", ["A/01"], ["0"])
    with pytest.raises(NoImageError, match="none in such wells and fields"):
        find_images(plate, choice=FieldChoice(("C*",)))


def test_plates_list_their_fields_and_name_what_is_missing(tmp_path):
    plate = zarr.open_group(str(tmp_path / "plate.zarr"), mode="w")
    wells = [{"path": "A/1", "rowIndex": 0, "columnIndex": 0}, {"path": "B/1", "rowIndex": 1, "columnIndex": 0}]
    plate.attrs["ome"] = {"version": "0.5", "plate": {"wells": wells, "rows": [], "columns": []}}
    well = plate.create_group("A").create_group("1")
    well.attrs["ome"] = {"version": "0.5", "well": {"images": [{"path": "0"}, {"path": "1"}]}}
    for field in ("0", "1"):
        fill_ome_zarr(well.create_group(field), None, coordinates("cyx", (2, 16, 16)))
    found = find_images(tmp_path / "plate.zarr")
    assert [image.name for image in found] == ["plate.zarr/A/1/0", "plate.zarr/A/1/1", "plate.zarr/B/1"]
    assert isinstance(found[2], UnreadableImage)
    assert "not in the store" in found[2].reason
    assert [(image.plate_position.well, image.plate_position.field) for image in found] == [
        ("A1", "0"),
        ("A1", "1"),
        ("B1", ""),
    ]
    assert only(tmp_path / "plate.zarr" / "A" / "1" / "0").store == tmp_path / "plate.zarr"


def test_bioformats2raw_series_come_in_numerical_order(tmp_path):
    root = zarr.open_group(str(tmp_path / "b.zarr"), mode="w", zarr_format=2)
    root.attrs["bioformats2raw.layout"] = 3
    for series in ("10", "2", "0"):
        fill_ome_zarr(root.create_group(series), None, coordinates("cyx", (1, 16, 16)), version="0.4")
    root.create_group("OME")
    assert [slide.path for slide in find_images(tmp_path / "b.zarr")] == ["0", "2", "10"]


def test_a_missing_full_resolution_is_passed_over(tmp_path):
    path = write_ome_zarr(tmp_path / "a.zarr", coordinates("cyx", (1, 32, 32)), levels=2)
    for file in sorted((path / "0").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    slide = only(path)
    assert [level.shape for level in slide.levels] == [(1, 16, 16)]


def damaged(tmp_path, kind):
    path = tmp_path / f"{kind}.zarr"
    if kind == "json":
        write_ome_zarr(path, coordinates("cyx", (1, 16, 16)))
        (path / "zarr.json").write_text("{not json")
    elif kind == "array":
        zarr.create_array(str(path), shape=(3, 4, 5, 6), dtype="uint8")
    elif kind == "no-datasets":
        zarr.open_group(str(path), mode="w").attrs["ome"] = {"version": "0.5", "multiscales": []}
    elif kind == "axes":
        write_ome_zarr(path, coordinates("cyx", (1, 16, 16)))
        metadata = json.loads((path / "zarr.json").read_text())
        metadata["attributes"]["ome"]["multiscales"][0]["axes"][0]["name"] = "wavelength"
        (path / "zarr.json").write_text(json.dumps(metadata))
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("json", "cannot be read"), ("array", "`axes=czyx`"), ("no-datasets", "multiscale"), ("axes", "t, c, z, y, x")],
)
def test_what_cannot_be_used_says_why(tmp_path, kind, reason):
    broken = only(damaged(tmp_path, kind))
    assert isinstance(broken, UnreadableImage)
    assert reason in broken.reason
