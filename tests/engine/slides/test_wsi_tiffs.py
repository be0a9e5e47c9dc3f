"""Scans of the makers of TIFFs, on files made to their layouts: levels, sizes, channels, and the glass left out."""

import numpy as np
import pytest
import zarr

from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.slides.reader import SlideReader
from tests.support.images import blobs
from tests.support.slides import only
from tests.support.wsi_tiffs import write_bif, write_ndpi, write_qptiff, write_scn

COLOUR = np.ascontiguousarray(np.moveaxis(blobs(512, 384), 0, -1))
GREY = blobs(512, 384, 2)
GLASS = COLOUR[:60, :100]


@pytest.mark.parametrize(
    ("name", "write", "left_out"),
    [
        ("a.ndpi", write_ndpi, "Macro (60 x 100 x 3)"),
        ("a.scn", write_scn, "glass (60 x 100 x 3)"),
        ("a.bif", write_bif, "Label (60 x 100 x 3)"),
        ("a.qptiff", write_qptiff, "Thumbnail (30 x 50 x 3), Macro (60 x 100 x 3)"),
    ],
)
def test_every_box_of_every_level_is_as_it_was_written(tmp_path, command, name, write, left_out):
    in_colour = name != "a.qptiff"
    full = COLOUR if in_colour else GREY
    levels = [full[::step, ::step] if in_colour else full[:, ::step, ::step] for step in (1, 2, 4)]
    write(tmp_path / name, levels, GLASS)
    slide = only(tmp_path / name)
    assert [slide.pixel_size_um(level) for level in range(3)] == pytest.approx([0.25, 0.5, 1.0])
    assert (slide.rgb, slide.channels) == ((True, ()) if in_colour else (False, ("actin", "DAPI")))
    assert left_out in " ".join(slide.notes)
    draw = np.random.default_rng(0)
    for number, level in enumerate(levels):
        expected = np.moveaxis(level, -1, 0) if in_colour else level
        assert slide.plane_shape(number) == expected.shape[1:]
        corners = np.sort(draw.integers(0, expected.shape[1:], (20, 2, 2)), axis=1).tolist()
        with SlideReader(slide, number, tuple(range(len(expected)))) as reader:
            for (y0, x0), (y1, x1) in corners:
                box = Box(y0, x0, y1 + 1, x1 + 1)
                np.testing.assert_array_equal(reader.decode(0, box), expected[:, *box.slices()])
    code, said = command("convert", tmp_path / name, tmp_path / "b.zarr")
    assert code == 0, said
    expected = np.moveaxis(COLOUR, -1, 0) if in_colour else GREY
    np.testing.assert_array_equal(zarr.open_array(str(tmp_path / "b.zarr/0"), mode="r")[...], expected)
