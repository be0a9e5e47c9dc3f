"""Instances: the same ids and pixels however a slide is cut, equal to labelling it in one piece."""

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import ome_zarr.io
import ome_zarr.reader
import ome_zarr_models
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from cellseg_batch.engine.errors import UsageError
from cellseg_batch.engine.geometry import BlockGrid, Box, Lattice, fit_lattice, lay_blocks
from cellseg_batch.engine.inference.backends import cuda
from cellseg_batch.engine.inference.decoders import DECODERS
from cellseg_batch.engine.inference.normalise import Bounds
from cellseg_batch.engine.inference.prediction import PredictionRule
from cellseg_batch.engine.objects.merge import FinalIds, merge_seeds
from cellseg_batch.engine.objects.seeds import InstanceRule, number_seeds
from cellseg_batch.engine.profiling.bench_slides import Form, shipped_pieces, write_slide
from cellseg_batch.engine.reports.export_objects import export_objects
from cellseg_batch.engine.run import instance_passes as instances
from cellseg_batch.engine.run import pipeline
from cellseg_batch.engine.run.campaign import run as run_campaign
from cellseg_batch.engine.run.instance_passes import final_labels, keep_seeds
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.slides.ome_zarr import OUTPUT_MARK
from cellseg_batch.engine.storage.journal import Journal
from cellseg_batch.kernels import hover_reference, instances_reference
from cellseg_batch.kernels.hover import hover_rule
from cellseg_batch.kernels.instances import reach
from cellseg_batch.trainer.bundle import Bundle, save_bundle
from cellseg_batch.trainer.card import Hover, Instances, plain_output
from cellseg_batch.trainer.decode import decode_instances
from cellseg_batch.trainer.unet import load_network
from tests.support.hover_maps import crowded_nuclei, draw_maps, f1_of
from tests.support.images import blobs, check_table, labels_of, write_ome_zarr
from tests.support.networks import Alone, predictor_of
from tests.support.processes import kill_when

RULE = InstanceRule(Instances(smallest_seed=4, growth=3))


def in_one_piece(pixel_codes, core, rule):
    """The labels (planes, H, W) of whole planes, by the plain references."""
    labels, count = [], 0
    for plane in pixel_codes:
        codes = np.empty(plane.shape, np.uint32)
        first, _ = instances_reference.label_seeds(plane, core, rule.smallest_seed, (False,) * 4, codes)
        ids = np.zeros(plane.shape, np.uint32)
        instances_reference.grow(np.pad(codes, reach(rule.steps)), rule.steps, ids)
        labels.append(np.where(ids > 0, ids + count, 0))
        count += len(first)
    return np.stack(labels), count


class InMemory:
    """A scratch without files."""

    def __init__(self, pixel_codes, folder):
        self.codes = np.zeros(pixel_codes.shape, np.uint32)
        self.ids = folder

    def read(self, block, box):
        part = block.box.within(box)
        yield part, self.codes[(block.plane, *part.slices())]


def block_by_block(pixel_codes, grid, rule, folder):
    """The same through the engine's own steps."""
    scratch, records = InMemory(pixel_codes, folder), []
    for block in grid:
        place = (block.plane, *block.box.slices())
        scratch.codes[place], record = number_seeds(pixel_codes[place], block, grid, rule.smallest_seed)
        records.append((block, record))
    merged = merge_seeds(records, grid, rule.smallest_seed)
    merged.save(folder)
    labels = np.zeros(pixel_codes.shape, np.uint32)
    plan = SimpleNamespace(grid=grid, instances=rule)
    codes = SimpleNamespace(codes=scratch)
    slide = SimpleNamespace(plan=plan, scratch=codes, clock=SimpleNamespace(stage=lambda _: nullcontext()))
    for block in grid:
        labels[(block.plane, *block.box.slices())] = final_labels(slide, block.plane, block.box)
    return labels, merged


def noise(rng, shape):
    smooth = ndimage.gaussian_filter(rng.normal(size=shape), (0, 2, 2))
    return np.digitize(smooth / smooth.std(), [-0.5, 0.2, 0.7]).astype(np.uint8)


def checkerboard(rng, shape):
    return np.where(np.indices(shape).sum(0) % 2, 3, 2).astype(np.uint8)


def one_large(rng, shape):
    return np.where(ndimage.binary_erosion(np.ones(shape, bool)[0])[None], 3, 2).astype(np.uint8) * np.ones(shape, "u1")


