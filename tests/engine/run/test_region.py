"""Runs confined to a region of each image."""

import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cellseg_batch import segment as api_segment
from cellseg_batch.engine.errors import UsageError
from cellseg_batch.engine.run import slide_region
from cellseg_batch.engine.slides.region import open_region
from cellseg_batch.trainer.bundle import save_bundle
from cellseg_batch.trainer.card import Instances, ModelClass, plain_output
from tests.support.images import blobs, labels_of, write_ome_zarr
from tests.support.regions import feature, polygon, write_geojson
from tests.support.slides import only

HEIGHT, WIDTH = 420, 380
RAGGED = [(40.5, 30), (190, 12), (170, 120.3), (230, 150), (60, 210), (95, 110)]
HOLE = [(100, 60), (150, 60), (130, 100)]
SMALL = [(300, 350), (340, 350), (340, 395), (300, 395)]


@pytest.fixture
def confined(segment, tiny_bundle, tmp_path, monkeypatch):
    """Run with a model whose objects are components of the foreground, and small enough for a short reach."""
    monkeypatch.setattr(slide_region, "LARGEST_OBJECT", 48)
    card = replace(tiny_bundle.card, instances=Instances(seed_level=-1.0, smallest_seed=3, growth=1))
    save_bundle(replace(tiny_bundle, card=card), tmp_path / "model")
    return partial(segment, model=str(tmp_path / "model"), tile=64, skip_background="off")


@pytest.fixture
def image(tmp_path):
    return write_ome_zarr(tmp_path / "scan.zarr", blobs(HEIGHT, WIDTH))


@pytest.fixture
def ragged(tmp_path):
    return write_geojson(tmp_path / "region.geojson", polygon(RAGGED, HOLE), polygon(SMALL))


def pixels_inside(path, image, **options):
    slide = only(image)
    with open_region(path, slide, slide.plane_shape(0), **options) as region:
        return region.inside(slide_box(slide))


def slide_box(slide):
    return slide_region.Box(0, 0, *slide.plane_shape(0))


BLOCKS = [{"block": 48, "workers": 1}, {"block": 130, "workers": 3}, {"block": 1000, "workers": 1, "batch": 2}]


