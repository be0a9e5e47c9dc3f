"""Parts of slides are slides."""

import numpy as np
import pytest

from cellseg_batch.engine.geometry import Box
from tests.support.images import write_ome_zarr
from tests.support.slides import coordinates, only, read


@pytest.mark.parametrize("axes", ["cyx", "xy"])
def test_a_part_of_a_slide_is_a_slide_at_every_level(tmp_path, axes):
    shape = tuple({"c": 2, "y": 61, "x": 90}[axis] for axis in axes)
    whole = only(write_ome_zarr(tmp_path / "a.zarr", coordinates(axes, shape), axes, levels=3, um=0.5))
    part = whole.cropped(1, Box(8, 12, 20, 45))
    assert [part.plane_shape(level) for level in range(3)] == [(24, 66), (12, 33), (6, 17)]
    for level in range(3):
        height, width = part.plane_shape(level)
        y, x = (part.levels[level].origin[i] for i in (0, 1))
        expected = read(whole, level, (0,), 0, Box(y, x, y + height, x + width))
        np.testing.assert_array_equal(read(part, level, (0,), 0, Box(0, 0, height, width)), expected)
        assert part.levels[level].translation[part.axes.index("x")] == x * 0.5 * 2**level
    assert part.levels[1].origin == (8, 12)
