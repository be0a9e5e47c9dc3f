"""Tiles that show nothing: what counts as nothing, that no object is lost with them, and that blocks do not matter."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellseg_batch.engine.inference.backends.gate import real_tiles
from cellseg_batch.engine.inference.backends.registry import make_backend
from cellseg_batch.engine.inference.background import FLAT, flat_limit
from cellseg_batch.engine.inference.cpu_predictor import CpuPredictor
from cellseg_batch.engine.inference.normalise import Bounds
from cellseg_batch.engine.models import load_model
from cellseg_batch.engine.storage.cache import Artefacts
from cellseg_batch.kernels import flat_reference
from cellseg_batch.kernels.flat import is_flat
from cellseg_batch.trainer.bundle import save_bundle
from cellseg_batch.trainer.card import Normalisation
from tests.support.images import blobs, labels_of, write_ome_zarr


@given(st.integers(8, 150), st.integers(8, 40), st.sampled_from(["u1", "u2", "f4"]), st.integers(0, 2**32 - 1))
def test_flatness_equals_its_reference(height, width, dtype, seed):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, rng.integers(2, 9), (rng.integers(1, 4), height, width)).astype(dtype)
    for limit in (0.0, 0.5, 1.0, 2.0):
        assert is_flat(pixels, limit) == flat_reference.is_flat(pixels, limit)
        assert is_flat(np.asfortranarray(pixels), limit) == is_flat(pixels, limit)


@pytest.mark.parametrize("place", [(0, 0), (30, 41), (13, 22)])
@pytest.mark.parametrize("step", [-40, 40])
def test_a_small_object_anywhere_is_seen(place, step):
    pixels = np.full((3, 37, 48), 100, np.uint8)
    assert is_flat(pixels, 1.0)
    assert not is_flat(pixels, 0.0)
    y, x = place
    pixels[1, y : y + 7, x : x + 7] += np.array(step).astype(np.uint8)
    assert not is_flat(pixels, 10.0)


def test_what_cannot_be_judged_is_not_flat():
    assert not is_flat(np.zeros((1, 7, 50)), 1.0)
    for odd in (np.nan, np.inf):
        pixels = np.zeros((1, 20, 20), np.float32)
        pixels[0, 19, 3] = odd
        assert not is_flat(pixels, 1.0)
        assert not flat_reference.is_flat(pixels, 1.0)


def test_fixed_bounds_say_nothing_of_a_slides_contrast():
    assert flat_limit(Bounds((10.0,), (110.0,)), Normalisation()) == pytest.approx(100 * FLAT)
    assert flat_limit(Bounds((10.0,), (110.0,)), Normalisation("fixed", (10.0,), (110.0,))) == 0


@pytest.mark.parametrize("base", [0.0, 0.5, 0.98])
def test_the_shipped_model_finds_nothing_in_what_is_flat(base):
    """Real nuclei of every kind, dimmed until they count as flat."""
    model = load_model("nuclei")
    backend = make_backend(model, "openvino", "fp32", 2, Artefacts())
    network = backend.compile((1, 3, 512, 512))
    for tile in real_tiles("gate", 3):
        dimmed = tile.copy()
        while not is_flat(dimmed, FLAT):
            dimmed *= np.float32(0.9)
        assert network(base + dimmed[None])[0, 0].max() < 0


@pytest.fixture(scope="module")
def percentile_model(tiny_bundle, tmp_path_factory):
    """The small random network, for slides that are normalised by what they show."""
    folder = tmp_path_factory.mktemp("percentile")
    card = tiny_bundle.card
    card = replace(card, input=replace(card.input, normalisation=Normalisation()))
    save_bundle(replace(tiny_bundle, card=card), folder)
    return str(folder)


@pytest.mark.parametrize(("dtype", "empty"), [("uint8", 12), ("uint16", 1200), ("float32", 0.5)])
def test_masks_and_skipped_tiles_do_not_depend_on_blocks(segment, percentile_model, tmp_path, dtype, empty):
    pixels = (blobs(330, 410) * (empty / 12)).astype(dtype)
    pixels[:, 170:, :] = empty
    slide = write_ome_zarr(tmp_path / "slide.zarr", pixels)
    reports = [
        segment(slide, model=percentile_model, name=f"b{block}", block=block, workers=workers)
        for block, workers in ((80, 1), (160, 3), (999, 1))
    ]
    assert len({report.slides[0].skipped_tiles for report in reports}) == 1
    assert 0 < reports[0].slides[0].skipped_tiles < reports[0].slides[0].tiles
    for report in reports[1:]:
        np.testing.assert_array_equal(labels_of(report), labels_of(reports[0]))
    every = segment(slide, model=percentile_model, name="off", skip_background="off")
    assert every.slides[0].skipped_tiles == 0
    np.testing.assert_array_equal(labels_of(reports[0])[:150], labels_of(every)[:150])
    assert segment(slide, model=percentile_model, name="off", skip_background="off").status == "skipped"
    refused = segment(slide, model=percentile_model, name="off")
    assert "`skip_background`" in refused.slides[0].reason


def test_an_empty_slide_and_its_probability(segment, watcher, percentile_model, tmp_path):
    pixels = np.full((1, 100, 200), 7, np.uint8)
    pixels[0, :5, :5] = 200
    slide = write_ome_zarr(tmp_path / "slide.zarr", pixels)
    report = segment(slide, model=percentile_model, probability=True, block=96)
    assert report.status == "done"
    assert report.slides[0].skipped_tiles == report.slides[0].tiles - 1
    assert not labels_of(report)[:, watcher.plans[-1].grid.lattice.core[1] :].any()


def test_objects_are_measured_beside_blocks_that_show_nothing(segment, percentile_model, tmp_path):
    pixels = blobs(330, 410)
    pixels[:, 170:, :] = 12
    slide = write_ome_zarr(tmp_path / "slide.zarr", pixels)
    report = segment(slide, model=percentile_model, objects=True, block=80)
    assert report.status == "done", report.slides[0].reason
    assert report.slides[0].skipped_tiles > report.slides[0].tiles / 4
    assert pq.read_table(report.slides[0].table).num_rows == report.slides[0].objects > 10


def test_a_slide_with_empty_borders_is_not_warmed_up_in_vain(segment, percentile_model, tmp_path, monkeypatch):
    pixels = np.full((3, 400, 400), 12, np.uint8)
    pixels[:, 180:220, 180:220] = blobs(400, 400)[:, 180:220, 180:220]
    computed, compute = [], CpuPredictor.predict

    def counting(self, pixels, block):
        computed.extend(block.tiles[:1])
        return compute(self, pixels, block)

    monkeypatch.setattr(CpuPredictor, "predict", counting)
    report = segment(write_ome_zarr(tmp_path / "slide.zarr", pixels), model=percentile_model, tile=96, block=1)
    (slide,) = report.slides
    assert 1 < len(computed) == 1 + slide.tiles - slide.skipped_tiles < slide.tiles