def test_a_mask_is_cut_at_the_pixel_and_tiles_outside_are_not_computed(confined, image, ragged, tmp_path):
    whole = confined(image, probability=True)
    inside = pixels_inside(ragged, image)
    expected = labels_of(whole) * inside
    for number, how in enumerate(BLOCKS):
        report = confined(image, mask=ragged, probability=True, name=f"part{number}", **how)
        (slide,) = report.slides
        np.testing.assert_array_equal(labels_of(report), expected)
        every, part = (np.asarray(pixels_of(one.slides[0].outputs["probability"])) for one in (whole, report))
        np.testing.assert_array_equal(part, every * inside)
        lattice = report.tile[0] - 2 * report.margin
        with_some = {(y // lattice, x // lattice) for y, x in np.argwhere(inside)}
        assert slide.tiles - slide.outside_tiles == len(with_some) < slide.tiles / 2
        assert slide.region_area == inside.sum()
        assert slide.foreground_fraction == pytest.approx(expected.astype(bool).mean())


def pixels_of(folder):
    import zarr

    return zarr.open_array(f"{folder}/0", mode="r")[...]


RULES = [Instances(seed_level=-1.0, smallest_seed=3, growth=1), Instances(seed_level=0.1, smallest_seed=4, growth=4)]


@pytest.mark.parametrize("rule", RULES)
def test_objects_whose_centroids_lie_inside_are_those_of_a_run_without_region(
    confined, image, ragged, rule, tiny_bundle, tmp_path
):
    save_bundle(replace(tiny_bundle, card=replace(tiny_bundle.card, instances=rule)), tmp_path / "rule")
    confined = partial(confined, model=str(tmp_path / "rule"))
    whole = confined(image, objects=True)
    labels, table = labels_of(whole), pq.read_table(whole.slides[0].table)
    inside = pixels_inside(ragged, image)
    y, x = (np.floor(np.asarray(table[f"centroid_{axis}"]) + 0.5).astype(int) for axis in "yx")
    kept = np.asarray(table["id"])[inside[y, x]]
    assert 10 < len(kept) < len(table) / 2
    new_ids = np.zeros(labels.max() + 1, labels.dtype)
    new_ids[kept] = np.arange(1, len(kept) + 1)
    expected = new_ids[labels]
    assert (expected[~inside] > 0).any()  # whole beyond the region
    assert ((expected == 0) & (labels > 0) & inside).any()  # others reach into it
    expected_table = table.filter(pa.array(inside[y, x]))
    for number, how in enumerate(BLOCKS):
        report = confined(image, objects=True, mask=ragged, name=f"part{number}", **how)
        (slide,) = report.slides
        assert (slide.status, slide.objects, slide.notes) == ("done", len(kept), ())
        assert 0 < slide.outside_tiles < slide.tiles
        np.testing.assert_array_equal(labels_of(report), expected)
        part = pq.read_table(slide.table)
        np.testing.assert_array_equal(part["id"], np.arange(1, len(kept) + 1))
        assert part.drop_columns("id").equals(expected_table.drop_columns("id"))


def test_objects_that_reach_beyond_what_is_computed_are_noted(confined, image, tmp_path):
    mask = write_geojson(tmp_path / "corner.json", polygon([(0, 0), (140, 0), (140, 140), (0, 140)]))
    # Every pixel is foreground and seed, so all of the image is one object.
    how = {"instances": True, "threshold": 1e-12, "mask": mask}
    reports = [confined(image, name=f"part{number}", **how, **blocks) for number, blocks in enumerate(BLOCKS)]
    labels = [labels_of(report) for report in reports]
    for report, written in zip(reports, labels, strict=True):
        (slide,) = report.slides
        assert 0 < slide.outside_tiles < slide.tiles
        assert slide.notes == (
            "1 objects too large to be computed whole around the region; their part there says whether they are in it",
        )
        np.testing.assert_array_equal(written, labels[0])
    assert (slide.objects, labels[0].max()) == (1, 1)


def test_a_killed_run_goes_on_with_the_same_region_and_refuses_another(confined, image, ragged, tmp_path, watcher):
    report = confined(image, objects=True, mask=ragged, name="straight", block=96)
    expected = labels_of(report)
    for tasks in (10, 20, 20):  # in the blocks, the centroids and the labels
        watcher.advanced = _killer(after=tasks)
        with pytest.raises(InterruptedError):
            confined(image, objects=True, mask=ragged, block=96)
    del watcher.advanced
    moved = tmp_path / "elsewhere.json"
    content = json.loads(ragged.read_text())
    moved.write_text(json.dumps(content, indent=2))
    other = write_geojson(tmp_path / "other.json", polygon(RAGGED))
    (slide,) = confined(image, objects=True, mask=other, block=96).slides
    assert slide.status == "failed"
    assert "mask_sha256 (`mask`) was" in slide.reason
    assert "area was" in slide.reason
    assert "region (`mask`) was on, now off" in confined(image, objects=True, block=96).slides[0].reason
    report = confined(image, objects=True, mask=moved, block=96)
    assert report.slides[0].status == "done"
    np.testing.assert_array_equal(labels_of(report), expected)
    (slide,) = confined(image, objects=True, mask=other, block=96).slides
    assert slide.status == "failed"
    os.utime(image / "0" / "zarr.json")  # the image's files were touched, but its pixels are the same
    assert confined(image, objects=True, mask=ragged, block=96).slides[0].status == "skipped"


def _killer(after):
    """An observer's ``advanced`` that ends the run after so many tasks."""
    tasks = []

    def advanced(task):
        tasks.append(task)
        if len(tasks) == after:
            raise InterruptedError

    return advanced


def test_masks_of_a_folder_go_to_images_by_name(confined, tmp_path):
    folder = tmp_path / "in"
    for name in ("a/scan.zarr", "b/scan.zarr", "c.zarr"):
        write_ome_zarr(folder / name, blobs(150, 160))
    picture = np.moveaxis(blobs(150, 160), 0, -1)
    Image.fromarray(picture).save(folder / "d.png")
    masks = tmp_path / "masks"
    (masks / "a").mkdir(parents=True)
    write_geojson(masks / "a" / "scan.geojson", polygon([(0, 0), (50, 0), (50, 40), (0, 40)]))
    write_geojson(masks / "scan.geojson", polygon([(0, 0), (60, 0), (60, 40), (0, 40)]))
    label = np.zeros((15, 16), np.uint8)
    label[:5] = 7
    Image.fromarray(label).save(masks / "d.png")
    report = confined(folder, mask=masks)
    areas = {Path(slide.path).name: slide.region_area for slide in report.slides}
    assert [slide.region_area for slide in report.slides] == [50 * 40, 60 * 40, None, 50 * 160], areas
    assert [slide.status for slide in report.slides] == ["done", "done", "failed", "done"]
    assert "expected a region for c.zarr, such as c.geojson or c.png, found none" in report.slides[2].reason
    shutil.copy(masks / "d.png", masks / "d.tif")
    reason = confined(folder, mask=masks, name="x").slides[3].reason
    assert f"{masks}: expected one region for d.png, found d.png and d.tif" in reason


def test_empty_and_missing_regions_fail_the_image_and_say_so(confined, image, tmp_path):
    Image.fromarray(np.zeros((42, 38), np.uint8)).save(tmp_path / "zeros.png")
    (slide,) = confined(image, mask=tmp_path / "zeros.png").slides
    assert (slide.status, "at least one pixel of level 0 inside, found none" in slide.reason) == ("failed", True)
    (slide,) = confined(image, mask=tmp_path / "nothing.geojson").slides
    assert "nothing.geojson: expected the region of an image, or a folder of regions, found nothing" in slide.reason
    with pytest.raises(UsageError, match="`mask`: expected `stitch=crop`"):
        confined(image, mask=tmp_path / "zeros.png", stitch="blend")
    with pytest.raises(UsageError, match="`mask_class`: expected a region with `mask`"):
        confined(image, mask_class="Tumour")


def test_a_manifest_gives_every_slide_its_region(tmp_path, tiny_model, command):
    square = [(10, 10), (90, 10), (90, 90), (10, 90)]
    for name in "ab":
        write_ome_zarr(tmp_path / f"{name}.zarr", blobs(150, 160))
    write_geojson(tmp_path / "a.geojson", feature(polygon(square), "Tumour"), feature(polygon(SMALL), "Other"))
    rows = ["path,mask", "a.zarr,a.geojson", "b.zarr,"]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    how = {"model": tiny_model, "backend": "torch", "precision": "fp32", "tile": 96, "threads": 1}
    report = api_segment(manifest=tmp_path / "list.csv", mask_class="Tumour", **how)
    assert [slide.region_area for slide in report.slides] == [6400, None]
    assert not labels_of(report)[100:].any()
    assert labels_of(report, 1)[100:].any()
    write_geojson(tmp_path / "far.geojson", polygon([(500, 500), (600, 500), (500, 600)]))
    rows = ["path,mask", "a.zarr,missing.geojson", "b.zarr,far.geojson"]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    with pytest.raises(UsageError, match=r"line 2: .*missing.geojson.*line 3: .*far.geojson.*wholly outside"):
        api_segment(manifest=tmp_path / "list.csv", **how)


def test_plan_and_info_show_what_is_computed(command, tiny_model, image, ragged, tmp_path):
    tiles = ("--model", tiny_model, "--tile", 64, "--block", 64, "--mask", ragged)
    code, text = command("info", image, *tiles)
    assert code == 0
    assert f"{pixels_inside(ragged, image).sum():,} px" in text
    how = ("--backend", "torch", "--precision", "fp32", "--json", tmp_path / "plan.json")
    code, text = command("plan", image, *tiles, *how)
    part = json.loads((tmp_path / "plan.json").read_text())
    command("plan", image, *tiles[:6], *how)
    whole = json.loads((tmp_path / "plan.json").read_text())
    assert code == 0
    for count in ("tiles", "pixels", "bytes_in"):
        assert 0 < part[count] < whole[count], count
    assert part["blocks"] == whole["blocks"]


def test_preview_draws_the_outline_and_reports_know_the_region(confined, image, ragged, tmp_path, command):
    confined(image, instances=True, mask=ragged)
    code, text = command("preview", image, "--out", tmp_path / "a.png")
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    zoom = picture.shape[0] // HEIGHT
    drawn = (picture == (0, 229, 255)).all(axis=-1)
    inside = np.kron(pixels_inside(ragged, image), np.ones((zoom, zoom), bool))
    rows, columns = (drawn.any(axis=axis).nonzero()[0] for axis in (1, 0))
    expected = (inside.any(axis=axis).nonzero()[0] for axis in (1, 0))
    for side, lines in zip(expected, (rows, columns), strict=True):
        assert abs(lines[0] - side[0]) <= zoom
        assert abs(lines[-1] - side[-1]) <= zoom
    assert code == 0
    assert "without" not in text
    assert command("verify", image)[0] == command("report", image, "--out", tmp_path / "page.html")[0] == 0
    write_geojson(ragged, polygon(SMALL))
    code, text = command("preview", image, "--out", tmp_path / "a.png")
    assert code == 0
    assert f"without the outline of its region: {ragged} has changed since the run" in text


def test_maps_and_objects_of_classes_are_confined(confined, tiny_bundle, image, ragged, tmp_path):
    classes = (ModelClass("tumour", "#c80000"), ModelClass("stroma", "#00c800"))
    names = plain_output("background", "tumour", "stroma")
    card = replace(tiny_bundle.card, decoder="classes", output=names, classes=classes)
    save_bundle(replace(tiny_bundle, card=card), tmp_path / "classes")
    confined, inside = partial(confined, model=str(tmp_path / "classes")), pixels_inside(ragged, image)
    whole, part = confined(image), confined(image, mask=ragged, name="part", block=100)
    expected = labels_of(whole) * inside
    assert {1, 2} <= set(np.unique(expected))
    np.testing.assert_array_equal(labels_of(part), expected)
    shares = [(expected == number).mean() for number in (1, 2)]
    assert list(part.slides[0].classes.values()) == pytest.approx(shares)
    (slide,) = confined(image, mask=ragged, name="objects", objects=True, block=100).slides
    table = pq.read_table(slide.table)
    y, x = (np.floor(np.asarray(table[f"centroid_{axis}"]) + 0.5).astype(int) for axis in "yx")
    assert (slide.status, len(table)) == ("done", slide.objects)
    assert inside[y, x].all()


def test_a_region_holds_for_every_plane_and_level(segment, tmp_path):
    stack = np.stack([blobs(150, 160, 1, seed)[0] for seed in range(3)])
    path = write_ome_zarr(tmp_path / "stack.zarr", stack, axes="zyx")
    mask = write_geojson(tmp_path / "mask.json", polygon([(20, 30), (81, 30), (81, 70), (20, 70)]))
    whole = segment(path, level=1, tile=64, name="whole")
    part = segment(path, level=1, tile=64, mask=mask, block=40)
    inside = np.zeros((75, 80), bool)
    inside[15:35, 10:40] = True  # the centre of column 40 lies at 81, on the right edge
    np.testing.assert_array_equal(labels_of(part), labels_of(whole) * inside)
    assert labels_of(part).any(axis=(1, 2)).all()
    assert part.slides[0].outside_tiles % 3 == 0 < part.slides[0].outside_tiles
