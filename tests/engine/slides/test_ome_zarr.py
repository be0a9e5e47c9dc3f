"""OME-Zarr images of either version, plates and other hierarchies are found, and read right."""

import json
import shutil
import warnings

import numpy as np
import pytest
import zarr

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


def test_wells_and_fields_that_no_plate_has_are_named(tmp_path, command):
    plate = write_plate(tmp_path / "plate.zarr", ["A/01"], ["0"])
    code, output = command("plan", plate, "--wells", "A*,C*", "--fields", "0,7")
    assert code == 2
    assert "found well C*, field 7, which none of them has" in output
    assert find_images(plate, choice=FieldChoice(("C*",))) == []


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
    assert slide.notes == ("level 0 is listed, but not in the store",)


def change(path, edit):
    """Edit the OME metadata of an image in place."""
    content = json.loads((path / "zarr.json").read_text())
    edit(content["attributes"]["ome"])
    (path / "zarr.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_groups_are_listed_as_they_are(tmp_path, version):
    root = zarr.open_group(str(tmp_path / "a.zarr"), mode="w", zarr_format=2 if version == "0.4" else 3)
    for name in ("0", "1"):
        fill_ome_zarr(root.create_group(name), None, coordinates("yx", (8, 9)), "yx", version, levels=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(str(tmp_path / "a.zarr"))
    shutil.rmtree(tmp_path / "a.zarr" / "0")
    fill_ome_zarr(root.create_group("2"), None, coordinates("yx", (8, 9)), "yx", version, levels=1)
    assert [slide.path for slide in find_images(tmp_path / "a.zarr")] == ["1", "2"]


@pytest.mark.parametrize(
    "scale",
    [[1, 0, 0], [1, -0.5, 0.5], [1, float("nan"), 0.5], [1, 0.5, float("inf")], [0.5], ["?"] * 3, None],
)
def test_nonsense_pixel_sizes_are_unknown_and_cost_no_image(tmp_path, scale):
    path = write_ome_zarr(tmp_path / "a.zarr", coordinates("zyx", (2, 16, 16)), "zyx", levels=2)

    def edit(ome):
        ome["multiscales"][0]["datasets"][0]["coordinateTransformations"][0]["scale"] = scale

    slide = only(change(path, edit))
    assert slide.pixel_size_um(0) is None
    assert [level.scale[1:] for level in slide.levels] == [(1, 1), (2, 2)]
    assert "pixel size along" in " ".join(slide.notes)


def test_an_unlikely_pixel_size_is_unknown_but_kept_as_written(tmp_path):
    slide = only(write_ome_zarr(tmp_path / "a.zarr", coordinates("yx", (8, 9)), "yx", levels=1, um=2000))
    assert slide.pixel_size_um(0) is None
    assert (slide.levels[0].scale, slide.units) == ((2000, 2000), ("micrometer", "micrometer"))


def test_members_named_like_overviews_are_images_unless_bioformats2raw_wrote_them(tmp_path):
    root = zarr.open_group(str(tmp_path / "a.zarr"), mode="w")
    for name in ("map", "scan"):
        fill_ome_zarr(root.create_group(name), None, coordinates("yx", (8, 9)), "yx", levels=1)
    assert [slide.path for slide in find_images(tmp_path / "a.zarr")] == ["map", "scan"]


def test_a_nonsense_scale_of_another_axis_leaves_the_pixel_size_known(tmp_path):
    path = write_ome_zarr(tmp_path / "a.zarr", coordinates("tzyx", (1, 2, 16, 16)), "tzyx", levels=1, um=0.25)

    def edit(ome):
        ome["multiscales"][0]["datasets"][0]["coordinateTransformations"][0]["scale"][:2] = [0, -3]

    slide = only(change(path, edit))
    assert slide.pixel_size_um(0) == 0.25
    assert slide.levels[0].scale == (1, 1, 0.25, 0.25)
    assert len(slide.notes) == 1


def test_a_nonsense_translation_is_none(tmp_path):
    path = write_ome_zarr(tmp_path / "a.zarr", coordinates("yx", (8, 9)), "yx", levels=1, um=0.25)
    shift = {"type": "translation", "translation": [float("nan"), 3]}
    slide = only(
        change(path, lambda ome: ome["multiscales"][0]["datasets"][0]["coordinateTransformations"].append(shift))
    )
    assert (slide.pixel_size_um(0), slide.levels[0].translation) == (0.25, (0, 3))


@pytest.mark.parametrize(
    ("unit", "size", "um"),
    [
        ("nanometer", 500, 0.5),
        ("angstrom", 5000, 0.5),
        ("millimeter", 0.0005, 0.5),
        ("inch", 1e-5, 0.254),
        ("nm", 500, 0.5),
    ],
)
def test_units_of_length(tmp_path, unit, size, um):
    path = write_ome_zarr(tmp_path / "a.zarr", coordinates("yx", (8, 9)), "yx", levels=1, um=size)
    (path / "zarr.json").write_text((path / "zarr.json").read_text().replace("micrometer", unit))
    assert only(path).pixel_size_um(0) == pytest.approx(um)


GENERIC = ["Channel 0", "Channel 1", "Channel 2"]
COLOURS = ["FF0000", "00FF00", "0000FF"]


@pytest.mark.parametrize(
    ("labels", "colours", "dtype", "rgb"),
    [
        (["R", "G", "B"], None, "uint16", True),
        (["R", "G", "B", "A"], None, "uint8", True),
        (GENERIC, COLOURS, "uint8", True),
        (["", "", ""], COLOURS, "uint8", True),
        (["0", "1", "2"], [colour.lower() for colour in COLOURS], "uint8", True),
        (GENERIC, [f"#{colour}FF" for colour in COLOURS], "uint8", True),
        (GENERIC, COLOURS, "uint16", False),
        (GENERIC, COLOURS[::-1], "uint8", False),
        (["DAPI", "GFP", "RFP"], COLOURS, "uint8", False),
        ([*GENERIC, "Channel 3", "Channel 4"], [*COLOURS, "FFFFFF", "00FFFF"], "uint8", False),
    ],
)
def test_colours_are_known_by_their_labels_or_omeros_colours(tmp_path, labels, colours, dtype, rgb):
    channels = [{"label": label, **({"color": colour} if colour else {})} for label, colour in
                zip(labels, colours or [None] * len(labels), strict=True)]  # fmt: skip
    pixels = coordinates("cyx", (len(labels), 8, 9), dtype)
    slide = only(write_ome_zarr(tmp_path / "a.zarr", pixels, levels=1, channels=channels))
    assert (slide.rgb, slide.alpha) == (rgb, len(labels) == 4)
    assert any("`channel`" in note for note in slide.notes) == (rgb and labels[0] not in ("", "R"))


@pytest.mark.parametrize(
    "omero", ["text", {"channels": "text"}, {"channels": [None, {"label": 3}]}, {"channels": None}]
)
def test_damaged_channel_names_cost_no_image(tmp_path, omero):
    path = write_ome_zarr(tmp_path / "a.zarr", coordinates("cyx", (2, 8, 9)), levels=1)
    assert only(change(path, lambda ome: ome.update(omero=omero))).axes == "cyx"


def test_tables_are_no_images(tmp_path):
    root = zarr.open_group(str(tmp_path / "a.zarr"), mode="w")
    fill_ome_zarr(root.create_group("image"), None, coordinates("yx", (8, 9)), "yx", levels=1)
    table = root.create_group("cells", attributes={"encoding-type": "anndata", "encoding-version": "0.1.0"})
    table.create_array("X", shape=(8, 9), dtype="float32")
    root.create_array("spatial", shape=(8, 2), dtype="float32", attributes={"encoding-type": "array"})
    assert only(tmp_path / "a.zarr").path == "image"


def test_series_of_bioformats2raw_are_taken_or_named(tmp_path):
    root = zarr.open_group(str(tmp_path / "b.zarr"), mode="w", attributes={"ome": {"bioformats2raw.layout": 3}})
    root.create_group("OME", attributes={"ome": {"series": ["0", "1", "2", "3"]}})
    for series in ("0", "1", "2"):
        fill_ome_zarr(root.create_group(series), None, coordinates("yx", (8, 9)), "yx", levels=1)
    names = ("scan", "label image", "macro image", "scan 2")
    images = "".join(f'<Image ID="Image:{i}" Name="{name}"><Pixels/></Image>' for i, name in enumerate(names))
    (tmp_path / "b.zarr" / "OME" / "METADATA.ome.xml").write_text(f"<OME>{images}</OME>")
    scan, lost = find_images(tmp_path / "b.zarr")
    assert (scan.path, scan.notes) == ("0", ("left out beside the scan: label image, macro image",))
    assert (lost.name, lost.reason) == ("b.zarr/3", "listed in the metadata, but not in the store")
    root.create_group("3")
    assert find_images(tmp_path / "b.zarr")[1].reason == "listed in the metadata, but holds no image"


def test_chunks_that_are_not_stored_are_ground_of_fill_null(tmp_path):
    pixels = coordinates("yx", (32, 32), "uint8")
    path = write_ome_zarr(tmp_path / "a.zarr", pixels, "yx", "0.4", levels=1, chunk=16)
    about = json.loads((path / "0" / ".zarray").read_text())
    (path / "0" / ".zarray").write_text(json.dumps({**about, "fill_value": None}))
    (path / "0" / "0.0").unlink()
    pixels[:16, :16] = 0
    np.testing.assert_array_equal(read(only(path), 0, (0,), 0, Box(0, 0, 32, 32))[0], pixels)


def test_an_image_without_a_chunk_is_noted(tmp_path):
    path = write_ome_zarr(tmp_path / "a.zarr", np.zeros((1, 8, 9), "uint8"), levels=1)
    assert only(path).notes == ("no chunk of its pixels is stored, so all have the fill value",)


@pytest.mark.parametrize(
    ("zarr_format", "separator", "found"), [(2, ".", "1/0"), (2, "/", "1.0"), (3, ".", "c/1/0"), (3, "/", "c.1.0")]
)
def test_chunks_under_other_names_than_the_metadata_say_are_no_ground(tmp_path, zarr_format, separator, found):
    names = {"name": "v2" if zarr_format == 2 else "default", "separator": separator}
    options = {"chunks": (4, 4), "zarr_format": zarr_format, "chunk_key_encoding": names}
    zarr.create_array(str(tmp_path / "a.zarr"), shape=(8, 8), dtype="uint8", **options)
    assert only(tmp_path / "a.zarr").notes[0].startswith("no chunk of its pixels is stored")
    chunk = tmp_path / "a.zarr" / found
    chunk.parent.mkdir(parents=True, exist_ok=True)
    chunk.write_bytes(b"chunk")
    assert f"found {found.split('/')[0]} (likely a wrong or missing separator" in only(tmp_path / "a.zarr").reason


def test_members_that_are_no_levels_are_named(tmp_path):
    path = write_ome_zarr(tmp_path / "a.zarr", coordinates("cyx", (2, 8, 9)), levels=2)
    group = zarr.open_group(str(path))
    fill_ome_zarr(group.create_group("other"), None, coordinates("cyx", (2, 8, 9)))
    group.create_array("7", shape=(8, 9), dtype="uint8")
    for name in ("labels", "tables"):
        group.create_group(name)
    (path / "notes").mkdir()
    assert only(path).notes == ("left out, as they are none of its levels: 7, other",)


@pytest.mark.parametrize("listed", [{}, {"wells": []}, {"wells": ["A/1"]}])
def test_a_plate_without_wells_is_named(tmp_path, listed):
    zarr.open_group(str(tmp_path / "a.zarr"), mode="w").attrs["ome"] = {"version": "0.5", "plate": listed}
    assert "expected a list of wells in its metadata" in only(tmp_path / "a.zarr").reason


def test_what_a_plate_or_a_well_does_not_list_is_noted(tmp_path):
    plate = write_plate(tmp_path / "plate.zarr", ["A/01"], ["0"])
    for path in ("A/01/1", "C/07/0", "overview", "tables/x"):
        fill_ome_zarr(zarr.open_group(str(plate)).create_group(path), None, coordinates("cyx", (2, 8, 9)), levels=1)
    field = only(plate)
    assert field.notes[:2] == (
        "left out, as the plate does not list them: C/07, overview/0",
        "left out, as the well does not list them: 1",
    )


def test_a_slash_at_the_end_of_a_listed_path_makes_no_other_path(tmp_path):
    plate = write_plate(tmp_path / "plate.zarr", ["A/01"], ["0"])
    change(plate, lambda ome: ome["plate"]["wells"][0].update(path="A/01/"))
    field = only(plate)
    assert (field.path, len(field.notes)) == ("A/01/0", 1)
    assert "no chunk" in field.notes[0]


def test_a_well_without_images_is_named(tmp_path):
    plate = write_plate(tmp_path / "plate.zarr", ["A/01", "B/02"], ["0"])
    zarr.open_group(str(plate))["A/01"].attrs["ome"] = {"version": "0.5", "well": {"images": []}}
    empty, field = find_images(plate)
    assert (empty.plate_position.well, field.plate_position.well) == ("A01", "B02")
    assert "expected a list of images in its metadata, found []" in empty.reason


def test_the_axes_of_an_image_are_its_own(tmp_path):
    path = write_ome_zarr(tmp_path / "a.zarr", coordinates("cyx", (2, 8, 9)), levels=1)
    assert "found `axes=zyx`" in only(path, axes="zyx").reason
    assert only(path, axes="cyx").axes == "cyx"


@pytest.mark.parametrize(
    ("axes", "reason"),
    [
        ([{"name": name} for name in "wyx"], "expected axes out of t, c, z, y, x, found an axis 'w'"),
        ([{"name": name} for name in "yyx"], "expected one axis y, found 2 in y, y, x"),
        ([{"name": name} for name in "zcy"], "expected one axis x, found 0 in z, c, y"),
        ([{"name": name} for name in "czyx"], "the axes czyx that its metadata list, found one of shape (3, 8, 9)"),
        ([{"type": "space"}] * 3, "expected a list of axes with names"),
        (5, "expected a list of axes with names in its metadata, found 5"),
    ],
)
def test_axes_that_cannot_be_used_are_refused_with_the_true_cause(tmp_path, axes, reason):
    path = write_ome_zarr(tmp_path / "a.zarr", coordinates("cyx", (3, 8, 9)), levels=1)
    assert reason in only(change(path, lambda ome: ome["multiscales"][0].update(axes=axes))).reason


def test_levels_without_pixels_are_named(tmp_path):
    path = write_ome_zarr(tmp_path / "a.zarr", coordinates("cyx", (2, 8, 9)), levels=2)
    zarr.open_group(str(path)).create_array("1", shape=(2, 0, 4), dtype="uint16", overwrite=True)
    slide = only(path)
    assert ([level.path for level in slide.levels], slide.notes) == (["0"], ("level 1 has no pixels and is left out",))
    change(path, lambda ome: ome["multiscales"][0]["datasets"].reverse())
    assert "expected an image with pixels, found shape (2, 0, 4)" in only(path).reason


@pytest.mark.parametrize(
    ("shape", "dtype", "note"),
    [
        ((1, 4, 4), "uint16", "uint16 of shape (1, 4, 4) is no resolution of uint16 of shape (2, 8, 9)"),
        ((2, 4, 4), "uint8", "uint8 of shape (2, 4, 4) is no resolution of uint16 of shape (2, 8, 9)"),
    ],
)
def test_levels_of_other_channels_or_types_are_left_out_and_said(tmp_path, shape, dtype, note):
    path = write_ome_zarr(tmp_path / "a.zarr", coordinates("cyx", (2, 8, 9)), levels=2)
    zarr.open_group(str(path)).create_array("1", shape=shape, dtype=dtype, overwrite=True)
    slide = only(path)
    assert ([level.path for level in slide.levels], slide.notes) == (["0"], (f"level 1 is left out, as its {note}",))


def test_levels_are_taken_from_the_largest_and_once(tmp_path):
    path = write_ome_zarr(tmp_path / "a.zarr", coordinates("cyx", (2, 16, 16)), levels=3)
    change(path, lambda ome: ome["multiscales"][0]["datasets"].reverse())
    change(path, lambda ome: ome["multiscales"][0]["datasets"].append(ome["multiscales"][0]["datasets"][0]))
    slide = only(path)
    assert [(level.path, level.shape[1]) for level in slide.levels] == [("0", 16), ("1", 8), ("2", 4)]
    assert slide.notes == ("level 2 is listed twice", "its levels are not listed from the largest, but taken so")


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
        change(path, lambda ome: ome["multiscales"][0]["axes"][0].update(name="wavelength"))
    else:
        write_ome_zarr(path, coordinates("cyx", (1, 16, 16)))
        edits = {
            "mapping": lambda ome: ome.update(multiscales={"a": 1}),
            "null": lambda ome: ome.update(multiscales=None),
            "no-levels": lambda ome: ome["multiscales"][0].pop("datasets"),
        }
        change(path, edits[kind])
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("json", "cannot be read"),
        ("array", "`axes=czyx`"),
        ("no-datasets", "multiscale"),
        ("axes", "t, c, z, y, x"),
        ("mapping", "found {'a': 1}"),
        ("null", "found None"),
        ("no-levels", "a list of levels in its metadata"),
    ],
)
def test_what_cannot_be_used_says_why(tmp_path, kind, reason):
    broken = only(damaged(tmp_path, kind))
    assert isinstance(broken, UnreadableImage)
    assert reason in broken.reason
