"""Zarr hierarchies in zip archives: the same images and pixels as unpacked, read only."""

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import numpy as np
import pytest
import zarr

from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.slides.discover import find_images
from cellseg_batch.engine.slides.reader import SlideReader
from tests.support.images import blobs, fill_ome_zarr, labels_of, write_ome_zarr, write_plate
from tests.support.originals import ORIGINALS
from tests.support.processes import TINY_RUN, kill_when
from tests.support.slides import only

STORES = [name for name in ORIGINALS if name.startswith(("ome-zarr", "plate", "array", "group", "bioformats", "label"))]


def pack(store, suffix=".zip", root="", compression=ZIP_STORED):
    """Move a store into an archive of the same name with ``suffix`` added; returns the archive."""
    archive = store.with_name(store.name + suffix)
    with ZipFile(archive, "w", compression) as members:
        for file in sorted(store.rglob("*")):
            if file.is_file():
                members.write(file, root + file.relative_to(store).as_posix())
    shutil.rmtree(store)
    return archive


@pytest.mark.parametrize("name", STORES)
def test_an_archive_holds_the_images_of_its_store(tmp_path, name):
    ORIGINALS[name](tmp_path)
    (store,) = tmp_path.iterdir()
    shutil.copytree(store, tmp_path / "copy" / "a.zarr")
    archive = pack(store)
    unpacked, packed = find_images(tmp_path / "copy" / "a.zarr"), find_images(archive)
    assert [slide.name for slide in packed] == [slide.name.replace("a.zarr", archive.name) for slide in unpacked]
    for one, other in zip(unpacked, packed, strict=True):
        as_file = replace(one, name=other.name, store=archive, format="zipped zarr", zarr_format=None)
        place = other.plate_position
        assert other == replace(as_file, holds_labels=False, plate_position=place)
        assert (place and (place.row, place.column)) == (
            one.plate_position and (one.plate_position.row, one.plate_position.column)
        )
        for level in range(len(one.levels)):
            whole = Box(0, 0, *one.plane_shape(level))
            with SlideReader(one, level, (0,)) as before, SlideReader(other, level, (0,)) as after:
                np.testing.assert_array_equal(after.read(0, whole), before.read(0, whole))


def test_boxes_are_read_by_several_threads_and_the_archive_may_be_compressed(tmp_path):
    pixels = blobs(300, 260)
    archive = pack(write_ome_zarr(tmp_path / "a.zarr", pixels), ".zip", "a.zarr/", ZIP_DEFLATED)
    draw = np.random.default_rng(0)
    for level in range(2):
        expected = pixels[:, :: 2**level, :: 2**level]
        corners = np.sort(draw.integers(0, expected.shape[1:], (20, 2, 2)), axis=1).tolist()
        boxes = [Box(y0, x0, y1 + 1, x1 + 1) for (y0, x0), (y1, x1) in corners]
        with SlideReader(only(archive), level, (0, 2)) as reader, ThreadPoolExecutor(4) as pool:
            read = pool.map(reader.decode, [0] * len(boxes), boxes)
            for box, found in zip(boxes, read, strict=True):
                np.testing.assert_array_equal(found, expected[:, *box.slices()][[0, 2]])


def test_labels_of_an_archived_plate_lie_beside_it(tmp_path, segment):
    archive = pack(write_plate(tmp_path / "a.zarr", ["A/1", "B/2"], ["0"], side=72), ".zip")
    before = archive.read_bytes()
    report = segment(archive, objects=True)
    assert (report.status, report.plates[0].wells) == ("done", 2)
    labels = "a.zarr.cellseg.zarr"
    assert {path.name for path in tmp_path.iterdir()} == {archive.name, labels, f"{labels}.cellseg"}
    assert archive.read_bytes() == before
    assert segment(archive, objects=True).slides[0].status == "skipped"


def test_a_killed_run_goes_on_and_a_conversion_has_the_same_pixels(tmp_path, segment, command, tiny_model):
    pixels = blobs(500, 300)
    archive = pack(write_ome_zarr(tmp_path / "a.zarr", pixels), ".zip")
    whole = segment(archive, output=tmp_path / "whole", block=64)
    line = [sys.executable, "-m", "cellseg_batch.engine.cli", "run", str(archive), "--model", str(tiny_model)]
    folder = tmp_path / "out"
    kill_when(
        [*line, *TINY_RUN, "--output", str(folder), "--workers", "1"],
        lambda: len([*folder.rglob("blocks/*/*.json")]) >= 3,
    )
    np.testing.assert_array_equal(labels_of(segment(archive, output=folder, block=64)), labels_of(whole))
    code, said = command("convert", archive, tmp_path / "b.zarr")
    assert code == 0, said
    np.testing.assert_array_equal(zarr.open_array(str(tmp_path / "b.zarr/0"), mode="r")[...], pixels)


def test_other_images_in_an_archive_are_named(tmp_path):
    group = zarr.open_group(str(tmp_path / "a.zarr"), mode="w")
    fill_ome_zarr(group.create_group("image"), tmp_path, blobs(64, 64))
    (tmp_path / "a.zarr" / "more").mkdir()
    (tmp_path / "a.zarr" / "more" / "b.tif").write_bytes(b"II")
    image, other = find_images(pack(tmp_path / "a.zarr"))
    assert image.name == "a.zarr.zip/image"
    assert (other.name, "lies in an archive; unpack it" in other.reason) == ("a.zarr.zip/more/b.tif", True)


def test_what_is_no_archive_is_named(tmp_path):
    (tmp_path / "a.zarr.zip").write_bytes(b"PK")
    with ZipFile(tmp_path / "b.ozx", "w") as members:
        members.writestr("readme.txt", "nothing")
    archive = pack(write_ome_zarr(tmp_path / "c.zarr", blobs(64, 64), levels=1))
    torn = tmp_path / "d.zarr.zip"
    torn.write_bytes(archive.read_bytes()[:-100])
    archive.unlink()
    reasons = [image.reason for image in find_images(tmp_path)]
    assert "a file that zipfile can read" in reasons[0]
    assert "a zarr group or array at the root of the archive" in reasons[1]
    assert "a file that zipfile can read" in reasons[2]
