"""Instances of stars: the same however a slide is cut, equal to greedy suppression over the whole slide."""

import sys
from dataclasses import replace
from functools import partial, partialmethod

import numpy as np
import onnxruntime
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from onnx import helper
from PIL import Image
from skimage.segmentation import expand_labels

from cellseg_batch.engine.errors import OutputError, UsageError
from cellseg_batch.engine.inference.prediction import BlockResult
from cellseg_batch.engine.objects.stars import StarScratch, inside
from cellseg_batch.engine.reports.import_model import import_model
from cellseg_batch.engine.reports.verify import verify
from cellseg_batch.engine.reports.verify_seams import prove_seams
from cellseg_batch.engine.run import open_slide, pipeline, warm_up
from cellseg_batch.engine.run.star_passes import keep_stars
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.slides.ome_zarr import OUTPUT_MARK
from cellseg_batch.engine.slides.writer import ImageWriter
from cellseg_batch.engine.storage.journal import Journal
from cellseg_batch.kernels import stardist_reference
from cellseg_batch.kernels.stardist import OPEN, SURVIVOR, Stars, join
from cellseg_batch.trainer.bundle import Bundle, save_bundle
from cellseg_batch.trainer.card import Normalisation, StarDist, plain_output
from cellseg_batch.trainer.unet import load_network
from tests.support.graphs import write_graph
from tests.support.images import blobs, check_table, labels_of, write_ome_zarr
from tests.support.processes import kill_when

RAYS = 16
ANGLES = 2 * np.pi / RAYS * np.arange(RAYS)
RULE = StarDist(overlap=0.4, longest_ray=14)


