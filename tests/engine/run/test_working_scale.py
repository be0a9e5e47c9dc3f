"""Images of large nuclei are downscaled for the model, and everything else holds as before."""

from dataclasses import replace

import numpy as np
import pytest

from cellseg_batch.engine.reports.verify_seams import prove_seams
from cellseg_batch.engine.run.working_scale import spread_windows
from cellseg_batch.engine.settings import Settings
from cellseg_batch.trainer.bundle import load_bundle, save_bundle
from cellseg_batch.trainer.scale import measure_objects, pick_downscale
from tests.support.images import blobs, labels_of, write_ome_zarr


def disks(side, radius):
    """(side, side) bool: disks of ``radius`` px in rows, apart from each other."""
    y, x = np.mgrid[:side, :side] % (3 * radius) - 1.5 * radius
    return y**2 + x**2 < radius**2


@pytest.mark.parametrize("radius", [6, 20])
def test_the_width_of_disks_is_their_diameter(radius):
    found = measure_objects([disks(21 * radius, radius)] * 2)
    assert found.width == pytest.approx(2 * radius, rel=0.1)
    assert found.share == pytest.approx(np.pi / 9, rel=0.1)


@pytest.mark.parametrize("shape", [(300, 1024), (603, 1272), (1025, 2049), (3071, 9001)])
def test_every_object_weighs_once_and_a_small_plane_is_seen_whole(shape):
    seen = np.zeros(shape, int)
    for window in spread_windows(shape):
        assert max(window.shape) <= 1024
        seen[window.y0 : window.y1, window.x0 : window.x1] += 1
    assert np.count_nonzero(seen > 1) <= 2 * sum(shape)
    assert shape[1] > 3072 or np.all(seen)


def test_nothing_has_no_width():
    assert measure_objects([np.zeros((5, 5), bool)]).width == measure_objects([]).width == 0


def test_the_largest_factor_at_which_objects_are_wide_enough_is_taken():
    looked = []

    def masks_of(diameter):
        def masks_at(factor):
            looked.append(factor)
            return [disks(300, diameter // factor // 2)]

        return masks_at

    rule = {"2": 15.0, "4": 29.0}
    assert pick_downscale(rule, masks_of(160)) == 4
    assert pick_downscale(rule, masks_of(64)) == 2
    assert looked == [4, 2, 4, 2, 1]
    looked.clear()
    assert pick_downscale(rule, masks_of(24)) == 1
    assert looked == [4], "what is far too narrow is not looked at again"
    assert pick_downscale({}, masks_of(160)) == 1


def test_a_crowd_that_melts_into_one_is_not_taken_for_large_nuclei():
    rule = {"2": 15.0, "4": 29.0}
    melting = {4: np.ones((40, 40), bool), 2: disks(80, 16), 1: disks(160, 5)}
    melting[1][::2] = False
    assert measure_objects([np.pad(melting[4], 1)]).width > 29
    assert measure_objects([melting[2]]).width > 15
    assert pick_downscale(rule, lambda factor: [np.pad(melting[factor], 1)]) == 1


def nuclei_image(side, radius):
    rng = np.random.default_rng(0)
    return np.where(disks(side, radius), 170, 20).astype(np.uint8)[None] + rng.integers(
        0, 20, (1, side, side), np.uint8
    )


@pytest.mark.parametrize(("radius", "factor"), [(7, 1), (30, 2), (80, 4)])
def test_the_shipped_model_is_shown_large_nuclei_downscaled(tmp_path, segment, radius, factor):
    path = write_ome_zarr(tmp_path / "a.zarr", nuclei_image(512, radius), axes="cyx")
    report = segment(path, model="nuclei", tile=1024)
    assert report.slides[0].downscale == factor
    overlap = np.count_nonzero((labels_of(report) > 0) & disks(512, radius))
    assert overlap > 0.9 * np.count_nonzero(disks(512, radius))


def test_large_nuclei_that_the_model_does_not_see_whole_are_large_nuclei():
    seen = {4: disks(120, 20), 2: disks(240, 40) & (np.arange(240) % 120 < 1), 1: np.zeros((480, 480), bool)}
    assert pick_downscale({"2": 15.0, "4": 29.0}, lambda factor: [seen[factor]]) == 4


def test_glands_with_nuclei_are_not_taken_for_large_nuclei():
    seen = {4: disks(120, 20), 2: disks(240, 40) & (np.arange(240) % 12 < 1), 1: np.zeros((480, 480), bool)}
    assert np.mean(seen[4]) > 4 * np.mean(seen[2]) > 0
    assert pick_downscale({"2": 15.0, "4": 29.0}, lambda factor: [seen[factor]]) == 1


@pytest.fixture
def downscaling_model(tiny_model, tmp_path):
    """The small model, which wants whatever it finds downscaled by two."""
    bundle = load_bundle(tiny_model)
    save_bundle(replace(bundle, card=replace(bundle.card, downscale={"2": 0.1})), tmp_path / "downscaling")
    return str(tmp_path / "downscaling")


def test_the_rule_gives_what_asking_for_it_gives(tmp_path, segment, downscaling_model, tiny_model):
    image = blobs(300, 200)
    paths = [write_ome_zarr(tmp_path / f"{name}.zarr", image) for name in "abc"]
    chosen = segment(paths[0], model=downscaling_model, tile=256)
    asked = segment(paths[1], model=str(tiny_model), tile=256, downscale=2)
    plain = segment(paths[2], model=downscaling_model, tile=256, downscale=1)
    assert [one.slides[0].downscale for one in (chosen, asked, plain)] == [2, 2, 1]
    np.testing.assert_array_equal(labels_of(chosen), labels_of(asked))
    assert (labels_of(chosen) != labels_of(plain)).any()


def test_a_downscaled_result_does_not_depend_on_blocks(tmp_path, segment, tiny_model):
    image = blobs(300, 200)
    results = []
    for number, block in enumerate((64, 128, 1024)):
        path = write_ome_zarr(tmp_path / f"{number}.zarr", image)
        results.append(labels_of(segment(path, model=str(tiny_model), tile=128, block=block, downscale=2)))
    for one in results[1:]:
        np.testing.assert_array_equal(one, results[0])


def test_a_finished_run_keeps_its_scale_and_another_is_refused(tmp_path, segment, downscaling_model):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(100, 120))
    assert segment(path, model=downscaling_model, tile=256).slides[0].downscale == 2
    again = segment(path, model=downscaling_model, tile=256).slides[0]
    assert (again.status, again.downscale) == ("skipped", 2)
    other = segment(path, model=downscaling_model, tile=256, downscale=1).slides[0]
    assert other.status == "failed"
    assert "`downscale` was 2, now 1" in other.reason


def test_a_tile_too_small_for_the_downscaled_margin_leaves_the_image_as_it_is(tmp_path, segment, tiny_model):
    bundle = load_bundle(tiny_model)
    card = replace(bundle.card, downscale={"2": 0.1}, margin=32)
    save_bundle(replace(bundle, card=card), tmp_path / "model")
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(100, 120))
    report = segment(path, model=str(tmp_path / "model"), tile=96)
    assert (report.status, report.slides[0].downscale) == ("done", 1)


def test_seams_are_exact_at_any_scale(tmp_path, tiny_model):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(500, 400))
    settings = Settings(model=str(tiny_model), backend="torch", precision="fp32", threads=1, tile=256, margin="exact")
    report = prove_seams(path, replace(settings, downscale=2), full=True, most=1)
    assert report.flipped == 0
    assert report.max_dp < 1e-5
