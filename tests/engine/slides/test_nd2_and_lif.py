"""Files of microscopes in the layouts of ND2 and LIF: positions and series, planes, channels, colours."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr

from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.slides.discover import find_images
from cellseg_batch.engine.slides.reader import SlideReader
from tests.support.images import blobs, labels_of
from tests.support.microscopes import write_lif, write_nd2
from tests.support.processes import TINY_RUN, kill_when
from tests.support.slides import only

pytest.importorskip("nd2")
pytest.importorskip("liffile")

HEIGHT, WIDTH = 200, 150
# (T, P, Z, C, H, W)
STACK = np.stack([blobs(HEIGHT, WIDTH, 2, seed).astype("uint16") * 200 for seed in range(12)]).reshape(
    2, 2, 3, 2, HEIGHT, WIDTH
)
COLOUR = np.ascontiguousarray(np.moveaxis(blobs(HEIGHT, WIDTH), 0, -1))


def check_boxes(slide, planes):
    """Hold 20 boxes of a slide, read by four threads, against its planes (N, C, H, W)."""
    assert (slide.planes(0), slide.extent("c", 0), *slide.plane_shape(0)) == planes.shape
    draw = np.random.default_rng(0)
    corners = np.sort(draw.integers(0, planes.shape[2:], (20, 2, 2)), axis=1).tolist()
    boxes = [Box(y0, x0, y1 + 1, x1 + 1) for (y0, x0), (y1, x1) in corners]
    numbers = draw.integers(0, len(planes), len(boxes)).tolist()
    with SlideReader(slide, 0, tuple(range(planes.shape[1]))) as reader, ThreadPoolExecutor(4) as pool:
        for box, number, found in zip(boxes, numbers, pool.map(reader.decode, numbers, boxes), strict=True):
            np.testing.assert_array_equal(found, planes[number][:, *box.slices()])


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("pixels", [STACK, STACK[:, :1, :1], STACK[:1, :, :, :1].astype("uint8"), STACK[:1, :1, :1]])
def test_positions_of_an_nd2(tmp_path, pixels, compressed):
    write_nd2(tmp_path / "a.nd2", pixels, compressed=compressed)
    slides = find_images(tmp_path / "a.nd2")
    assert len(slides) == pixels.shape[1]
    for position, slide in enumerate(slides):
        assert (slide.dtype, slide.pixel_size_um(0), slide.notes) == (pixels.dtype.name, 0.25, ())
        assert slide.channels == ("DAPI", "GFP")[: pixels.shape[3]]
        assert "z" not in slide.axes or slide.levels[0].scale[slide.axes.index("z")] == 1.5
        check_boxes(slide, pixels[:, position].reshape(-1, *pixels.shape[3:]))


def test_an_nd2_in_colour_or_without_a_pixel_size(tmp_path):
    write_nd2(tmp_path / "a.nd2", COLOUR[None, None, None], um=None)
    slide = only(tmp_path / "a.nd2")
    assert (slide.axes, slide.rgb, slide.pixel_size_um(0), slide.units) == ("yxc", True, None, (None,) * 3)
    check_boxes(slide, np.moveaxis(COLOUR, -1, 0)[None])


def test_frames_that_an_nd2_lacks_are_named(tmp_path):
    write_nd2(tmp_path / "a.nd2", STACK[:, :1], recorded=4)
    assert "expected all 6 frames that its loops promise, found 4" in only(tmp_path / "a.nd2").reason
    (tmp_path / "b.nd2").write_bytes((tmp_path / "a.nd2").read_bytes()[:-50])
    assert "expected a file that nd2 can read" in only(tmp_path / "b.nd2").reason


def test_series_of_a_lif(tmp_path):
    stacks = [STACK[:, 0], STACK[:1, 0, :1, :1].astype("uint8"), STACK[0:1, 1]]
    series = [(f"s{number}", pixels) for number, pixels in enumerate(stacks)]
    write_lif(tmp_path / "a.lif", [*series, ("c", COLOUR)])
    *slides, colours = find_images(tmp_path / "a.lif")
    for slide, pixels in zip(slides, stacks, strict=True):
        assert (slide.dtype, slide.notes) == (pixels.dtype.name, ())
        assert slide.pixel_size_um(0) == pytest.approx(0.25)
        assert slide.channels == ("DAPI", "GFP")[: pixels.shape[2]]
        check_boxes(slide, pixels.reshape(-1, *pixels.shape[2:]))
    assert (colours.name, colours.axes, colours.rgb, colours.channels) == ("a.lif/3", "yxc", True, ())
    check_boxes(colours, np.moveaxis(COLOUR, -1, 0)[None])


@pytest.mark.parametrize("blue_first", [False, True])
@pytest.mark.parametrize("padding", [0, 2])
def test_colours_of_a_lif(tmp_path, padding, blue_first):
    write_lif(tmp_path / "a.lif", [("c", COLOUR)], padding=padding, blue_first=blue_first)
    check_boxes(only(tmp_path / "a.lif"), np.moveaxis(COLOUR, -1, 0)[None])


def test_series_that_are_no_slides_cost_no_others(tmp_path, segment):
    mosaic = 10
    write_lif(tmp_path / "a.lif", [("tiles", STACK[:, 0], mosaic), ("plane", STACK[:1, 0, :1])])
    tiles, plane = find_images(tmp_path / "a.lif")
    assert "M (2)" in tiles.reason
    assert "mosaic merged" in tiles.reason
    check_boxes(plane, STACK[0, 0, :1])
    report = segment(tmp_path / "a.lif")
    assert [slide.status for slide in report.slides] == ["failed", "done"]
    assert len([*tmp_path.glob("a.lif.cellseg/failed/cellseg/*.json")]) == 1
    retried = segment(tmp_path / "a.lif", retry_failed=True)
    assert [(Path(slide.path).name, slide.status) for slide in retried.slides] == [("0", "failed")]
    (tmp_path / "b.lif").write_bytes((tmp_path / "a.lif").read_bytes()[:100])
    assert "expected a file that liffile can read" in only(tmp_path / "b.lif").reason


@pytest.mark.parametrize("name", ["a.nd2", "a.lif"])
def test_a_killed_run_goes_on_and_a_conversion_has_the_same_pixels(tmp_path, segment, command, tiny_model, name):
    path, pixels = tmp_path / name, STACK[:1, 0]
    write_nd2(path, pixels[:, None], compressed=True) if name == "a.nd2" else write_lif(path, [("s", pixels)])
    whole = segment(path, output=tmp_path / "whole", block=64)
    line = [sys.executable, "-m", "cellseg_batch.engine.cli", "run", str(path), "--model", str(tiny_model), *TINY_RUN]
    folder = tmp_path / "out"
    kill_when([*line, "--output", str(folder), "--workers", "1"], lambda: len([*folder.rglob("blocks/*/*.json")]) >= 3)
    np.testing.assert_array_equal(labels_of(segment(path, output=folder, block=64)), labels_of(whole))
    code, said = command("convert", path, tmp_path / "b.zarr")
    assert code == 0, said
    slide = only(tmp_path / "b.zarr")
    assert (slide.axes, slide.channels) == ("czyx", ("DAPI", "GFP"))
    np.testing.assert_array_equal(zarr.open_array(str(tmp_path / "b.zarr/0"), mode="r")[...], pixels[0].swapaxes(0, 1))


@pytest.mark.parametrize(("name", "module"), [("a.nd2", "nd2"), ("a.lif", "liffile")])
def test_without_the_library_the_remedy_is_named(tmp_path, monkeypatch, name, module):
    (tmp_path / name).write_bytes(b"pixels")
    monkeypatch.setitem(sys.modules, module, None)
    assert f"pip install 'cellseg-batch[{name[2:]}]'" in only(tmp_path / name).reason