def in_one_piece(stars, shape, core, rule=RULE):
    """The labels (H, W) of a whole plane by the plain references, and the number of objects."""
    stars = stars.take(stars.ranking())
    states = np.full(len(stars.y), OPEN, np.uint8)
    stardist_reference.suppress(stars, states, np.zeros(len(states), bool), rule.overlap)
    survivors = stars.take(states == SURVIVOR)
    ids, seen = np.arange(1, 1 + len(survivors.y), dtype=np.uint32), np.zeros(shape, np.uint32)
    stardist_reference.draw(survivors, ids, seen)
    objects = np.unique(seen[seen > 0]) - 1
    y, x = survivors.y[objects], survivors.x[objects]
    order = objects[np.lexsort((x, y, x // core[1], y // core[0]))]
    final = np.zeros(1 + len(ids), np.uint32)
    final[1 + order] = 1 + np.arange(len(order))
    return final[seen], len(order)


def ellipses(rng, shape, count, noise=0.5, step=2):
    """Candidates of touching discs and ellipses, on a grid of ``step`` px, as a network with errors gives them."""
    parts = []
    centres, radii = rng.uniform(0, 1, (count, 2)) * shape, rng.uniform(5, 10, (count, 2))
    for (y0, x0), (a, b), turn in zip(centres, radii, rng.uniform(0, np.pi, count), strict=True):
        y, x = (np.arange(int(at - 6) // step * step, at + 6, step) for at in (y0, x0))
        y, x = (values.ravel() for values in np.meshgrid(y, x, indexing="ij"))
        scale = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) / [[a], [b]]
        from_centre, along = (
            scale @ vectors for vectors in (np.array([y - y0, x - x0]), np.array([np.sin(ANGLES), np.cos(ANGLES)]))
        )
        probability = 1 - np.hypot(*from_centre)
        kept = (probability > 0.5) & (y >= 0) & (x >= 0) & (y < shape[0]) & (x < shape[1])
        # Where the ray leaves the ellipse: |from_centre + length * along| = 1.
        dot, square = from_centre[:, kept].T @ along, np.square(along).sum(0)
        rest = np.square(from_centre[:, kept]).sum(0)[:, None] - 1
        rays = (np.sqrt(dot**2 - square * rest) - dot) / square
        rays += rng.normal(0, noise, rays.shape)
        # Few levels, so that many ranks are ties.
        logits = np.round(8 * probability[kept] + rng.normal(0, noise, np.count_nonzero(kept)))
        parts.append(as_stars(y[kept], x[kept], logits, np.clip(rays, 1e-3, RULE.longest_ray)))
    stars = join(parts, RAYS)
    _, first = np.unique(np.stack([stars.y, stars.x]), axis=1, return_index=True)
    return stars.take(first)


def as_stars(y, x, logits, rays):
    return Stars(
        *(np.asarray(v).astype(t) for v, t in zip((y, x, logits, rays), ("i4", "i4", "f4", "f4"), strict=True))
    )


def line(length, along):
    """A chain of discs, each of which overlaps the next, whose ranks fall along it, against the order of blocks."""
    steps = np.arange(0, length, 8)[::-1]
    across = np.full(len(steps), 40)
    y, x = (across, steps) if along == "left" else (steps, across)
    return as_stars(y, x, np.arange(len(steps), 0, -1), np.full((len(steps), RAYS), 10.0))


class Known:
    """A predictor that knows the candidates of each plane."""

    def __init__(self, planes, rng):
        self.planes, self.rng = planes, rng

    def predict(self, pixels, block):
        stars = self.planes[block.plane]
        own = self.rng.permutation(np.flatnonzero(inside(stars.y, stars.x, block.box)))
        mask = np.zeros(block.box.shape, np.uint8)
        return BlockResult(mask, mask + np.uint8(200), 0, 0, stars=stars.take(own))


@pytest.fixture
def segment_known(tmp_path, monkeypatch, segment, watcher, model):
    """Run over a slide whose candidates are known; returns the labels and the report."""
    paths = {}

    def call(shape, *planes, **changes):
        key = shape, len(planes)
        if key not in paths:
            pixels = np.zeros((1, *shape), np.uint8)
            pixels, axes = (pixels, "cyx") if len(planes) == 1 else (np.stack([pixels] * len(planes), 1), "czyx")
            paths[key] = write_ome_zarr(tmp_path / f"{len(paths)}.zarr", pixels, axes, levels=1)
        predictor = Known(planes, np.random.default_rng(0))
        with monkeypatch.context() as patch:
            for module in (open_slide, warm_up):
                patch.setattr(module, "make_predictor", lambda *_: predictor)
            report = segment(paths[key], instances=True, model=model, tile=48, **{"overwrite": True, **changes})
        assert report.status == "done", report.slides[0].reason
        return labels_of(report), report.slides[0]

    return call


def star_bundle(tiny_bundle, **changes):
    """The small network with 16 rays of about 6 px, whose probability is high on a tenth of the blobs."""
    weights = {name: array.copy() for name, array in tiny_bundle.weights.items()}
    rows = np.array(weights["head.weight"][:4], np.float32)
    rays = np.concatenate([0.3 * np.roll(rows, ray, axis=1) for ray in range(RAYS)])
    weights["head.weight"] = np.concatenate([rows, rays]).astype(np.float16)
    weights["head.bias"] = np.repeat([0.0, 6.0], [4, 4 * RAYS]).astype(np.float16)
    card = replace(
        tiny_bundle.card,
        output=plain_output("probability", *(f"ray {ray}" for ray in range(1, 1 + RAYS))),
        decoder="stardist",
        architecture={**tiny_bundle.card.architecture, "outputs": 1 + RAYS},
        input=replace(tiny_bundle.card.input, normalisation=Normalisation()),
        stardist=RULE,
        **changes,
    )
    with torch.inference_mode():
        shown = torch.from_numpy(blobs(256, 256)[None] / np.float32(255))
        logits = load_network(Bundle(card, weights))(shown)[0, 0]
        weights["head.bias"][:4] = -float(logits.quantile(0.9))
    return Bundle(card, weights)


@pytest.fixture(scope="module")
def model(tiny_bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stars")
    save_bundle(star_bundle(tiny_bundle), folder)
    return str(folder)


def test_blocks_and_workers_give_greedy_suppression_over_the_whole_slide(segment_known, watcher):
    shape = (360, 330)
    stars = ellipses(np.random.default_rng(1), shape, 650)
    cuts = ((1000, 1), (32, 4), (70, 1))
    labels = [segment_known(shape, stars, block=block, workers=workers)[0] for block, workers in cuts]
    expected, count = in_one_piece(stars, shape, watcher.plans[0].grid.lattice.core)
    assert count > 400
    assert len(watcher.plans[1].grid) > 100
    for found in labels:
        np.testing.assert_array_equal(found, expected)


def test_stars_are_expanded_into_cells(segment_known):
    stars = ellipses(np.random.default_rng(1), (200, 200), 100)
    for block in (32, 1000):
        labels, slide = segment_known((200, 200), stars, block=block, expand=4.0)
        cells = zarr.open_array(f"{slide.outputs['cells']}/0", mode="r")[...]
        np.testing.assert_array_equal(cells, expand_labels(labels, 8))


@pytest.mark.parametrize("along", ["left", "up"])
def test_a_chain_across_many_blocks_is_decided_from_its_first_star(segment_known, watcher, along):
    shape = (80, 400) if along == "left" else (400, 80)
    stars = line(400, along)
    labels, slide = segment_known(shape, stars, block=32)
    assert len(watcher.plans[0].grid) >= 12
    expected, count = in_one_piece(stars, shape, watcher.plans[0].grid.lattice.core)
    assert count == slide.objects == 25, "every other star"
    np.testing.assert_array_equal(labels, expected)


def test_a_carpet_of_ties_is_decided_in_raster_order(segment_known, watcher):
    y, x = (4 * values.ravel() for values in np.mgrid[:30, :30])
    stars = as_stars(y, x, 0 * y, np.full((len(y), RAYS), 6.0))
    labels, _ = segment_known((120, 120), stars, block=32)
    expected, _ = in_one_piece(stars, (120, 120), watcher.plans[0].grid.lattice.core)
    np.testing.assert_array_equal(labels, expected)


def test_a_survivor_below_others_is_no_object(segment_known):
    # A disc, and four squares that meet at its centre; each of them covers about a third of it.
    rays = np.full((5, RAYS), 4.0)
    rays[1:] = 5.4 / np.maximum(abs(np.sin(ANGLES)), abs(np.cos(ANGLES)))
    stars = as_stars([30, 25, 25, 35, 35], [30, 25, 35, 25, 35], [1, 5, 4, 3, 2], rays)
    labels, slide = segment_known((64, 64), stars)
    assert slide.objects == labels.max() == 4


def test_planes_share_one_row_of_ids(segment_known):
    planes = [ellipses(np.random.default_rng(seed), (90, 100), 20) for seed in (1, 2)]
    (first, second), slide = segment_known((90, 100), *planes, block=32)
    assert first.max() + 1 == second[second > 0].min()
    assert second.max() == slide.objects


def test_cut_rays_are_noted(segment_known):
    stars = ellipses(np.random.default_rng(1), (90, 100), 20)
    stars.rays[0] = RULE.longest_ray
    stars.logits[0] = 99
    _, slide = segment_known((90, 100), stars)
    assert slide.notes[-1:] == ("1 objects with rays cut to the longest that the model's card allows",)


def test_a_run_gives_what_its_candidates_give_in_one_piece(tmp_path, monkeypatch, segment, watcher, model):
    pixels = blobs(220, 180)
    path = write_ome_zarr(tmp_path / "a.zarr", pixels, levels=3)
    seen = []
    monkeypatch.setattr(pipeline, "keep_stars", lambda *given: seen.append(given[2]) or keep_stars(*given))
    cuts = ((1000, 1), (64, 1), (64, 4))
    reports = [
        segment(path, name=f"cells{block}-{workers}", objects=True, model=model, block=block, workers=workers)
        for block, workers in cuts
    ]
    expected, count = in_one_piece(seen[0], (220, 180), watcher.plans[0].grid.lattice.core)
    tables = [pq.read_table(report.slides[0].table) for report in reports]
    assert len(watcher.plans[0].grid) == 1
    assert count > 50
    for report, table in zip(reports, tables, strict=True):
        np.testing.assert_array_equal(labels_of(report), expected)
        assert (report.slides[0].objects, report.slides[0].unreached_pixels) == (count, 0)
        assert report.slides[0].foreground_fraction == np.count_nonzero(expected) / expected.size
        assert table.equals(tables[0])
        assert set(np.unique(labels_of(report, level=2))) <= set(range(count + 1))
    check_table(tables[0], expected, pixels, ("red", "green", "blue"))
    provenance = zarr.open_group(reports[0].slides[0].labels, mode="r").attrs[OUTPUT_MARK]
    assert provenance["stars"]["card"] == vars(RULE)
    assert provenance["instances"] is None
    assert not list(tmp_path.rglob("scratch"))
    assert not verify([path], "cells64-4", None, 2).damages


CARD = """
[input]
channels = ["grey"]
normalisation = {kind = "fixed", low = 0, high = 255}
[stardist]
longest_ray = 14
[output]
decoder = "stardist"
threshold = 0.6
margin = 16
"""
TENSORS = {
    "two": 'tensors = [{name = "p", channels = ["probability"], activation = "sigmoid"}, {name = "d", channels = '
    f"{[f'ray {ray}' for ray in range(1, 9)]}}}]",
    "one": 'channels = ["probability", "rays"]\nactivation = "sigmoid"',
}


def write_stardist(path, outputs):
    """Write a StarDist-shaped graph of 8 rays, channels last, on a grid of 2 px: means of pixels become its outputs."""
    random = np.random.default_rng(0)
    weights = {
        "mean": np.full((1, 1, 6, 6), 1 / 36),
        "to_p": np.full((1, 1, 1, 1), 20.0),
        "p_bias": np.array([-8.0]),
        "to_d": random.uniform(-1, 2, (8, 1, 3, 3)),
        "d_bias": np.full(8, 6.0),
    }
    last = {"perm": [0, 2, 3, 1]}
    nodes = [
        helper.make_node("Transpose", ["x"], ["first"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["first", "mean"], ["means"], strides=[2, 2], pads=[2, 2, 2, 2]),
        helper.make_node("Conv", ["means", "to_p", "p_bias"], ["logits"]),
        helper.make_node("Conv", ["means", "to_d", "d_bias"], ["rays"], pads=[1, 1, 1, 1]),
        helper.make_node("Sigmoid", ["logits"], ["probability"]),
    ]
    if outputs == "one":
        nodes.append(helper.make_node("Concat", ["probability", "rays"], ["both"], axis=1))
        nodes.append(helper.make_node("Transpose", ["both"], ["y"], **last))
        names, gives = ("y",), ("n", "h2", "w2", 9)
    else:
        nodes.append(helper.make_node("Transpose", ["probability"], ["p"], **last))
        nodes.append(helper.make_node("Transpose", ["rays"], ["d"], **last))
        names, gives = ("p", "d"), ("n", "h2", "w2", None)
    weights = {name: values.astype(np.float32) for name, values in weights.items()}
    return write_graph(path, nodes, ("n", "h", "w", 1), gives, weights, outputs=names)


@pytest.mark.parametrize("outputs", ["two", "one"])
def test_a_stardist_graph_is_imported_and_gives_what_it_gives_untiled(tmp_path, segment, watcher, outputs):
    file = write_stardist(tmp_path / "a.onnx", outputs)
    (tmp_path / "card.toml").write_text(CARD + TENSORS[outputs])
    card = import_model(file, tmp_path / "bundle", tmp_path / "card.toml").card
    assert (card.output.stride, card.grid, len(card.decoded)) == (2, 2, 9)
    pixels = blobs(230, 190, 1)
    path = write_ome_zarr(tmp_path / "a.zarr", pixels, levels=1)
    usual = {"model": str(tmp_path / "bundle"), "objects": True, "tile": 96, "gate": False, "precision": "fp32"}
    cuts = ((64, 1, "onnxruntime"), (1000, 4, "onnxruntime"), (64, 4, "openvino"))
    reports = [
        segment(path, name=f"{backend}{block}", block=block, workers=workers, backend=backend, **usual)
        for block, workers, backend in cuts
    ]
    assert [report.status for report in reports] == ["done"] * 3, reports[0].slides[0].reason
    assert len(watcher.plans[0].grid) > 4
    padded = np.pad(pixels[0] / np.float32(255), 16, mode="reflect").astype(np.float32)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    values = np.concatenate(session.run(None, {"x": padded[None, ..., None]}), axis=3)[0, 8:-8, 8:-8]
    y, x = np.nonzero(values[..., 0] > 0.6)
    rays = np.clip(values[y, x, 1:], 1e-3, 14)
    probability = values[y, x, 0].astype(np.float64)
    stars = as_stars(2 * y, 2 * x, np.log(probability / (1 - probability)), rays)
    expected, count = in_one_piece(stars, (230, 190), watcher.plans[0].grid.lattice.core, card.stardist)
    labels = [labels_of(report) for report in reports]
    np.testing.assert_array_equal(labels[0], labels[1])
    assert count == reports[0].slides[0].objects > 30
    # Logits of another shape of tile, or of a rounded probability, differ in their last bits.
    for found in labels:
        assert np.mean((found > 0) != (expected > 0)) < 1e-3
    means = pq.read_table(reports[0].slides[0].table)["mean_probability"].to_numpy()
    assert 0.3 < means.mean() < 1
    del usual["objects"]
    mask = labels_of(segment(path, name="mask", block=64, backend="onnxruntime", **usual))
    high = (values[..., 0] > 0.6).repeat(2, axis=0).repeat(2, axis=1)
    assert np.mean(mask != high) < 1e-3
    assert prove_seams(path, Settings(**usual, backend="onnxruntime", margin="exact"), full=True, most=1).flipped == 0


@pytest.mark.parametrize("victim", ["stars", "survivors", "labels"])
def test_a_run_that_failed_in_any_pass_goes_on_to_the_same_bits(segment_known, monkeypatch, victim):
    stars = ellipses(np.random.default_rng(1), (200, 200), 200)
    expected, _ = segment_known((200, 200), stars, block=32, name="whole")
    left = 5

    def full(real, self, *given):
        nonlocal left
        left -= victim in (getattr(self, "name", ""), "labels")
        if left < 0:
            raise OutputError("a disk", expected="room", found="none", remedy="make room")
        real(self, *given)

    with monkeypatch.context() as patch:
        owner, name = (ImageWriter, "write") if victim == "labels" else (StarScratch, "write")
        patch.setattr(owner, name, partialmethod(partial(full, getattr(owner, name))))
        with pytest.raises(AssertionError, match="make room"):
            segment_known((200, 200), stars, block=32)
    labels, slide = segment_known((200, 200), stars, block=32, overwrite=False)
    assert slide.pixels < 200 * 200 if victim == "stars" else slide.pixels == 0
    np.testing.assert_array_equal(labels, expected)


@pytest.mark.slow
def test_a_run_that_is_killed_in_any_pass_goes_on_to_the_same_bits(tmp_path, model, segment):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(500, 500), chunk=128)
    expected = labels_of(segment(path, name="whole", instances=True, model=model))
    arguments = ["--model", model, "--backend", "torch", "--precision", "fp32", "--tile", 96, "--block", 32]
    arguments += ["--threads", 1, "--instances", "--quiet"]
    run = [sys.executable, "-m", "cellseg_batch.engine.cli", "run", str(path), *map(str, arguments)]
    folder = tmp_path / "a.zarr.cellseg" / "labels" / "cellseg"
    journal = Journal(folder)
    passes = {
        "blocks": lambda: journal.numbers("blocks"),
        "merge": lambda: list(folder.glob("scratch/survivors/*/*.stars")),
        "instances": lambda: journal.numbers("instances"),
    }
    for name, done in passes.items():
        kill_when(run, lambda done=done: len(done()) >= 5)
        assert len(journal.numbers("merge")) == (name == "instances")
        assert not journal.is_finished, "it was killed too late to prove anything"
    report = segment(path, block=32, instances=True, model=model)
    assert report.status == "done"
    np.testing.assert_array_equal(labels_of(report), expected)


def test_a_region_confines_masks_and_is_refused_for_stars(segment, model, tmp_path):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(120, 130), levels=1)
    Image.fromarray(np.tri(12, 13, dtype=np.uint8)).save(tmp_path / "mask.png")
    inside = np.kron(np.tri(12, 13, dtype=np.uint8), np.ones((10, 10), np.uint8))
    how = {"model": model, "tile": 48, "mask": tmp_path / "mask.png"}
    np.testing.assert_array_equal(
        labels_of(segment(path, **how)), labels_of(segment(path, **{**how, "mask": None}, name="whole")) * inside
    )
    with pytest.raises(UsageError, match="`mask`: expected a model whose objects grow from seeds"):
        segment(path, instances=True, **how)
