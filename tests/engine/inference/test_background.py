"""Tiles that show nothing: what counts as nothing, that no object is lost with them, and that blocks do not matter."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellseg_batch.engine.geometry import Box, Lattice, fit_lattice, lay_blocks
from cellseg_batch.engine.inference.backends.gate import real_tiles
from cellseg_batch.engine.inference.backends.registry import make_backend
from cellseg_batch.engine.inference.background import FLAT, flat_limit, shows_little, without_background
from cellseg_batch.engine.inference.cpu_runner import Runner, no_foreground
from cellseg_batch.engine.inference.normalise import Bounds
from cellseg_batch.engine.models import load_model
from cellseg_batch.engine.run import lifecycle as prepare
from cellseg_batch.engine.run import slide_plan as plan
from cellseg_batch.engine.stage_clock import StageClock
from cellseg_batch.engine.storage.cache import Artefacts
from cellseg_batch.engine.storage.journal import Journal
from cellseg_batch.kernels import flat_reference
from cellseg_batch.kernels.flat import is_flat
from cellseg_batch.trainer.bundle import Normalisation, save_bundle
from tests.support.images import blobs, labels_of, write_ome_zarr
from tests.support.networks import Filter, feed_of


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
    assert flat_limit(Bounds(10.0, 110.0), Normalisation()) == pytest.approx(100 * FLAT)
    assert flat_limit(Bounds(10.0, 110.0), Normalisation("fixed", 10.0, 110.0)) == 0


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
    save_bundle(replace(tiny_bundle, card=replace(tiny_bundle.card, normalisation=Normalisation())), folder)
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
    assert "flat was 0.0" in refused.slides[0].reason


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
    computed, compute = [], Runner.segment
    monkeypatch.setattr(Runner, "segment", lambda *block: computed.append(1) or compute(*block))
    report = segment(write_ome_zarr(tmp_path / "slide.zarr", pixels), model=percentile_model, tile=96, block=1)
    (slide,) = report.slides
    assert 0 < len(computed) == slide.tiles - slide.skipped_tiles < slide.tiles


def trimmed_tile(shape, core, *objects):
    """The frame of the only tile of a slide, with a margin of 64 px, that shows objects (row, column) of 12 px."""
    pixels = np.full((1, *shape), 9, np.uint8)
    for y, x in objects:
        pixels[0, y : y + 12, x : x + 12] = 200
    lattice = Lattice(shape, (core, core), 64)
    (block,) = lay_blocks(lattice, core)
    (tile,) = without_background(block, pixels, lattice, 2.0, trim=True).tiles
    assert tile.core == tile.frame.grown(-64).within(Box(0, 0, *shape))
    return tile.frame


def test_a_tile_is_cut_where_nothing_is_seen_but_for_a_margin_and_a_rim():
    whole = Box(-64, -64, 704, 704)
    assert trimmed_tile((640, 640), 640, (500, 300)) == Box(192, 192, 704, 704)
    assert trimmed_tile((640, 640), 640, (256 + 32, 300), (620, 300)).y0 == 192
    assert trimmed_tile((640, 640), 640, (256 + 31, 300), (620, 300)).y0 == 64
    assert trimmed_tile((640, 640), 640, (40, 100)) == Box(-64, -64, 192, 448)
    assert trimmed_tile((640, 640), 640, (0, 0), (628, 628)) == whole
    # Mirrored pixels count: the object is seen again on the other side of the slide's lower edge.
    assert trimmed_tile((500, 640), 640, (480, 0), (480, 628)) == Box(192, -64, 704, 704)


@given(st.data())
def test_trimmed_tiles_give_the_mask_of_whole_ones(data):
    height, width = data.draw(st.tuples(st.integers(200, 900), st.integers(200, 900)), "shape")
    lattice = fit_lattice((height, width), data.draw(st.sampled_from([200, 420, 700]), "tile"), 16, 8)
    image = np.zeros((3, height, width), np.uint8)
    for _ in range(data.draw(st.integers(1, 4), "objects")):
        y, x = data.draw(st.integers(0, height - 8)), data.draw(st.integers(0, width - 8))
        image[:, y : y + 30, x : x + 30] = 250
    how = lattice, Bounds(0.0, 255.0), 0.51, False, "crop", StageClock()
    runner = Runner(feed_of(Filter(reach=16), (1, 3, *lattice.tile)), *how)
    for block in lay_blocks(lattice, data.draw(st.sampled_from([200, 999]), "block")):
        pixels = image[(slice(None), *block.read_box.slices())]
        shown = without_background(block, pixels, lattice, 3.0, trim=True)
        trimmed = runner.segment(pixels, shown) if shown.tiles else no_foreground(pixels, block, False)
        np.testing.assert_array_equal(trimmed.mask, runner.segment(pixels, block).mask)


def test_only_a_slide_that_shows_little_is_worth_it():
    full, empty = blobs(256, 256), np.full((3, 256, 256), 20, np.uint8)
    assert not shows_little([full], 2.5)
    assert not shows_little([full] * 9 + [empty], 2.5)
    assert shows_little([full] * 3 + [empty], 2.5)
    assert shows_little([np.dstack([full, empty[:, :, :130]])], 2.5)
    assert not shows_little([], 2.5)
    assert not shows_little([np.full((1, 256, 256), np.nan)], 2.5)


@pytest.fixture
def little(tmp_path):
    """A slide of nine tiles of 640 px, of which the outer ones show little."""
    pixels = np.full((3, 1800, 1700), 12, np.uint8)
    pixels[:, 520:1240, 400:1300] = blobs(720, 900)
    return write_ome_zarr(tmp_path / "a.zarr", pixels, levels=1, chunk=256)


def test_a_run_trims_tiles_and_goes_on_as_it_began(segment, watcher, percentile_model, little, monkeypatch):
    how = {"model": percentile_model, "tile": 640}
    masks = [labels_of(segment(little, name=f"b{block}", block=block, workers=2, **how)) for block in (1, 9999)]
    np.testing.assert_array_equal(*masks)
    every = labels_of(segment(little, name="off", skip_background="off", **how))
    assert [plan.trim for plan in watcher.plans] == [True, True, False]
    inside = np.s_[540:1220, 420:1280]
    np.testing.assert_array_equal(masks[0][inside], every[inside])
    assert masks[0][inside].any()
    seams = np.s_[:200]  # what was cut off is background, though this model finds something there
    assert every[seams].any()
    assert not masks[0][seams].any()
    journal = Journal(little.parent / "a.zarr.cellseg" / "labels" / "b1")
    for number in journal.numbers("blocks"):
        journal.forget("blocks", number)
    monkeypatch.setattr(plan, "shows_little", lambda sample, limit: False)
    resumed = segment(little, name="b1", **how)
    assert resumed.slides[0].status == "done"
    assert watcher.plans[-1].trim
    np.testing.assert_array_equal(labels_of(resumed), masks[0])


def test_instances_of_trimmed_tiles_are_those_of_whole_ones(segment, watcher, percentile_model, little):
    how = {"model": percentile_model, "tile": 640, "instances": True}
    trimmed, whole = (
        labels_of(segment(little, name=way, skip_background=way, **how))[540:1220, 420:1280] for way in ("auto", "off")
    )
    assert [plan.trim for plan in watcher.plans] == [True, False]
    np.testing.assert_array_equal(trimmed > 0, whole > 0)


@pytest.mark.parametrize("reason", ["batch", "few tiles", "no network for it"])
def test_tiles_are_left_whole_where_trimming_would_not_pay(
    segment, watcher, percentile_model, little, monkeypatch, reason
):
    if reason == "no network for it":
        monkeypatch.setattr(prepare, "flexible_form", lambda backend: None)
    changes = {"batch": {"batch": 2}, "few tiles": {"tile": 1200}}.get(reason, {})
    segment(little, model=percentile_model, **{"tile": 640, **changes})
    assert not watcher.plans[-1].trim
