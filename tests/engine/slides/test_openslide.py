"""Scans that OpenSlide decodes, on files made to the layouts of DICOM, MIRAX and Sakura: every level, box by box."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zarr

from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.slides import openslide as adapter
from cellseg_batch.engine.slides.discover import find_images
from cellseg_batch.engine.slides.reader import SlideReader
from tests.support.images import blobs, labels_of
from tests.support.processes import TINY_RUN, kill_when
from tests.support.scans import write_dicom, write_mirax, write_svslide
from tests.support.slides import only, read

openslide = pytest.importorskip("openslide")
pytest.importorskip("pydicom")

FULL = np.ascontiguousarray(np.moveaxis(blobs(512, 256, seed=3), 0, -1))
LEVELS = [FULL[::step, ::step] for step in (1, 2, 4)]


def dicom(folder, **options):
    return write_dicom(folder, LEVELS, **options)[0]


def mirax(folder, **options):
    write_mirax(folder / "a.mrxs", LEVELS, **options)
    return folder / "a.mrxs"


def sakura(folder, **options):
    write_svslide(folder / "a.svslide", LEVELS, **options)
    return folder / "a.svslide"


@pytest.mark.parametrize(("write", "loss"), [(dicom, 0), (mirax, 0), (sakura, 4)])
def test_every_box_of_every_level_is_as_it_was_written_from_several_threads(tmp_path, write, loss):
    slide = only(write(tmp_path))
    assert (slide.axes, slide.dtype, slide.rgb) == ("yxc", "uint8", True)
    assert [slide.pixel_size_um(level) for level in range(3)] == [0.25, 0.5, 1.0]
    draw = np.random.default_rng(0)
    for level, written in enumerate(LEVELS):
        height, width = slide.plane_shape(level)
        assert (height, width) == written.shape[:2]
        with openslide.OpenSlide(str(slide.store)) as scan:
            expected = np.asarray(scan.read_region((0, 0), level, (width, height)))[..., :3]
        assert np.abs(expected.astype(int) - written).max() <= loss
        corners = np.sort(draw.integers(0, (height, width), (20, 2, 2)), axis=1)
        boxes = [Box(y0, x0, y1 + 1, x1 + 1) for (y0, x0), (y1, x1) in corners.tolist()]
        with SlideReader(slide, level, (0, 2)) as reader, ThreadPoolExecutor(4) as pool:
            for box, pixels in zip(boxes, pool.map(lambda box: reader.decode(0, box), boxes), strict=True):
                np.testing.assert_array_equal(pixels, np.moveaxis(expected[box.slices()], -1, 0)[[0, 2]])


def test_files_of_a_dicom_series_are_one_image_however_it_is_named(tmp_path):
    write_dicom(tmp_path, LEVELS[2:], series="1.2.826.0.1.5", kind="LABEL")[0].rename(tmp_path / "label.dcm")
    first, *others = write_dicom(tmp_path, LEVELS)
    write_dicom(tmp_path, LEVELS[2:], series="1.2.3")
    assert [slide.store.name for slide in find_images(tmp_path)] == ["1.2.3-0.dcm", first.name]
    slide = only(others[1])
    assert (slide.name, slide.store, slide.parts) == (first.name, first, (*others, tmp_path / "label.dcm"))
    assert slide.notes == ("left out beside the scan: label",)


def test_focal_planes_and_filters_that_are_not_read_are_said(tmp_path):
    assert only(sakura(tmp_path, planes=3)).notes == ("only the middle one of its 3 focal planes is read",)
    (tmp_path / "b").mkdir()
    path = mirax(tmp_path / "b")
    about = path.with_suffix("") / "Slidedat.ini"
    filters = "HIER_COUNT=2\nHIER_1_NAME=Slide filter level\nHIER_1_COUNT=4\n"
    about.write_text(about.read_text().replace("HIER_COUNT=1\n", filters, 1))
    assert "only the first of its 4 values of Slide filter level is read" in only(path).notes


@pytest.mark.parametrize("write", [dicom, mirax])
def test_what_was_not_scanned_is_white_and_said(tmp_path, write):
    slide = only(write(tmp_path, missing={(1, 2)}))
    assert "what was not scanned reads as #FFFFFF" in slide.notes
    expected = FULL.copy()
    expected[64:128, 128:192] = 255
    np.testing.assert_array_equal(read(slide, 0, (0, 1, 2), 0, Box(0, 0, 512, 256)), np.moveaxis(expected, -1, 0))


def test_pixels_of_a_level_between_those_of_level_0_do_not_depend_on_the_box(tmp_path, monkeypatch):
    monkeypatch.setattr(adapter, "_CELL", 32)
    slide = only(write_dicom(tmp_path, [FULL[:, :255], LEVELS[1][:, :127]])[0])
    whole = read(slide, 1, (0, 1, 2), 0, Box(0, 0, 256, 127))
    assert np.abs(whole.astype(int) - np.moveaxis(LEVELS[1][:, :127], -1, 0)).mean() < 4
    for box in (
        Box(0, 0, 256, 127),
        Box(31, 33, 90, 71),
        Box(200, 100, 256, 127),
        Box(64, 64, 96, 96),
        Box(7, 7, 8, 8),
    ):
        np.testing.assert_array_equal(read(slide, 1, (0, 1, 2), 0, box), whole[:, *box.slices()])


def test_a_damaged_tile_costs_its_blocks_alone(tmp_path, segment):
    path = mirax(tmp_path)
    whole = segment(path, output=tmp_path / "whole", level=0, block=64)
    data = tmp_path / "a" / "Data0000.dat"
    content = bytearray(data.read_bytes())
    pixels = content.index(b"IDAT")
    content[pixels : pixels + 200] = b"\xff" * 200
    data.write_bytes(content)
    damaged = segment(path, output=tmp_path / "out", level=0, block=64)
    assert (damaged.status, "readable pixels" in damaged.slides[0].reason) == ("failed", True)
    done = [file for file in (tmp_path / "out").rglob("blocks/*/*.json") if "failed" not in file.parts]
    assert whole.slides[0].blocks - 4 <= len(done) < whole.slides[0].blocks, "a tile is seen by up to four blocks"


def test_a_killed_run_goes_on_and_a_conversion_has_the_same_pixels(tmp_path, segment, command, tiny_model):
    (tmp_path / "a").mkdir()
    path = dicom(tmp_path / "a")
    whole = segment(path, output=tmp_path / "whole", level=0, block=64)
    line = [sys.executable, "-m", "cellseg_batch.engine.cli", "run", str(path), "--model", str(tiny_model), *TINY_RUN]
    folder = tmp_path / "out"
    kill_when(
        [*line, "--level", "0", "--output", str(folder), "--workers", "1"],
        lambda: len([*folder.rglob("blocks/*/*.json")]) >= 3,
    )
    resumed = segment(path, output=folder, level=0, block=64)
    np.testing.assert_array_equal(labels_of(resumed), labels_of(whole))
    code, said = command("convert", path, tmp_path / "b.zarr")
    assert code == 0, said
    np.testing.assert_array_equal(zarr.open_array(str(tmp_path / "b.zarr/0"), mode="r")[...], np.moveaxis(FULL, -1, 0))
    assert only(tmp_path / "b.zarr").rgb


def test_what_is_no_whole_slide_is_named(tmp_path):
    import pydicom

    path = dicom(tmp_path)
    about = pydicom.dcmread(path)
    about.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    about.save_as(tmp_path / "ct.dcm")
    assert "found CT Image Storage" in only(tmp_path / "ct.dcm").reason
    (tmp_path / "b.dcm").write_bytes(b"nothing")
    (tmp_path / "b.mrxs").write_bytes(b"nothing")
    (tmp_path / "b.svslide").write_bytes(b"nothing")
    reasons = {image.name: image.reason for image in find_images(tmp_path) if hasattr(image, "reason")}
    assert sorted(name.rpartition("/")[2] for name in reasons) == ["b.dcm", "b.mrxs", "b.svslide", "ct.dcm"]


@pytest.mark.parametrize("missing", ["openslide", "pydicom"])
def test_a_library_that_is_not_installed_is_named_with_its_remedy(tmp_path, monkeypatch, missing):
    path = dicom(tmp_path)
    monkeypatch.delitem(sys.modules, missing)
    monkeypatch.setitem(sys.modules, missing, None)
    adapter._header.cache_clear()
    assert "pip install 'cellseg-batch[openslide]'" in only(path).reason