def snake(rng, shape):
    rows, columns = np.indices(shape)[1:]
    ends = np.where(rows // 2 % 2, 0, shape[2] - 1)
    return np.where((rows % 2 == 0) | (columns == ends), 3, 0).astype(np.uint8)


PATTERNS = {"noise": noise, "checkerboard": checkerboard, "one large": one_large, "snake": snake}
PATTERNS["nothing"] = lambda rng, shape: np.zeros(shape, np.uint8)
PATTERNS["foreground without seeds"] = lambda rng, shape: np.full(shape, 2, np.uint8)


@given(
    st.sampled_from(sorted(PATTERNS)),
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(1, 2), st.integers(5, 70), st.integers(5, 70)),
    st.tuples(st.integers(4, 24), st.integers(4, 24)),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.integers(1, 6),
)
def test_blocks_give_what_one_piece_gives(tmp_path_factory, pattern, seed, shape, core, cores, smallest):
    rule = replace(RULE, card=replace(RULE.card, smallest_seed=smallest))
    pixel_codes = PATTERNS[pattern](np.random.default_rng(seed), shape)
    expected, count = in_one_piece(pixel_codes, core, rule)
    grid = BlockGrid(Lattice(shape[1:], core, 0), cores, shape[0])
    labels, merged = block_by_block(pixel_codes, grid, rule, tmp_path_factory.mktemp("ids"))
    np.testing.assert_array_equal(labels, expected)
    assert merged.objects == count
    assert set(np.unique(labels)) - {0} == set(range(1, count + 1)), "ids are contiguous"


def test_nuclei_drawn_as_hover_maps_come_back_however_their_slide_is_cut(tmp_path):
    truth = crowded_nuclei(500, 620, 420)
    maps = draw_maps(truth, noise=0.2)
    decoder, rule, bounds = DECODERS["hover"], InstanceRule(None, hover=Hover()), Bounds((-8.0,), (8.0,))
    margin = decoder.reach(rule)
    lattice = fit_lattice(truth.shape, 128, margin, 1)
    prediction = PredictionRule(lattice, (2, 3, *lattice.tile), "float32", bounds, 0.5, decoder=decoder, instances=rule)
    predictor = predictor_of(Alone(lambda batch, out=None: batch * 16 - 8), prediction)
    results = []
    for block in (120, 300):
        grid, codes = lay_blocks(lattice, block), np.empty((1, *truth.shape), np.uint8)
        for part in grid:
            codes[0][part.box.slices()] = predictor.predict(maps[:, *part.read_box.slices()], part).mask
        results.append((codes, *block_by_block(codes, grid, rule, tmp_path)))
    (codes, labels, merged), (other_codes, other_labels, _) = results
    np.testing.assert_array_equal(codes, other_codes)
    np.testing.assert_array_equal(labels, other_labels)

    shown = np.pad((maps + np.float32(8)) / 16, ((0, 0), (margin, margin), (margin, margin)), "reflect") * 16 - 8
    untiled = np.empty(truth.shape, np.uint8)
    place = np.array([[margin, margin, 0, 0, *truth.shape]])
    hover_reference.classify_maps(shown[None], place, hover_rule(0.0, 1, 0.05, -0.3), untiled)
    np.testing.assert_array_equal(codes[0], untiled, "tiles with a margin of the decoder's reach have no seams")
    in_one, count = in_one_piece(codes, lattice.core, rule)
    np.testing.assert_array_equal(labels, in_one)
    assert merged.objects == count
    assert f1_of(labels[0], truth, lattice.core) > 0.98
    assert f1_of(labels[0], decode_instances(maps, "hover", 0.5, Hover()), lattice.core) > 0.98


def test_an_object_as_large_as_three_blocks_has_one_id(tmp_path):
    pixel_codes = np.full((1, 12, 48), 0, np.uint8)
    pixel_codes[0, 3:9, 3:45] = 2
    pixel_codes[0, 5:7, 4:38] = 3
    grid = BlockGrid(Lattice((12, 48), (12, 16), 0), (1, 1), 1)
    labels, merged = block_by_block(pixel_codes, grid, RULE, tmp_path)
    assert merged.objects == 1
    assert labels[0, 6, 43] == 1, "two rounds of three steps from the seed"
    assert labels[0, 6, 44] == 0, "too far from it"


def test_nuclei_that_meet_at_a_corner_of_four_blocks_stay_two(tmp_path):
    pixel_codes = np.zeros((1, 32, 32), np.uint8)
    pixel_codes[0, 8:16, 8:16] = pixel_codes[0, 16:24, 16:24] = 3
    pixel_codes[0, 14:16, 16:18] = 2
    grid = BlockGrid(Lattice((32, 32), (16, 16), 0), (1, 1), 1)
    labels, merged = block_by_block(pixel_codes, grid, RULE, tmp_path)
    assert merged.objects == 2
    assert labels[0, 15, 15] == 1
    assert labels[0, 16, 16] == 2
    assert labels[0, 15, 16] == 1, "its left neighbour is asked before the one below"


