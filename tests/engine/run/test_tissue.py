"""Slides on glass: what is left out, that no nucleus is lost, and that neither blocks nor a kill matter."""

import json
from dataclasses import replace

import numpy as np
import pytest
import zarr
from PIL import Image
from scipy.ndimage import binary_dilation

from cellseg_batch.engine.geometry import square_lattices
from cellseg_batch.engine.inference import tissue as tissue_module
from cellseg_batch.engine.inference.tissue import CELL, Tissue, find_tissue
from cellseg_batch.engine.run.slide_plan import lay_lattice
from cellseg_batch.engine.settings import TILE, Settings
from cellseg_batch.engine.slides.reader import SlideReader
from tests.support.images import labels_of
from tests.support.regions import polygon, write_geojson
from tests.support.slides import only
from tests.support.stained import GLASS, ragged, stained, write_scan, write_whole_slide

SIDE = 1024


@pytest.fixture(autouse=True)
def pyramids_are_used(monkeypatch):
    """Look for tissue in low levels of small slides, too."""
    monkeypatch.setattr(tissue_module, "_FEW_PIXELS", 0)


@pytest.fixture(scope="module")
def picture():
    return stained(SIDE)


@pytest.fixture
def scan(picture, tmp_path):
    return write_scan(tmp_path / "scan.tif", picture.pixels)


def tissue_of(path):
    slide = only(path)
    with SlideReader(slide, 0, (0,)) as reader:
        return find_tissue(reader)


