"""CZI files that pylibCZIrw writes, and reads by boxes: scenes, planes, layers of pyramids, gaps."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zarr

from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.slides.discover import find_images
from cellseg_batch.engine.slides.reader import SlideReader
from tests.support.images import blobs, labels_of
from tests.support.processes import TINY_RUN, kill_when
from tests.support.scans import write_czi
from tests.support.slides import only, read

pytest.importorskip("pylibCZIrw.czi")

HEIGHT, WIDTH = 330, 250
# (T, Z, C, H, W)
STACK = np.stack([blobs(HEIGHT, WIDTH, 2, seed).astype("uint16") * 200 for seed in range(6)]).reshape(
    2, 3, 2, HEIGHT, WIDTH
)
COLOUR = np.ascontiguousarray(np.moveaxis(blobs(HEIGHT, WIDTH), 0, -1))


@pytest.mark.parametrize("pixels", [STACK, STACK[:1, :1], STACK[:1, :, :1].astype("float32"), COLOUR])
def test_every_box_of_every_level_is_as_it_was_written_from_several_threads(tmp_path, pixels):
    write_czi(tmp_path / "a.czi", [pixels, pixels[::-1]], steps=(1, 2, 4))
    slides = find_images(tmp_path / "a.czi")
    assert [slide.name for slide in slides] == ["a.czi/0", "a.czi/1"]
    for slide, expected in zip(slides, (pixels, pixels[::-1]), strict=True):
        assert (slide.dtype, slide.rgb) == (pixels.dtype.name, pixels.ndim == 3)
        assert [slide.pixel_size_um(level) for level in range(3)] == [0.25, 0.5, 1.0]
        planes = np.moveaxis(expected, -1, 0)[None] if slide.rgb else expected.reshape(-1, *expected.shape[2:])
        draw = np.random.default_rng(0)
        for level, step in enumerate((1, 2, 4)):
            height, width = slide.plane_shape(level)
            assert (height, width) == (HEIGHT // step, WIDTH // step)
            corners = np.sort(draw.integers(0, (height, width), (20, 2, 2)), axis=1).tolist()
            boxes = [Box(y0, x0, y1 + 1, x1 + 1) for (y0, x0), (y1, x1) in corners]
            numbers = draw.integers(0, slide.planes(level), len(boxes)).tolist()
            channels = tuple(range(slide.extent("c", level)))
            with SlideReader(slide, level, channels) as reader, ThreadPoolExecutor(4) as pool:
                for box, number, found in zip(boxes, numbers, pool.map(reader.decode, numbers, boxes), strict=True):
                    low = planes[number][:, ::step, ::step]
                    np.testing.assert_array_equal(found, low[:, *box.slices()])


def test_axes_channels_and_sizes(tmp_path):
    write_czi(tmp_path / "a.czi", [STACK], names=("actin", "DAPI"))
    slide = only(tmp_path / "a.czi")
    assert (slide.name, slide.axes, slide.channels) == ("a.czi", "tzcyx", ("actin", "DAPI"))
    assert slide.levels[0].shape == (2, 3, 2, HEIGHT, WIDTH)
    assert slide.levels[0].chunks == (1, 1, 1, 100, 100)
    assert slide.levels[0].scale == (1.0, 1.0, 1.0, 0.25, 0.25)
    assert slide.units == (None, "micrometer", None, "micrometer", "micrometer")
    assert slide.notes == ()


def test_gaps_and_layers_that_lack_tiles_are_said(tmp_path):
    write_czi(tmp_path / "a.czi", [COLOUR], steps=(1, 2), missing={4, 14})
    slide = only(tmp_path / "a.czi")
    assert "its tiles leave gaps, which read as 0" in slide.notes[0]
    assert "1/2 of its size" in slide.notes[1]
    assert len(slide.levels) == 1
    expected = COLOUR.copy()
    expected[100:200, 100:200] = 0
    np.testing.assert_array_equal(read(slide, 0, (0, 1, 2), 0, Box(0, 0, HEIGHT, WIDTH)), np.moveaxis(expected, -1, 0))


def test_a_killed_run_goes_on_and_a_conversion_has_the_same_pixels(tmp_path, segment, command, tiny_model):
    path = tmp_path / "a.czi"
    write_czi(path, [STACK[:1, :1]], steps=(1, 2))
    whole = segment(path, output=tmp_path / "whole", level=0, block=64)
    line = [sys.executable, "-m", "cellseg_batch.engine.cli", "run", str(path), "--model", str(tiny_model), *TINY_RUN]
    folder = tmp_path / "out"
    kill_when(
        [*line, "--level", "0", "--output", str(folder), "--workers", "1"],
        lambda: len([*folder.rglob("blocks/*/*.json")]) >= 3,
    )
    np.testing.assert_array_equal(labels_of(segment(path, output=folder, level=0, block=64)), labels_of(whole))
    code, said = command("convert", path, tmp_path / "b.zarr")
    assert code == 0, said
    np.testing.assert_array_equal(zarr.open_array(str(tmp_path / "b.zarr/0"), mode="r")[...], STACK[0, 0])
    assert only(tmp_path / "b.zarr").channels == ("DAPI", "GFP")


def test_planes_and_channels_that_cannot_be_one_image_are_named(tmp_path):
    from pylibCZIrw import czi

    grey = np.zeros((20, 20, 1))
    for name, types in (("planes", {0: "uint8", 2: "uint8"}), ("types", {0: "uint8", 1: "uint16"})):
        with czi.create_czi(str(tmp_path / f"{name}.czi")) as document:
            for channel, dtype in types.items():
                document.write(grey.astype(dtype), plane={"C": channel, "T": 0, "Z": 0})
            document.write_metadata("test")
    (tmp_path / "torn.czi").write_bytes((tmp_path / "planes.czi").read_bytes()[:500])
    reasons = {image.name.partition("/")[2]: image.reason for image in find_images(tmp_path)}
    assert "expected all 3 planes that its dimensions promise, found 1 missing" in reasons["planes.czi"]
    assert "2 of Gray16, Gray8" in reasons["types.czi"]
    assert "expected a file that pylibCZIrw can read" in reasons["torn.czi"]


def test_without_the_library_the_remedy_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.czi").write_bytes(b"ZISRAWFILE")
    monkeypatch.setitem(sys.modules, "pylibCZIrw.czi", None)
    assert "pip install 'cellseg-batch[czi]'" in only(tmp_path / "a.czi").reason