def test_a_seed_too_small_in_each_block_may_be_large_enough_together(tmp_path):
    pixel_codes = np.zeros((1, 16, 32), np.uint8)
    pixel_codes[0, 4, 14:18] = 3
    pixel_codes[0, 9, 15:18] = 3
    grid = BlockGrid(Lattice((16, 32), (16, 16), 0), (1, 1), 1)
    labels, merged = block_by_block(pixel_codes, grid, RULE, tmp_path)
    assert merged.objects == 1
    np.testing.assert_array_equal(np.flatnonzero(labels[0, 4]), [14, 15, 16, 17])
    assert not labels[0, 9].any()


def test_ids_that_32_bits_cannot_hold_get_64():
    few, many = (FinalIds(np.array([n]), np.array([1]), *[np.zeros(0, np.int64)] * 3) for n in (2**32 - 3, 2**32 - 2))
    assert few.dtype == "uint32"
    assert many.dtype == "uint64"


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ids_above_32_bits_reach_labels_pyramid_and_tables(tmp_path, monkeypatch, segment, pixels, model, version):
    offset = 2**32 + 7

    def merged_late(*given):
        """The objects of a slide before which 2 ** 32 others came."""
        few = merge_seeds(*given)
        return replace(
            few, first_ids=few.first_ids + offset, targets=np.where(few.targets > 0, few.targets + offset, 0)
        )

    path = write_ome_zarr(tmp_path / "a.zarr", pixels, levels=3, version=version)
    expected = labels_of(segment(path, name="few", instances=True, model=model, block=64))
    monkeypatch.setattr(instances, "merge_seeds", merged_late)
    monkeypatch.setattr(FinalIds, "dtype", "uint64")
    report = segment(path, name="late", objects=True, model=model, block=64)
    labels = labels_of(report)
    assert labels.dtype == np.uint64
    np.testing.assert_array_equal(labels, np.where(expected > 0, expected + np.uint64(offset), np.uint64(0)))
    for level in (1, 2):
        smaller = labels_of(report, level=level)
        assert smaller.max() > offset
        assert set(np.unique(smaller)) <= set(np.unique(labels))
    table = pq.read_table(report.slides[0].table)
    ids = np.unique(labels)[1:].tolist()
    assert table["id"].to_pylist() == ids
    # scikit-image would need memory for every id up to these.
    few_ids = table.set_column(0, "id", [np.arange(1, len(ids) + 1)])
    check_table(few_ids, expected, pixels, ("red", "green", "blue"))
    out = tmp_path / "a.geojson"
    export_objects([path], "geojson", out, "late", None, None)
    assert [int(one["properties"]["name"]) for one in json.loads(out.read_text())["features"]] == ids


@pytest.fixture(scope="module")
def pixels():
    return blobs(300, 260)


