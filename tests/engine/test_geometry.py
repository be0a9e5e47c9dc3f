"""The laws of the lattice: coverage, reflection, and what a block reads."""

import numpy as np
import pytest
from dask.array.core import normalize_chunks, slices_from_chunks
from hypothesis import given
from hypothesis import strategies as st

from cellseg_batch.engine.errors import UsageError
from cellseg_batch.engine.geometry import (
    Box,
    Lattice,
    chunk_side,
    fit_lattice,
    fit_squares,
    lay_blocks,
    reflect,
    source_box,
)


@st.composite
def lattices(draw, fits=(fit_lattice, fit_squares)):
    stride = draw(st.sampled_from([1, 8, 16]))
    lengths = st.integers(1, 30 * stride)
    margin = stride * draw(st.integers(0, 4))
    tile = 2 * margin + stride * draw(st.integers(1, 12)) + draw(st.integers(0, 5))
    fit = draw(st.sampled_from(fits))
    return fit((draw(lengths), draw(lengths)), tile, margin, stride), tile, stride


@given(lattices(), st.integers(1, 900), st.integers(1, 3))
def test_every_pixel_belongs_to_one_block_and_one_core(lattice, block, planes):
    lattice = lattice[0]
    by_block = np.zeros((planes, *lattice.shape), int)
    by_core = np.zeros((planes, *lattice.shape), int)
    grid = lay_blocks(lattice, block, planes)
    for number, one in enumerate(grid):
        assert one.index == number
        by_block[(one.plane, *one.box.slices())] += 1
        for tile in one.tiles:
            by_core[(one.plane, *tile.core.slices())] += 1
            assert tile.frame.shape == lattice.tile
    assert (by_block == 1).all()
    assert (by_core == 1).all()
    assert len(grid) == number + 1


def cost_of_squares(shape, tile, margin, stride):
    """What the fewest cores cost that tiles of no side above ``tile`` allow."""
    largest = (tile - 2 * margin) // stride * stride
    counts = [-(-length // largest) for length in shape]
    core = tuple(-(-length // (count * stride)) * stride for length, count in zip(shape, counts, strict=True))
    return Lattice(shape, core, margin).cost


@given(lattices((fit_lattice,)))
def test_tiles_use_their_area_well(fitted):
    lattice, tile, stride = fitted
    assert lattice.tile[0] * lattice.tile[1] <= tile * tile
    assert lattice.cost <= 1.025 * cost_of_squares(lattice.shape, tile, lattice.margin, stride)
    for length, core, count in zip(lattice.shape, lattice.core, lattice.grid, strict=True):
        assert core % stride == 0
        assert (count - 1) * core < length <= count * core


@pytest.mark.parametrize(
    ("shape", "core"),
    [
        ((8192, 8192), (1648, 1648)),
        ((32768, 32768), (1648, 1648)),
        ((2160, 2160), (1088, 2160)),
        ((300, 90000), (304, 6928)),
        ((2**31, 88), (3776, 96)),
    ],
)
def test_tiles_are_as_large_as_their_area_allows(shape, core):
    assert fit_lattice(shape, tile=1824, margin=64, total_stride=16).core == core


@pytest.mark.parametrize(
    ("shape", "side"),
    [((300, 300), 448), ((500, 700), 912), ((1080, 1080), 1360), ((4096, 4096), 1824), ((100_000, 88), 448)],
)
def test_squares_cost_little_more_than_the_best_of_four(shape, side):
    assert fit_squares(shape, tile=1824, margin=64, total_stride=16).tile == (side, side)


def test_slides_of_all_shapes_share_four_squares():
    shapes = {fit_squares((height, width), 1824, 64, 16).tile for height in range(9, 9000, 99) for width in (77, 3000)}
    assert shapes == {(448, 448), (912, 912), (1360, 1360), (1824, 1824)}
    assert fit_squares((5000, 5000), 150, 64, 16).tile == (144, 144), "smaller squares have no core"


@given(lattices(), st.integers(1, 900))
def test_blocks_are_those_of_dask(fitted, block):
    lattice = fitted[0]
    grid = lay_blocks(lattice, block)
    expected = slices_from_chunks(normalize_chunks(grid.block_shape, lattice.shape))
    assert [one.box.slices() for one in grid] == [(slice(y.start, y.stop), slice(x.start, x.stop)) for y, x in expected]


@given(lattices(), st.integers(1, 900), st.data())
def test_a_block_reads_all_that_its_tiles_see_and_no_more(fitted, block, data):
    lattice = fitted[0]
    grid = lay_blocks(lattice, block)
    one = grid[data.draw(st.integers(0, len(grid) - 1))]
    seen = np.zeros(lattice.shape, bool)
    for tile in one.tiles:
        rows = reflect(tile.frame.y0, tile.frame.y1, lattice.shape[0])
        columns = reflect(tile.frame.x0, tile.frame.x1, lattice.shape[1])
        seen[np.ix_(rows, columns)] = True
    outside = np.ones(lattice.shape, bool)
    outside[one.read_box.slices()] = False
    assert not seen[outside].any()
    assert seen[one.read_box.slices()].all()


@given(st.integers(1, 40), st.integers(0, 150), st.integers(0, 150))
def test_reflection_is_numpys(length, before, after):
    expected = np.pad(np.arange(length), (before, after), mode="reflect")
    np.testing.assert_array_equal(reflect(-before, length + after, length), expected)


def test_source_box_of_a_frame_far_outside_stays_inside():
    assert source_box(Box(-64, -64, 128, 128), (10, 1)) == Box(0, 0, 10, 1)


@given(st.integers(1, 200).map(lambda k: 16 * k))
def test_a_chunk_divides_its_core(core):
    side = chunk_side(core)
    assert core % side == 0
    assert side == core or side <= 1024


def test_small_fields_are_one_core():
    lattice = fit_lattice((1080, 1080), tile=1824, margin=64, total_stride=16)
    assert (lattice.core, lattice.grid) == ((1088, 1088), (1, 1))


@pytest.mark.parametrize(("tile", "margin", "setting"), [(128, 64, "tile"), (512, 60, "margin")])
def test_impossible_lattices_are_refused(tile, margin, setting):
    with pytest.raises(UsageError, match=f"`{setting}`"):
        fit_lattice((100, 100), tile, margin, 16)
