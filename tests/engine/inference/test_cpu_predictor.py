"""Laws 2 and 3: a tiled result does not depend on blocks or batches, and equals the untiled one."""

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cellseg_batch.engine.geometry import fit_lattice, lay_blocks
from cellseg_batch.engine.inference.backends.torch_cpu import TorchBackend
from cellseg_batch.engine.inference.cpu_predictor import tile_logits
from cellseg_batch.engine.inference.decoders import DECODERS
from cellseg_batch.engine.inference.normalise import Bounds
from cellseg_batch.engine.inference.prediction import PredictionRule
from cellseg_batch.engine.inference.session import Session, compile_network
from cellseg_batch.engine.objects.stars import StarRule
from cellseg_batch.engine.stage_clock import StageClock
from cellseg_batch.kernels.stardist import SHORTEST_RAY, join
from cellseg_batch.kernels.stitch import sigmoid
from cellseg_batch.trainer.card import StarDist
from cellseg_batch.trainer.footprint import measure_footprint
from tests.support.networks import Alone, Filter, predictor_of


def run_blocks(image, lattice, block, batch, reach, stitch="crop"):
    """The mask of a whole image, block by block."""
    mask = np.full(image.shape[1:], 9, np.uint8)
    shape = (batch, 3, *lattice.tile)
    rule = PredictionRule(lattice, shape, "uint8", Bounds((0.0,), (255.0,)), 0.51, stitch=stitch)
    predictor = predictor_of(Alone(Filter(reach)), rule)
    for part in lay_blocks(lattice, block, ring=stitch == "blend"):
        pixels = image[(slice(None), *part.read_box.slices())]
        result = predictor.predict(pixels, part)
        mask[part.box.slices()] = result.mask
        assert result.foreground == result.mask.sum()
    return mask


@given(st.data())
def test_tiled_equals_untiled_whatever_the_blocks_and_batches(data):
    stride = data.draw(st.sampled_from([1, 8]), "stride")
    margin = stride * data.draw(st.integers(0, 3), "margin")
    tile = 2 * margin + stride * data.draw(st.integers(1, 5), "core")
    shape = data.draw(st.tuples(st.integers(1, 90), st.integers(1, 90)), "shape")
    lattice = fit_lattice(shape, tile, margin, stride)
    if lattice.grid[0] * lattice.grid[1] > 400:
        lattice = fit_lattice(shape, 16 * stride + 2 * margin, margin, stride)
    image = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 256, (3, *shape), dtype=np.uint8)
    padded = np.pad(image, ((0, 0), (margin, margin), (margin, margin)), mode="reflect")
    untiled = Filter(margin)((padded / np.float32(255)).astype(np.float32)[None])[0, 0]
    expected = untiled[margin : margin + shape[0], margin : margin + shape[1]]
    mask = run_blocks(image, lattice, data.draw(st.integers(1, 200)), data.draw(st.integers(1, 5)), margin)
    # The kernel multiplies by 1/255 where this divides by 255: no pixel away from the threshold may differ.
    decided = np.abs(expected - np.log(0.51 / 0.49)) > 1e-6
    np.testing.assert_array_equal(mask[decided], (expected > np.log(0.51 / 0.49))[decided])


@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from([(64, 1), (200, 2), (999, 3)]),
    st.sampled_from(["crop", "blend"]),
)
def test_masks_are_bit_identical_for_any_partition(height, width, how, stitch):
    lattice = fit_lattice((height, width), 56, 8, 8)
    image = np.random.default_rng(height).integers(0, 256, (1, height, width), dtype=np.uint8)
    np.testing.assert_array_equal(
        run_blocks(image, lattice, *how, reach=20, stitch=stitch),
        run_blocks(image, lattice, 1, 1, reach=20, stitch=stitch),
    )


class Constant:
    """A stand-in network whose logits say which tile of a run they are from."""

    def __init__(self):
        self.calls = 0

    def __call__(self, batch, out=None):
        self.calls += 1
        return np.full_like(batch[:, :1], self.calls)


def test_a_blend_fades_from_tile_to_tile_around_the_edge_of_their_cores():
    lattice = fit_lattice((48, 96), 80, 16, 16)
    assert (lattice.core, lattice.overlap) == ((48, 48), 32)
    thresholds = []
    for level in range(1, 32):
        threshold = 1 / (1 + np.exp(-(1 + (level - 0.5) / 32)))
        rule = PredictionRule(
            lattice, (1, 1, *lattice.tile), "uint8", Bounds((0.0,), (255.0,)), threshold, stitch="blend"
        )
        (block,) = lay_blocks(lattice, 999, ring=1)
        mask = predictor_of(Alone(Constant()), rule).predict(np.zeros((1, 48, 96), np.uint8), block).mask
        np.testing.assert_array_equal(mask, np.broadcast_to(mask[0], mask.shape))
        thresholds.append(int(np.argmax(mask[0])))
    # Tile 1 says 1, tile 2 says 2; between them the logit rises by 1/32 per px, centred on the edge at 48.
    assert thresholds == list(range(33, 64))