@pytest.fixture(scope="module")
def bundle(tiny_bundle, pixels):
    """The small network with smooth foreground, distance that follows it, and hardly any border."""
    weights = {name: array.copy() for name, array in tiny_bundle.weights.items()}
    weights["head.bias"][:] = 0
    for row in range(12):  # four subpixels of each output
        weights["head.weight"][row] = (99, 0, 99)[row // 4] * tiny_bundle.weights["head.weight"][0]
    with torch.inference_mode():
        shown = torch.from_numpy(pixels[None, :, :256, :256] / 255).float()
        weights["head.bias"][:] = -load_network(replace(tiny_bundle, weights=weights))(shown)[0, 0].quantile(0.7)
    weights["head.bias"][4:8] = -8
    card = replace(
        tiny_bundle.card, instances=Instances(smoothing=0.7, seed_level=0.5, border_level=0.4, smallest_seed=4)
    )
    return Bundle(card, weights)


@pytest.fixture(scope="module")
def model(bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_bundle(bundle, folder)
    return str(folder)


def test_labels_do_not_depend_on_blocks_or_workers(tmp_path, monkeypatch, segment, watcher, pixels, model):
    path = write_ome_zarr(tmp_path / "a.zarr", pixels, levels=3)
    seen = []
    monkeypatch.setattr(pipeline, "keep_seeds", lambda *given: seen.append(given[2].copy()) or keep_seeds(*given))
    reports = [
        segment(path, name=f"cells{block}-{workers}", instances=True, model=model, block=block, workers=workers)
        for block, workers in ((1000, 1), (64, 1), (64, 4), (130, 4))
    ]
    labels = [labels_of(report) for report in reports]
    for report, other in zip(reports, labels, strict=True):
        assert report.slides[0].objects == labels[0].max() > 9
        np.testing.assert_array_equal(other, labels[0])
    assert labels[0].dtype == np.uint32
    plan = watcher.plans[0]
    assert len(plan.grid) == 1
    in_one, _ = in_one_piece(seen[0][None], plan.grid.lattice.core, plan.instances)
    np.testing.assert_array_equal(labels[0], in_one[0])
    mask = labels_of(segment(path, name="mask", model=model))
    assert not labels[0][mask == 0].any()
    assert reports[0].slides[0].unreached_pixels == np.count_nonzero(mask) - np.count_nonzero(labels[0])
    for level in (1, 2):
        assert set(np.unique(labels_of(reports[1], level=level))) <= set(np.unique(labels[0]))


@pytest.mark.slow
def test_real_nuclei_are_the_same_objects_however_their_slide_is_cut(tmp_path, watcher):
    path = write_slide(tmp_path / "a.zarr", Form(2600, levels=3), shipped_pieces())
    usual = Settings(objects=True, tile=640, backend="openvino", precision="fp32", gate=False, downscale=1)
    cuts = ((4096, 1), (2048, 1), (1024, 4))
    reports = [
        run_campaign([path], replace(usual, name=f"cells{block}-{workers}", block=block, workers=workers), watcher)
        for block, workers in cuts
    ]
    assert [report.slides[0].blocks for report in reports] == [1, 4, 9]
    labels, tables = labels_of(reports[0]), [pq.read_table(report.slides[0].table) for report in reports]
    pixels = zarr.open_array(str(path), path="0", mode="r")[...]
    check_table(tables[0], labels, pixels, ("red", "green", "blue"))
    assert len(tables[0]) > 1000
    for report, table in zip(reports, tables, strict=True):
        np.testing.assert_array_equal(labels_of(report), labels)
        assert table.equals(tables[0])
        assert set(np.unique(labels_of(report, level=2))) <= set(np.unique(labels))


def test_a_gpu_computes_the_logits_and_its_host_the_instances(tmp_path, monkeypatch, segment, pixels, model):
    monkeypatch.setattr(cuda, "available", lambda: True)
    monkeypatch.setattr(cuda, "Device", lambda name, real=cuda.Device: real("cpu"))
    path = write_ome_zarr(tmp_path / "a.zarr", pixels)
    gpu = {"backend": "torch-cuda", "precision": "fp16", "gate": False, "device": "cuda"}
    reports = [segment(path, name=f"cells{len(how)}", instances=True, model=model, **how) for how in ({}, gpu)]
    there, here = (labels_of(report) for report in reports)
    assert reports[1].backend == "torch-cuda"
    assert min(there.max(), here.max()) > 9
    assert ((there > 0) != (here > 0)).mean() < 0.05


def test_labels_and_scratch_that_a_run_leaves(tmp_path, segment, pixels, bundle, model, caplog):
    path = write_ome_zarr(tmp_path / "a.zarr", pixels)
    report = segment(path, instances=True, model=model, downscale=2)
    folder = tmp_path / "a.zarr.cellseg" / "labels" / "cellseg"
    assert not (folder / "scratch").exists()
    group = zarr.open_group(report.slides[0].labels, mode="r")
    assert "Label" in type(ome_zarr_models.open_ome_zarr(group)).__name__
    location = ome_zarr.io.parse_url(report.slides[0].labels)
    opened = [level.shape for node in ome_zarr.reader.Reader(location)() for level in node.data]
    assert (300, 260) in opened
    assert "invalid" not in caplog.text
    provenance = group.attrs[OUTPUT_MARK]
    assert provenance["kind"] == "instances"
    assert provenance["model"]["sha256"] == bundle.sha256
    assert provenance["instances"] == {"card": vars(bundle.card.instances), "downscale": 2, "hover": None}
    assert provenance["decoder"] == "seeds"
    skipped = segment(path, instances=True, model=model, downscale=2)
    assert (skipped.status, skipped.slides[0].objects) == ("skipped", report.slides[0].objects)
    assert "`instances` was on, now off" in segment(path, downscale=2, model=model).slides[0].reason


def test_labels_that_are_there_already_are_kept(tmp_path, segment, pixels, model):
    path = write_ome_zarr(tmp_path / "a.zarr", pixels[:, :90, :90])
    zarr.create_group(str(path / "labels" / "cellseg"))
    assert "choose another `name`" in segment(path, instances=True, model=model).slides[0].reason
    assert segment(path, instances=True, model=model, overwrite=True).slides[0].objects


def test_planes_share_one_row_of_ids(tmp_path, segment, model):
    path = write_ome_zarr(tmp_path / "a.zarr", np.stack([blobs(90, 100, 1, seed) for seed in (0, 1)], 1), "czyx")
    report = segment(path, instances=True, model=model, block=48)
    first, second = labels_of(report)
    assert first.max() + 1 == second[second > 0].min()
    assert second.max() == report.slides[0].objects


def test_a_model_without_distance_gives_components_of_its_mask(tmp_path, segment, pixels, bundle):
    architecture = {**bundle.card.architecture, "outputs": 1}
    card = replace(bundle.card, output=plain_output("foreground"), decoder="mask", architecture=architecture)
    weights = {name: array[:4] if name.startswith("head.") else array for name, array in bundle.weights.items()}
    save_bundle(replace(bundle, card=card, weights=weights), tmp_path / "semantic")
    model = str(tmp_path / "semantic")
    path = write_ome_zarr(tmp_path / "a.zarr", pixels)
    report = segment(path, instances=True, model=model)
    mask = labels_of(segment(path, name="mask", model=model))
    components = ndimage.label(mask)[0]
    large = np.bincount(components.ravel())[components] >= 4
    np.testing.assert_array_equal(labels_of(report) > 0, large & (mask > 0))
    assert report.slides[0].objects == len(np.unique(components[large & (mask > 0)]))
    provenance = zarr.open_group(report.slides[0].labels, mode="r").attrs[OUTPUT_MARK]
    assert provenance["decoder"] == "mask"


def test_a_model_with_hover_maps_gives_instances(tmp_path, segment, pixels, tiny_bundle):
    output, hover = plain_output("foreground", "horizontal", "vertical"), Hover(seed_level=-0.1, smallest_seed=2)
    card = replace(tiny_bundle.card, output=output, decoder="hover", hover=hover)
    save_bundle(replace(tiny_bundle, card=card), tmp_path / "hover")
    path, model = write_ome_zarr(tmp_path / "a.zarr", pixels), str(tmp_path / "hover")
    usual = {"instances": True, "model": model, "downscale": 2, "tile": 160}
    reports = [segment(path, name=f"cells{block}", block=block, **usual) for block in (32, 1000)]
    labels = [labels_of(report) for report in reports]
    np.testing.assert_array_equal(*labels)
    assert reports[0].slides[0].objects == labels[0].max() > 9
    mask = labels_of(segment(path, name="mask", model=model, downscale=2, tile=160))
    assert not labels[0][mask == 0].any()
    provenance = zarr.open_group(reports[0].slides[0].labels, mode="r").attrs[OUTPUT_MARK]
    assert provenance["instances"] == {"card": None, "downscale": 2, "hover": vars(card.hover)}
    usual |= {"margin": "exact", "downscale": 1}
    exact = [segment(path, name=f"exact {more}", **usual | {"instances": more}) for more in (True, False)]
    assert exact[0].margin - exact[1].margin == -(-9 // card.total_stride) * card.total_stride


def test_a_killed_run_goes_on_in_either_pass(tmp_path, model, segment):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(700, 700), chunk=128)
    expected = labels_of(segment(path, name="whole", instances=True, model=model))
    arguments = ["--model", model, "--backend", "torch", "--precision", "fp32", "--tile", 96, "--block", 64]
    arguments += ["--threads", 1, "--instances", "--quiet"]
    run = [sys.executable, "-m", "cellseg_batch.engine.cli", "run", str(path), *map(str, arguments)]
    journal = Journal(tmp_path / "a.zarr.cellseg" / "labels" / "cellseg")
    for part in ("blocks", "instances"):
        kill_when(run, lambda part=part: len(journal.numbers(part)) >= 5)
        assert not journal.is_finished, "it was killed too late to prove anything"
    report = segment(path, block=64, instances=True, model=model)
    assert report.status == "done"
    np.testing.assert_array_equal(labels_of(report), expected)


def test_blended_tiles_make_no_instances():
    with pytest.raises(UsageError, match="single tiles"):
        Settings(instances=True, stitch="blend")


def test_boxes_meet():
    box = Box(2, 3, 8, 9)
    assert box.grown(1) == Box(1, 2, 9, 10)
    assert box.within(Box(5, 0, 20, 5)) == Box(5, 3, 8, 5)
    assert box.within(Box(8, 0, 20, 5)).area == 0
    assert Box(5, 3, 8, 5).seen_from(box) == Box(3, 0, 6, 2)
