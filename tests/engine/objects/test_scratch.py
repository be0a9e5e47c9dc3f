"""What lies between two passes: pixels come back as they were, whole or as a neighbour's frame."""

import numpy as np
import pytest

from cellseg_batch.engine.errors import OutputError
from cellseg_batch.engine.geometry import Box, Lattice, lay_blocks
from cellseg_batch.engine.objects.scratch import Scratch


@pytest.mark.parametrize("frame", [0, 3, 40])
@pytest.mark.parametrize("shape", [(700, 90), (5, 300), (64, 64)])
def test_pixels_that_encode_their_place_come_back_from_every_block_of_a_window(tmp_path, shape, frame):
    grid = lay_blocks(Lattice(shape, (320, 32), 0), 1, planes=2)
    pixels = np.arange(2 * shape[0] * shape[1], dtype=np.uint32).reshape(2, *shape)
    scratch = Scratch(tmp_path, "codes", np.uint32, frame)
    scratch.create()
    for block in grid:
        scratch.write(block, pixels[(block.plane, *block.box.slices())])
    for block in grid:
        window = block.box.grown(frame)
        inside = window.within(Box(0, 0, *shape))
        found = np.zeros(inside.shape, np.uint32)
        times = np.zeros(inside.shape, int)
        for other in grid.touching(block.plane, window):
            for place, part in scratch.read(other, window):
                found[place.seen_from(inside).slices()] = part
                times[place.seen_from(inside).slices()] += 1
        np.testing.assert_array_equal(found, pixels[(block.plane, *inside.slices())])
        assert (times == 1).all()


def test_a_block_that_is_not_there_or_damaged_is_no_empty_block(tmp_path):
    (block,) = lay_blocks(Lattice((64, 64), (64, 64), 0), 64)
    scratch = Scratch(tmp_path, "codes", np.uint32, 2)
    assert not scratch.exists()
    scratch.create()
    assert scratch.exists()
    with pytest.raises(OutputError, match="No such file"):
        list(scratch.read(block, block.box))
    scratch.write(block, np.ones((64, 64), np.uint32))
    (file,) = tmp_path.rglob("*.lz4")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(OutputError):
        list(scratch.read(block, block.box))
    scratch.remove()
    assert not scratch.exists()
    assert not list(tmp_path.rglob("*.lz4"))