def test_a_block_without_tiles_is_background_and_its_nan_are_counted():
    lattice = fit_lattice((40, 50), 48, 8, 8)
    (block,) = lay_blocks(lattice, 999)
    pixels = np.ones((1, 40, 50), np.float32)
    pixels[0, 3, :7] = np.nan
    rule = PredictionRule(lattice, (1, 1, *lattice.tile), "float32", Bounds((0.0,), (1.0,)), 0.5, probability=True)
    result = predictor_of(Alone(Constant()), rule).predict(pixels, replace(block, tiles=()))
    assert (result.foreground, result.missing) == (0, 7)
    assert result.mask.shape == result.probability.shape == (40, 50)
    assert not result.mask.any()
    assert not result.probability.any()


def test_exact_margin_and_the_overlap_make_crop_and_blend_the_same():
    lattice = fit_lattice((150, 170), 96, 24, 8)
    image = np.random.default_rng(0).integers(0, 256, (1, 150, 170), dtype=np.uint8)
    reach = lattice.margin - lattice.overlap // 2
    cropped, blended = (run_blocks(image, lattice, 100, 2, reach, stitch) for stitch in ("crop", "blend"))
    np.testing.assert_array_equal(cropped, blended)


@settings(max_examples=8)
@given(st.integers(20, 150), st.integers(20, 150), st.integers(1, 3))
def test_exact_margin_makes_a_real_network_seamless(tiny_bundle, height, width, cores):
    card = tiny_bundle.card
    lattice = fit_lattice((height, width), 2 * card.exact_margin + cores * 16, card.exact_margin, card.total_stride)
    backend = TorchBackend(tiny_bundle, "fp32", threads=1)
    image = np.random.default_rng(width).integers(0, 256, (3, height, width), dtype=np.uint8)
    shape = (1, 3, *lattice.tile)
    rule = PredictionRule(lattice, shape, image.dtype, Bounds((0,), (255,)), 0.5)
    session = Session(compile_network(backend, shape, image.dtype))
    grid = lay_blocks(lattice, 10**6)
    margin, (rows, columns) = card.exact_margin, lattice.grid
    reach = [(margin, rows * lattice.core[0] - height + margin), (margin, columns * lattice.core[1] - width + margin)]
    padded = np.pad(image, ((0, 0), *reach), mode="reflect")[None] * np.float32(1 / 255)
    untiled = backend.compile(padded.shape)(padded.astype(np.float32))[0, 0]
    expected = untiled[margin : margin + height, margin : margin + width]
    tiled = np.empty((height, width), np.float32)
    for tile in grid[0].tiles:
        logits = tile_logits(session, rule, image, grid[0].read_box, [tile], StageClock())[0, 0]
        h, w = tile.core.shape
        tiled[tile.core.slices()] = logits[margin : margin + h, margin : margin + w]
    np.testing.assert_allclose(tiled, expected, atol=2e-5)


def test_footprint_of_known_networks():
    assert measure_footprint(torch.nn.Conv2d(1, 1, 7, padding=3), 1).exact_margin == 3
    strided = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 4, 2, 1), torch.nn.ConvTranspose2d(2, 1, 2, 2))
    footprint = measure_footprint(strided, 1)
    # An aligned pair of outputs sees the four inputs around it, one on either side.
    assert (footprint.total_stride, footprint.exact_margin) == (2, 2)


def values_on_a_grid(batch, out=None):
    """A stand-in network of 8 rays on a grid of 2 px; what it says of a point follows from the pixel there alone."""
    pixels = batch[:, :1, ::2, ::2]
    return np.concatenate([8 * pixels - 6, *(20 * abs(pixels - ray / 8) for ray in range(8))], axis=1)


@settings(max_examples=15)
@given(st.integers(1, 120), st.integers(1, 120), st.sampled_from([(1, 1), (64, 3), (999, 2)]))
def test_candidates_and_probability_of_a_grid_do_not_depend_on_tiles(height, width, how):
    block, batch = how
    lattice = fit_lattice((height, width), 56, 8, 8)
    image = np.random.default_rng(height).integers(0, 256, (1, height, width), dtype=np.uint8)
    rule = PredictionRule(
        lattice,
        (batch, 1, *lattice.tile),
        "uint8",
        Bounds((0.0,), (255.0,)),
        0.5,
        probability=True,
        decoder=DECODERS["stardist"],
        stars=StarRule(StarDist(longest_ray=15), rays=8, grid=2),
        grid=2,
    )
    predictor = predictor_of(Alone(values_on_a_grid), rule)
    grid = lay_blocks(lattice, block)
    results = [predictor.predict(image[(slice(None), *part.read_box.slices())], part) for part in grid]
    stars = join([result.stars for result in results], 8)
    normalised = image[None] * np.float32(1 / 255)
    logits = values_on_a_grid(normalised)[0]
    y, x = np.nonzero(logits[0] > 0)
    stars = stars.take(np.lexsort((stars.x, stars.y)))
    np.testing.assert_array_equal((stars.y, stars.x), (2 * y, 2 * x))
    np.testing.assert_array_equal(stars.rays, np.clip(logits[1:, y, x].T, SHORTEST_RAY, 15))
    expected = sigmoid(logits[0]).repeat(2, axis=0).repeat(2, axis=1)
    masks = predictor_of(Alone(values_on_a_grid), replace(rule, stars=None))
    for part, result in zip(grid, results, strict=True):
        inside = expected[part.box.slices()]
        np.testing.assert_allclose(result.probability, 255 * inside, atol=1)
        mask = masks.predict(image[(slice(None), *part.read_box.slices())], part)
        np.testing.assert_array_equal(mask.mask, inside > 0.5)
        assert mask.foreground == mask.mask.sum()
        assert mask.stars is None