def holds(tissue, nuclei):
    """Whether every nucleus, all of it, is tissue."""
    corners = [(int(y + dy) // CELL, int(x + dx) // CELL) for y, x, r in nuclei for dy in (-r, r) for dx in (-r, r)]
    return all(tissue.cells[corner] for corner in corners)


def as_16_bit(pixels):
    return pixels.astype(np.uint16) * 16 + 3


def with_alpha(pixels):
    return np.concatenate([pixels, np.full((*pixels.shape[:2], 1), 255, np.uint8)], axis=2)


def padded(pixels):
    """With the black that scanners put around what they scan."""
    dark = pixels.copy()
    dark[:200] = dark[:, -100:] = 0
    return dark


@pytest.mark.parametrize("change", [np.asarray, as_16_bit, with_alpha])
@pytest.mark.parametrize("factors", [(1,), (1, 4), (1, 2, 4, 8, 16)])
def test_nuclei_are_tissue_and_glass_with_dust_is_not(picture, tmp_path, change, factors):
    found = tissue_of(write_scan(tmp_path / "scan.tif", change(picture.pixels), factors))
    assert found.level == {1: 0, 2: 1, 5: 3}[len(factors)]
    assert holds(found, picture.nuclei)
    truth = picture.tissue.reshape(SIDE // CELL, CELL, SIDE // CELL, CELL).any(axis=(1, 3))
    for y, x, _ in picture.nuclei:
        truth[int(y) // CELL, int(x) // CELL] = True
    assert not (found.cells & ~binary_dilation(truth, np.ones((3, 3)), 3)).any()


def test_black_padding_and_unscanned_white_are_no_tissue(picture, tmp_path):
    pixels = padded(picture.pixels)
    pixels[-150:] = 255
    found = tissue_of(write_scan(tmp_path / "scan.tif", pixels))
    assert not found.cells[:4].any()
    kept = [(y, x, r) for y, x, r in picture.nuclei if 210 < y < SIDE - 160 and x < SIDE - 110]
    assert holds(found, kept)
    assert not found.cells[-2:, :-6].any()


def test_a_slide_of_glass_alone_and_one_of_tissue_alone(tmp_path):
    glass = tissue_of(write_scan(tmp_path / "glass.tif", stained(SIDE, pieces=0, lone=0, dust=30).pixels))
    assert not glass.cells.any()
    full = np.clip(np.array(GLASS) * 0.8 + np.random.default_rng(0).normal(0, 9, (512, 512, 3)) - [0, 40, 5], 0, 255)
    full = tissue_of(write_scan(tmp_path / "full.tif", full.astype(np.uint8)))
    assert full is None or full.cells.all()


def grey(pixels):
    return np.repeat(pixels[..., 1:2], 3, axis=2)


def unstained(pixels):
    """Cells that are hardly darker than the ground, which has a tint."""
    return (np.array(GLASS) * (0.82 + 0.18 * pixels[..., 1:2] / GLASS[1])).clip(0, 255).astype(np.uint8)


def inverted(pixels):
    return 255 - pixels


def fluorescent(pixels):
    glow = np.zeros_like(pixels)
    glow[..., 2] = 255 - pixels[..., 1]
    return glow + 6


@pytest.mark.parametrize("change", [grey, unstained, inverted, fluorescent])
def test_slides_without_stains_or_on_a_dark_ground_are_not_judged(picture, tmp_path, change):
    assert tissue_of(write_scan(tmp_path / "scan.tif", change(picture.pixels))) is None


@pytest.mark.parametrize("wrong", ["blank", "turned", "shifted"])
def test_a_low_level_that_shows_something_else_is_not_believed(picture, tmp_path, wrong):
    low = {
        "blank": np.full_like(picture.pixels, 255),
        "turned": picture.pixels[::-1, ::-1],
        "shifted": np.roll(picture.pixels, 300, axis=1),
    }[wrong]
    found = tissue_of(write_scan(tmp_path / "scan.tif", picture.pixels, low=low))
    assert found.level == 0
    assert holds(found, picture.nuclei)


def test_masks_are_those_of_a_full_run_where_tiles_are_computed(segment, scan, picture):
    every = segment(scan, name="off", skip_background="off", tile=160)
    reports = [
        segment(scan, name=f"b{block}", tile=160, block=block, workers=workers)
        for block, workers in ((96, 1), (300, 3), (2000, 1))
    ]
    (first,) = reports[0].slides
    assert 0 < first.skipped_tiles < first.tiles
    assert 0.05 < first.tissue_area / SIDE**2 < 0.6
    expected, core = labels_of(every), reports[0].tile[0] - 2 * reports[0].margin
    found = tissue_of(scan)
    computed = found.cells.repeat(CELL, 0).repeat(CELL, 1)[:SIDE, :SIDE]
    for y in range(0, SIDE, core):
        for x in range(0, SIDE, core):
            if not computed[y : y + core, x : x + core].any():
                expected[y : y + core, x : x + core] = 0
    for report in reports:
        np.testing.assert_array_equal(labels_of(report), expected)
        assert report.slides[0].skipped_tiles == first.skipped_tiles
    assert holds(found, picture.nuclei)


def test_a_killed_run_goes_on_with_its_tissue(segment, scan, watcher, monkeypatch):
    straight = segment(scan, name="straight", objects=True, tile=160)
    tasks = []

    def stop(task):
        tasks.append(task)
        if len(tasks) == 9:
            raise InterruptedError

    monkeypatch.setattr(watcher, "advanced", stop)
    with pytest.raises(InterruptedError):
        segment(scan, objects=True, tile=160)
    # What another look would find does not matter any more.
    monkeypatch.setattr("cellseg_batch.engine.run.slide_tissue.find_tissue", lambda reader: None)
    report = segment(scan, objects=True, tile=160)
    np.testing.assert_array_equal(labels_of(report), labels_of(straight))
    assert report.slides[0].objects == straight.slides[0].objects
    assert segment(scan, objects=True, tile=160).status == "skipped"
    refused = segment(scan, objects=True, tile=160, skip_background="off")
    assert "`skip_background`" in refused.slides[0].reason


def test_region_and_glass_together(segment, scan):
    mask = write_geojson(scan.with_name("half.geojson"), polygon([(0, 200), (SIDE, 200), (SIDE, SIDE), (0, SIDE)]))
    whole, half = segment(scan, tile=160), segment(scan, name="half", tile=160, mask=mask)
    np.testing.assert_array_equal(labels_of(half)[200:], labels_of(whole)[200:])
    assert not labels_of(half)[:200].any()
    (slide,) = half.slides
    assert slide.outside_tiles > 0
    assert 0 < slide.skipped_tiles <= whole.slides[0].skipped_tiles


def test_a_slide_of_glass_is_done_and_a_change_of_it_is_noticed(segment, tmp_path):
    glass = write_scan(tmp_path / "glass.tif", stained(SIDE, pieces=0, lone=0).pixels)
    report = segment(glass, tile=160)
    (slide,) = report.slides
    assert (slide.status, slide.skipped_tiles, slide.tissue_area) == ("done", slide.tiles - 1, 0)
    write_scan(glass, stained(SIDE, seed=3).pixels)
    assert "it has changed" in segment(glass, tile=160).slides[0].reason


def test_the_mask_of_the_tissue_is_a_label_image_of_its_own_scale(command, tiny_model, scan, picture, tmp_path):
    run = ["--model", tiny_model, "--backend", "torch", "--precision", "fp32", "--tile", 160]
    code, text = command("run", scan, *run, "--tissue", "--json", tmp_path / "run.json")
    assert code == 0, text
    (slide,) = json.loads((tmp_path / "run.json").read_text())["slides"]
    assert f"tissue │ {100 * slide['tissue_area'] / SIDE**2:.1f} % of the slide" in text
    group = zarr.open_group(slide["outputs"]["tissue"], mode="r")
    assert slide["outputs"]["tissue"].endswith("labels/cellseg_tissue")
    np.testing.assert_array_equal(group["0"][...], tissue_of(scan).cells)
    (dataset,) = group.attrs["ome"]["multiscales"][0]["datasets"]
    assert dataset["coordinateTransformations"][0]["scale"] == pytest.approx([0.5 * CELL] * 2)
    labels = zarr.open_group(str(scan.parent / "scan.cellseg.zarr" / "labels"), mode="r")
    assert labels.attrs["ome"]["labels"] == ["cellseg", "cellseg_tissue"]
    assert command("verify", scan)[0] == 0
    assert command("report", scan, "--out", tmp_path / "page.html")[0] == 0
    assert '<th class="number">tissue</th>' in (tmp_path / "page.html").read_text()
    code, text = command("plan", scan, *run, "--json", tmp_path / "plan.json")
    (planned,) = json.loads((tmp_path / "plan.json").read_text())["slides"]
    assert planned["tiles"] == slide["tiles"] - slide["skipped_tiles"]
    assert planned["tissue"] == pytest.approx(slide["tissue_area"] / SIDE**2)
    assert "is tissue" in text
    assert "looked for by a run, in level 1" in command("info", scan)[1]
    code, text = command("run", scan, *run, "--tissue", "--skip-background", "off", "--name", "other")
    assert (code, "--tissue" in text) == (2, True)


def test_without_glass_all_of_a_slide_is_tissue(segment, picture, tmp_path):
    Image.fromarray(inverted(picture.pixels)[:300, :200]).save(tmp_path / "dark.png")
    (slide,) = segment(tmp_path / "dark.png", tissue=True).slides
    assert slide.notes == ("no glass found, so all of it counts as tissue",)
    mask = zarr.open_array(f"{slide.outputs['tissue']}/0", mode="r")[...]
    assert mask.shape == (10, 7)
    assert mask.all()


@pytest.mark.parametrize(("pieces", "share"), [(10, 0.3), (10, 0.1), (2, 0.4), (60, 0.05)])
def test_tiles_are_as_large_as_computes_the_least(tiny_bundle, pieces, share):
    shape = (16384, 16384)
    card = replace(tiny_bundle.card, margin=64)
    tissue = Tissue(0, ragged(512, pieces, share))
    costs = {lattice.tile: tissue.cost(lattice) for lattice in square_lattices(shape, TILE, 64, card.total_stride)}
    chosen = lay_lattice(shape, Settings(), card, "torch", tissue=tissue)
    assert tissue.cost(chosen) <= 1.05 * min(costs.values())
    assert chosen.tile in costs or tissue.cost(chosen) < min(costs.values())
    asked = lay_lattice(shape, Settings(tile=1024), card, "torch", tissue=tissue)
    assert asked == lay_lattice(shape, Settings(tile=1024), card, "torch")


def test_a_chunk_that_cannot_be_read_counts_as_tissue(picture, tmp_path):
    from tests.support.images import write_ome_zarr

    pixels = np.moveaxis(picture.pixels, -1, 0)
    colours = [
        {"label": name, "color": colour} for name, colour in zip("RGB", ("FF0000", "00FF00", "0000FF"), strict=True)
    ]
    store = write_ome_zarr(tmp_path / "scan.zarr", pixels, levels=1, chunk=256, channels=colours)
    chunk = next(path for path in (store / "0").rglob("*") if path.is_file() and path.name != "zarr.json")
    chunk.write_bytes(b"damaged")
    assert tissue_of(store).cells.all()


@pytest.mark.slow
def test_a_whole_slide(tiny_bundle, tmp_path):
    side, glass_tiles = 32768, [stained(512, pieces=0, lone=0, dust=1, seed=seed).pixels for seed in range(6)]
    tissue_tiles = [stained(512, pieces=1, share=4, seed=seed).pixels for seed in range(4)]
    cells = ragged(side // CELL, 10, 0.3)
    free = np.argwhere(~cells.reshape(side // 512, 512 // CELL, side // 512, 512 // CELL).any(axis=(1, 3)))
    lone = free[:: len(free) // 20]
    glass_tiles.append(stained(512, pieces=0, lone=1, dust=0).pixels)
    path = write_whole_slide(tmp_path / "whole.tif", cells, tissue_tiles, glass_tiles, lone)
    found = tissue_of(path)
    assert found.level == 1
    assert not (cells & ~found.cells).any()
    assert all(found.cells[y * 16 : y * 16 + 16, x * 16 : x * 16 + 16].any() for y, x in lone)
    assert found.cells.mean() < 1.15 * cells.mean()
    card = replace(tiny_bundle.card, margin=64)
    costs = [found.cost(one) for one in square_lattices((side, side), TILE, 64, card.total_stride)]
    chosen = found.cost(lay_lattice((side, side), Settings(), card, "torch", tissue=found))
    assert chosen <= 1.05 * min(costs)
    assert chosen < 2.2 * cells.sum() * CELL**2
