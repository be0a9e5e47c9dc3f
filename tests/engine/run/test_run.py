"""The main job from end to end: what is written where, partition invariance, resume after kill -9, bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

from cellseg_batch.engine.errors import NoImageError, UsageError
from cellseg_batch.engine.inference.cpu_predictor import CpuPredictor
from cellseg_batch.engine.reports import doctor
from cellseg_batch.engine.run import warm_up
from cellseg_batch.engine.run.memory_model import RUN_OVERHEAD_BYTES
from cellseg_batch.engine.slides.discover import find_images
from cellseg_batch.engine.slides.slide import Slide
from cellseg_batch.engine.storage.journal import Journal
from cellseg_batch.trainer.bundle import save_bundle
from cellseg_batch.trainer.card import Normalisation
from tests.support.images import blobs, labels_of, write_ome_zarr

# What needs no race.
REFERENCE = ["--backend", "torch", "--precision", "fp32"]


@pytest.fixture
def slide(tmp_path):
    return write_ome_zarr(tmp_path / "slide.zarr", blobs(300, 260), levels=2, channels=[{"label": c} for c in "RGB"])


@pytest.mark.parametrize(("options", "loaded"), [((), False), (("--instances",), True)])
def test_a_mask_of_bytes_needs_no_numba(slide, tiny_model, options, loaded):
    """It costs half a second and 80 MB."""
    arguments = ["run", str(slide), "--model", str(tiny_model), "--backend", "openvino", "--precision", "fp32"]
    code = f"""
import sys
from cellseg_batch.engine.cli.main import app
app({[*arguments, *options]!r}, standalone_mode=False)
print("numba" in sys.modules)
"""
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert output.splitlines()[-1] == str(loaded)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_labels_lie_in_place_and_are_listed(tmp_path, segment, version):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(150, 130), version=version)
    report = segment(path)
    assert report.status == "done"
    assert report.slides[0].labels == str(path / "labels" / "cellseg")
    assert report.slides[0].shape == (150, 130)
    mask = labels_of(report)
    assert set(np.unique(mask)) == {0, 1}
    assert report.slides[0].foreground_fraction == pytest.approx(mask.mean())
    attributes = dict(zarr.open_group(str(path / "labels"), mode="r").attrs)
    assert attributes.get("ome", attributes)["labels"] == ["cellseg"]
    assert labels_of(report, level=1).shape == (75, 65)
    found = find_images(path)
    assert [image.name for image in found] == ["a.zarr"], "labels are not images"


def test_the_middle_tile_warms_the_model_up_and_blocks_follow_in_order(tmp_path, segment, monkeypatch):
    computed, compute = [], CpuPredictor.predict

    def counting(self, pixels, block):
        computed.append(block.index)
        return compute(self, pixels, block)

    monkeypatch.setattr(CpuPredictor, "predict", counting)
    whole = segment(write_ome_zarr(tmp_path / "a.zarr", blobs(200, 300)), tile=128, block=1, workers=1)
    assert computed == [4, 0, 1, 2, 3, 4, 5], "the middle one of 2 x 3 tiles, then every block"
    computed.clear()
    parts = segment(write_ome_zarr(tmp_path / "b.zarr", blobs(200, 300)), tile=128, block=1000)
    assert computed[1:] == [0], "a tile to warm up, and the one block there is"
    np.testing.assert_array_equal(labels_of(parts), labels_of(whole))


def test_masks_do_not_depend_on_blocks_workers_or_batches(slide, segment, tmp_path):
    masks = [
        labels_of(segment(slide, name=f"n{number}", block=block, workers=workers, batch=batch))
        for number, (block, workers, batch) in enumerate([(64, 1, 1), (128, 4, 2), (10**6, 2, 3)])
    ]
    for mask in masks[1:]:
        np.testing.assert_array_equal(mask, masks[0])


def test_planes_are_segmented_each_on_its_own(tmp_path, segment):
    image = np.stack([blobs(90, 80, 1, seed)[0] for seed in range(4)]).reshape(2, 1, 2, 90, 80)
    report = segment(write_ome_zarr(tmp_path / "a.zarr", image, "tczyx", levels=1), probability=True)
    labels = labels_of(report)
    assert labels.shape == (2, 2, 90, 80)
    for t in (0, 1):
        for z in (0, 1):
            path = write_ome_zarr(tmp_path / f"{t}{z}.zarr", image[t, :, z], levels=1)
            np.testing.assert_array_equal(labels_of(segment(path)), labels[t, z])
    companion = tmp_path / "a.cellseg.zarr" / "cellseg_probability"
    assert report.slides[0].outputs == {"labels": report.slides[0].labels, "probability": str(companion)}
    probability = zarr.open_array(str(companion / "0"), mode="r")
    np.testing.assert_array_equal(probability[...] > 127, labels > 0)


def test_labels_say_how_they_came_about(tmp_path, segment, tiny_bundle):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(64, 64))
    report = segment(path, backend="openvino", precision="fp32")
    about = zarr.open_group(report.slides[0].labels, mode="r").attrs["cellseg-batch-output"]
    assert about["model"] == {"name": "tiny", "sha256": tiny_bundle.sha256}
    assert about["kind"] == "mask"
    assert about["threshold"] == 0.5
    assert about["race_result"]["backend"] == "openvino"
    assert about["race_result"]["flipped"] <= 5e-4
    assert about["race_result"]["versions"]["openvino"]


def test_what_is_finished_is_not_touched_by_a_run_with_other_settings(tmp_path, segment):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(150, 130))
    written = labels_of(segment(path, objects=True))
    for changes, reason in (
        (
            {"objects": True, "probability": True},
            "outputs (`probability` or `tissue` or `expand`) was labels, now labels, probability",
        ),
        ({"instances": True}, "`objects` was on, now off"),
        ({"objects": True, "pixel_size": 0.4}, "`pixel_size` was 0.5, now 0.4"),
    ):
        report = segment(path, **changes)
        assert report.status == "failed"
        assert reason in report.slides[0].reason
    again = segment(path, objects=True)
    assert again.status == "skipped"
    assert Path(again.slides[0].table).exists()
    np.testing.assert_array_equal(labels_of(again), written)


def test_a_finished_slide_whose_labels_were_removed_is_segmented_again(tmp_path, segment):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(150, 130))
    written = labels_of(segment(path))
    shutil.rmtree(path / "labels" / "cellseg")
    again = segment(path)
    assert again.status == "done", again.slides[0].reason
    np.testing.assert_array_equal(labels_of(again), written)


def test_finished_labels_stay_whatever_their_journal_lacks(tmp_path, segment):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(150, 130))
    segment(path)
    files = _versions(path)
    shutil.rmtree(tmp_path / "a.zarr.cellseg" / "labels" / "cellseg" / "blocks")
    assert segment(path).status == "skipped"
    assert _versions(path) == files


def test_blocks_on_disk_stay_when_a_run_is_killed_at_its_end(tmp_path, segment):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(150, 130))
    segment(path)
    files = _versions(path)
    (tmp_path / "a.zarr.cellseg" / "labels" / "cellseg" / "finished.json").unlink()
    again = segment(path)
    assert again.status == "done", again.slides[0].reason
    assert _versions(path) == files


def test_a_run_that_was_killed_before_its_first_block_is_begun_anew(tmp_path, segment):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(150, 130))
    written = labels_of(segment(path))
    journal = tmp_path / "a.zarr.cellseg" / "labels" / "cellseg"
    (journal / "finished.json").unlink()
    shutil.rmtree(journal / "blocks")
    for chunks in (path / "labels" / "cellseg").glob("*/c"):
        shutil.rmtree(chunks)
    again = segment(path)
    assert again.status == "done", again.slides[0].reason
    np.testing.assert_array_equal(labels_of(again), written)


def _versions(store):
    return sorted((file, file.stat().st_mtime_ns) for file in store.rglob("c/*") if file.is_file())


def test_a_finished_slide_that_lacks_an_image_is_not_begun_anew_unasked(tmp_path, segment):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(150, 130))
    report = segment(path, probability=True)
    shutil.rmtree(tmp_path / "a.cellseg.zarr")
    [refused] = segment(path, probability=True).slides
    assert refused.status == "failed"
    assert "a.cellseg.zarr" in refused.reason
    assert "`overwrite`" in refused.reason
    assert labels_of(report).any()
    assert segment(path, probability=True, overwrite=True).status == "done"


def test_inputs_that_cannot_hold_labels_get_a_store_beside_them(tmp_path, segment):
    image = blobs(90, 80)
    tifffile.imwrite(tmp_path / "t.tif", np.moveaxis(image, 0, -1), photometric="rgb")
    Image.fromarray(np.moveaxis(image, 0, -1)).save(tmp_path / "p.png")
    zarr.save_array(str(tmp_path / "z.zarr"), image)
    report = segment(tmp_path / "t.tif", tmp_path / "p.png", tmp_path / "z.zarr")
    assert [one.status for one in report.slides] == ["done"] * 3
    for one, stem in zip(report.slides, "tpz", strict=True):
        assert one.labels == str(tmp_path / f"{stem}.cellseg.zarr" / "labels" / "cellseg")
    for index in (1, 2):
        np.testing.assert_array_equal(labels_of(report, index), labels_of(report, 0))
    assert len(find_images(tmp_path)) == 3, "what was written is not taken for an image"


def test_output_mirrors_the_inputs(tmp_path, segment):
    source = tmp_path / "in"
    write_ome_zarr(source / "deep" / "a.zarr", blobs(64, 64))
    Image.fromarray(blobs(50, 50, 1)[0]).save(source / "b.png")
    out = tmp_path / "out"
    report = segment(source, output=out)
    assert [one.labels for one in report.slides] == [
        str(out / "in" / "b.png" / "labels" / "cellseg"),
        str(out / "in" / "deep" / "a.zarr" / "labels" / "cellseg"),
    ]
    assert not list(source.rglob("cellseg*"))
    assert segment(source, output=out).status == "skipped"


def test_a_finished_run_is_skipped_and_a_changed_one_refused(slide, segment):
    segment(slide)
    again = segment(slide)
    assert (again.status, again.slides[0].status) == ("skipped", "skipped")
    assert again.slides[0].foreground_fraction > 0
    changed = segment(slide, threshold=0.25)
    assert changed.status == "failed"
    assert "`threshold` was 0.5, now 0.25" in changed.slides[0].reason
    changed = segment(slide, instances=True, margin=32)
    assert "`margin` was 8, now 32; `instances` was off, now on; use the same" in changed.slides[0].reason
    anew = segment(slide, threshold=0.25, overwrite=True)
    assert anew.slides[0].foreground_fraction > again.slides[0].foreground_fraction


def test_what_is_unknown_when_all_images_failed_is_left_out(tmp_path, command, tiny_model):
    (tmp_path / "a.png").write_text("no picture")
    code, output = command("run", tmp_path / "a.png", "--model", tiny_model, *REFERENCE)
    assert code == 1
    assert [name for name in ("model", "tile", "rate", "objects", "announced") if name in output] == []


def test_no_backend_is_raced_for_images_that_their_metadata_refuse(slide, segment, watcher):
    report = segment(slide, backend="openvino", channel="DAPI")
    assert "`channel=DAPI`" in report.slides[0].reason
    assert (report.status, report.backend, report.tile) == ("failed", "", None)
    assert watcher.reports == report.slides
    assert not hasattr(watcher, "raced")
    assert len(segment(slide, retry_failed=True).slides) == 1


def test_what_many_images_share_is_said_once(tmp_path, command, tiny_model):
    for name in "abc":
        write_ome_zarr(tmp_path / "in" / f"{name}.zarr", blobs(64, 64))
    code, output = command("run", tmp_path / "in", "--model", tiny_model, *REFERENCE, "--channel", "DAPI")
    assert code == 1
    assert output.count("failed /") == 1
    assert f"failed {tmp_path}/in/a.zarr, {tmp_path}/in/b.zarr, {tmp_path}/in/c.zarr: " in output


def test_a_retry_without_failures_says_so(slide, command, tiny_model):
    assert command("run", slide, "--model", tiny_model, *REFERENCE)[0] == 0
    code, output = command("run", slide, "--model", tiny_model, *REFERENCE, "--retry-failed")
    assert (code, output.strip()) == (0, "nothing to do: no image has failed")


def test_foreign_labels_are_never_touched(slide, segment):
    write_ome_zarr(slide / "labels" / "cellseg", np.ones((300, 260), np.uint8), "yx")
    report = segment(slide)
    assert "`overwrite`" in report.slides[0].reason
    assert zarr.open_array(str(slide / "labels" / "cellseg" / "0"), mode="r")[...].all()


def test_a_killed_run_goes_on_where_it_stopped(tmp_path, tiny_model, segment):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(900, 900), chunk=128)
    expected = labels_of(segment(path, name="whole"))
    arguments = ["--model", tiny_model, "--backend", "torch", "--precision", "fp32", "--tile", 96, "--block", 64]
    arguments += ["--threads", 1]
    run = [sys.executable, "-m", "cellseg_batch.engine.cli", "run", str(path), "--quiet", *map(str, arguments)]
    journal = Journal(tmp_path / "a.zarr.cellseg" / "labels" / "cellseg")
    process = subprocess.Popen(run)
    while len(journal.numbers("blocks")) < 5:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = journal.numbers("blocks")
    stamps = {number: (journal.folder / "blocks" / "0" / f"{number}.json").stat().st_mtime_ns for number in done}
    assert 5 <= len(done) < 14 * 14, "it was killed too late to prove anything"
    report = segment(path, block=256)
    assert report.status == "done"
    np.testing.assert_array_equal(labels_of(report), expected)
    after = {number: (journal.folder / "blocks" / "0" / f"{number}.json").stat().st_mtime_ns for number in done}
    assert after == stamps, "a finished block was computed twice"
    assert report.slides[0].pixels < 900 * 900


@pytest.fixture
def percentile_model(tiny_bundle, tmp_path):
    """The small network with bounds that depend on the slide."""
    card = tiny_bundle.card
    card = replace(card, input=replace(card.input, normalisation=Normalisation("percentile", (0.1,), (99.9,))))
    save_bundle(replace(tiny_bundle, card=card), tmp_path / "percentile")
    return str(tmp_path / "percentile")


@pytest.mark.parametrize("chunk", [(0, 0), (4, 4)])
def test_a_damaged_chunk_costs_its_blocks_and_nothing_else(tmp_path, segment, percentile_model, chunk):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(300, 300, 1), levels=1)
    good = write_ome_zarr(tmp_path / "b.zarr", blobs(100, 100, 1), levels=1)
    file = path / "0" / "c" / "0" / str(chunk[0]) / str(chunk[1])
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    report = segment(path, good, model=percentile_model)
    assert [one.status for one in report.slides] == ["failed", "done"]
    assert "blocks failed; the others are kept" in report.slides[0].reason
    before = len(Journal(tmp_path / "a.zarr.cellseg" / "labels" / "cellseg").numbers("blocks"))
    file.write_bytes(content)
    mended = segment(path, good, model=percentile_model)
    assert [one.status for one in mended.slides] == ["done", "skipped"]
    assert 0 < mended.slides[0].pixels < 300 * 300
    assert before > 0


@pytest.mark.parametrize("shape", [(1, 200), (200, 1), (5, 7), (1, 1)])
def test_small_and_thin_images_work(tmp_path, segment, shape):
    report = segment(write_ome_zarr(tmp_path / "a.zarr", blobs(*shape), levels=1))
    assert labels_of(report).shape == shape
    assert report.status == "done"


def test_nan_pixels_are_counted_once(tmp_path, segment):
    image = blobs(200, 200, 1).astype(np.float32)
    image[0, 90:100, 90:110] = np.nan
    report = segment(write_ome_zarr(tmp_path / "a.zarr", image, levels=1), block=64)
    assert report.slides[0].missing_pixels == 200
    assert report.slides[0].notes == ("200 NaN pixels taken as 0",)
    assert report.status == "done"


def test_notes_on_metadata_are_in_the_report(tmp_path, segment):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(64, 64), levels=1, um=0)
    report = segment(path)
    (slide,) = report.to_json()["slides"]
    assert (slide["status"], slide["pixel_size_um"]) == ("done", None)
    assert len(slide["notes"]) == 2
    assert "pixel size along x unknown" in " ".join(slide["notes"])


def test_two_inputs_never_write_to_one_place(tmp_path, segment):
    for suffix in ("png", "tif"):
        Image.fromarray(blobs(40, 40, 1)[0]).save(tmp_path / f"a.{suffix}")
    report = segment(tmp_path)
    assert [one.status for one in report.slides] == ["done", "done"]
    assert len({one.labels for one in report.slides}) == 2


def test_memory_limit_lowers_what_is_in_flight_or_refuses(tmp_path, segment, watcher, monkeypatch):
    for measured in ("resident_bytes", "peak_resident_bytes"):
        monkeypatch.setattr(warm_up, measured, lambda: 10**8)
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(1200, 1200, 1), levels=1, chunk=512)
    free = segment(path, name="free", block=10**6, workers=4)
    assert len(watcher.plans[0].grid) == 1
    limit = 10**8 + RUN_OVERHEAD_BYTES + 3_000_000
    limited = segment(path, name="limited", block=10**6, workers=4, max_memory=limit)
    assert len(watcher.plans[1].grid) > 1
    assert limited.planned_peak_bytes <= limit
    np.testing.assert_array_equal(labels_of(limited), labels_of(free))
    refused = segment(path, name="refused", max_memory=1000)
    assert "`max_memory`" in refused.slides[0].reason


def test_probabilities_of_two_inputs_never_share_a_place(tmp_path, segment):
    write_ome_zarr(tmp_path / "a.zarr", blobs(60, 60))
    Image.fromarray(blobs(60, 60, 1)[0]).save(tmp_path / "a.png")
    report = segment(tmp_path / "a.zarr", tmp_path / "a.png", probability=True)
    assert report.status == "done"
    first, second = (one.outputs["probability"] for one in report.slides)
    assert Path(first).parent != Path(second).parent


def test_a_foreign_probability_is_never_touched(tmp_path, segment):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(60, 60))
    foreign = tmp_path / "a.cellseg.zarr" / "cellseg_probability" / "mine.txt"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("precious")
    assert "`overwrite`" in segment(path, probability=True).slides[0].reason
    assert foreign.read_text() == "precious"


def test_output_into_the_inputs_own_folder_is_refused(tmp_path, segment):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(60, 60))
    Image.fromarray(blobs(60, 60, 1)[0]).save(tmp_path / "b.png")
    report = segment(path, tmp_path / "b.png", output=tmp_path)
    assert all("apart from the input" in one.reason for one in report.slides)
    assert not (path / "labels").exists()
    with pytest.raises(UsageError, match="outside every input"):
        segment(path / "0", output=path / "out")


def test_mirrored_inputs_of_two_versions_get_a_store_each(tmp_path, segment):
    for version in ("0.4", "0.5"):
        write_ome_zarr(tmp_path / "in" / f"{version}.zarr", blobs(60, 60), version=version)
    report = segment(tmp_path / "in", output=tmp_path / "out", probability=True)
    assert report.status == "done"
    assert sorted(path.name for path in (tmp_path / "out" / "in").iterdir()) == [
        "0.4.zarr",
        "0.4.zarr.cellseg",
        "0.5.zarr",
        "0.5.zarr.cellseg",
    ]
    with pytest.raises(NoImageError):
        find_images(tmp_path / "out")


def test_a_finished_store_that_was_moved_is_still_finished(tmp_path, segment):
    path = write_ome_zarr(tmp_path / "a" / "s.zarr", blobs(60, 60))
    segment(path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert segment(tmp_path / "b" / "s.zarr").status == "skipped"


def test_labels_show_in_consolidated_metadata(tmp_path, segment):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(60, 60), version="0.4")
    zarr.consolidate_metadata(str(path))
    segment(path)
    group = zarr.open_group(str(path), mode="r")
    assert "labels/cellseg/0" in dict(group.members(max_depth=None))


def test_damaged_consolidated_metadata_are_written_anew(tmp_path, segment):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(60, 60), version="0.4")
    zarr.consolidate_metadata(str(path))
    gathered = (path / ".zmetadata").read_text()
    (path / ".zmetadata").write_text(gathered[:99])
    assert segment(path).status == "done"
    assert "labels/cellseg/0" in dict(zarr.open_group(str(path), mode="r").members(max_depth=None))


def test_consolidated_metadata_that_cannot_be_written_are_noted(tmp_path, segment, monkeypatch):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(60, 60), version="0.4")
    zarr.consolidate_metadata(str(path))
    monkeypatch.setattr(zarr, "consolidate_metadata", Mock(side_effect=PermissionError("read-only")))
    report = segment(path)
    assert report.status == "done"
    assert "missing in the consolidated metadata" in report.slides[0].notes[-1]


def test_a_journal_that_cannot_be_written_is_named(tmp_path, segment):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(60, 60))
    (tmp_path / "a.zarr.cellseg").write_text("a file where the journal should be")
    report = segment(path)
    assert "a journal that can be written" in report.slides[0].reason


def test_brackets_in_a_path_are_not_taken_for_colours(tmp_path, command, tiny_model):
    (tmp_path / "slide[old].png").write_text("[/broken]")
    code, output = command("run", tmp_path / "slide[old].png", "--model", tiny_model, *REFERENCE)
    assert code == 1
    assert "slide[old].png" in output


def test_the_report_as_json(slide, command, tiny_model, tmp_path):
    file = tmp_path / "report.json"
    code, output = command("run", slide, "--model", tiny_model, "--tile", 96, "--json", file, *REFERENCE)
    report = json.loads(file.read_text())
    assert code == 0, output
    run = "status seconds mpx_per_s engine_mpx_per_s backend precision tile margin batch block workers peak_rss_bytes"
    slides = (
        "path labels shape level pixel_size_um blocks tiles foreground_fraction objects status reason channels notes"
    )
    assert {*run.split(), "stages", "compile_seconds"} <= {*report}
    assert 0 < report["starting_seconds"] < report["seconds"]
    assert {*slides.split()} <= {*report["slides"][0]}
    assert report["slides"][0]["channels"] == ["R", "G", "B"]
    assert report["stages"]["model"] > 0
    assert "Mpx/s" in output


def test_demo_and_info(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, output = command("demo", "slides.zarr")
    assert (code, "histology_he" in output) == (0, True)
    images = find_images(tmp_path / "slides.zarr")
    assert len(images) == 5
    assert all(isinstance(image, Slide) and (image.zarr_format, image.holds_labels) == (3, True) for image in images)
    assert command("demo", "slides.zarr")[0] == 2
    code, output = command("info", "slides.zarr")
    assert (code, "RGB" in output) == (0, True)


@pytest.mark.parametrize(
    ("missing", "backend"),
    [("numba", "torch"), ("openvino", "auto"), ("triton", "torch"), ("nncf", "torch")],
)
def test_a_run_works_without_an_optional_library(tmp_path, tiny_model, missing, backend):
    write_ome_zarr(tmp_path / "a.zarr", blobs(64, 64))
    # In the process of the race, which auto needs, as well.
    (tmp_path / f"{missing}.py").write_text(f"raise ModuleNotFoundError('no {missing} in this test')")
    command = [sys.executable, "-m", "cellseg_batch.engine.cli", "run", tmp_path / "a.zarr", "--model", tiny_model]
    command += ["--backend", backend, "--precision", "fp32", "--device", "cpu", "--threads", "1", "-q"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "CELLSEG_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_missing_library_is_named_with_its_remedy(tmp_path, tiny_model):
    write_ome_zarr(tmp_path / "a.zarr", blobs(64, 64))
    code = f"""
import sys
sys.modules["openvino"] = None
from cellseg_batch.engine.cli.main import main
sys.argv = ["cellseg-batch", "run", {str(tmp_path / "a.zarr")!r}, "--model", {str(tiny_model)!r},
            "--backend", "openvino", "--precision", "fp32", "--no-gate"]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install openvino" in done.stderr


def test_doctor_says_what_is_there_and_how_to_get_what_is_not(monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setitem(sys.modules, "cellseg_batch.engine.inference.backends.openvino_cpu", None)
    monkeypatch.setattr(doctor, "package_version", lambda name: None if name in ("numba", "triton") else "1.2.3")
    code, output = command("doctor")
    assert code == 0
    cells = [cell.strip() for cell in output.split("│")]
    rows = {cell: cells[number + 1 : number + 3] for number, cell in enumerate(cells)}
    assert rows["backend torch fp32"] == ["1.2.3 on the CPU", ""]
    for precision in ("fp32", "bf16", "int8"):
        found, remedy = rows[f"backend openvino {precision}"]
        assert found.startswith("missing: ModuleNotFoundError")
        assert remedy == "pip install openvino"
    for library in ("numba", "triton"):
        assert rows[library] == ["missing", f"pip install {library}"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["missing.zarr"], 2, "missing.zarr"),
        (["empty.zarr"], 1, "empty groups"),
        (["ok.zarr", "--json", "ok.zarr"], 2, "a folder of that name"),
        (["groups.zarr"], 1, "empty groups"),
        (["four.zarr"], 1, "--axes"),
        (["complex.zarr"], 1, "complex64"),
        (["zero.zarr"], 1, "pixels"),
        (["json.zarr"], 1, "cannot be read"),
        (["ok.zarr", "--output", "ok.zarr/out"], 2, "inside"),
        (["ok.zarr", "--model", "nothing"], 2, "--model nothing"),
        (["ok.zarr", "--backend", "cuda"], 2, "openvino"),
        (["ok.zarr", "--backend", "tensorrt"], 2, "tensorrt"),
        (["ok.zarr", "--precision", "fp64"], 2, "fp32"),
        (["ok.zarr", "--threshold", "1"], 2, "between 0 and 1"),
        (["ok.zarr", "--threshold", "nan"], 2, "between 0 and 1"),
        (["ok.zarr", "--margin", "-16"], 2, "0 px or more"),
        (["ok.zarr", "--margin", "wide"], 2, "exact"),
        (["ok.zarr", "--margin", "13"], 2, "--margin 16"),
        (["ok.zarr", "--level", "9"], 1, "--level 9"),
        (["ok.zarr", "--channel", "DAPI"], 1, "--channel DAPI"),
        (["ok.zarr", "--name", "a/b"], 2, "--name"),
        (["ok.zarr", "--workers", "0"], 2, "--workers"),
        (["ok.zarr", "--json", "nowhere/report.json"], 2, "--json"),
        (["taken.zarr"], 1, "--overwrite"),
        (["readonly.zarr"], 1, "written"),
    ],
)
def test_bad_input_gives_one_line_and_an_exit_code(tmp_path, monkeypatch, command, tiny_model, arguments, code, words):
    monkeypatch.chdir(tmp_path)
    kind = arguments[0].split(".")[0]
    if kind in ("ok", "json", "taken", "readonly"):
        write_ome_zarr(tmp_path / arguments[0], blobs(60, 60), levels=1)
    if kind == "empty":
        (tmp_path / "empty.zarr").mkdir()
        zarr.open_group("empty.zarr", mode="w")
    elif kind == "groups":
        zarr.open_group("groups.zarr", mode="w").create_group("a").create_group("b")
    elif kind == "four":
        zarr.create_array("four.zarr", shape=(2, 3, 9, 9), dtype="uint8")
    elif kind == "complex":
        zarr.create_array("complex.zarr", shape=(9, 9), dtype="complex64")
    elif kind == "zero":
        zarr.create_array("zero.zarr", shape=(0, 9), dtype="uint8")
    elif kind == "json":
        (tmp_path / "json.zarr" / "zarr.json").write_text("{")
    elif kind == "taken":
        (tmp_path / "taken.zarr" / "labels" / "cellseg").mkdir(parents=True)
    elif kind == "readonly":
        # Root may write anywhere, so the folder is made impossible rather than forbidden.
        (tmp_path / "readonly.zarr" / "labels").write_text("a file where a group should be")
    model = [] if "--model" in arguments else ["--model", tiny_model]
    backend = [] if "--backend" in arguments or "--precision" in arguments else REFERENCE
    tile = ["--tile", 96]
    found, output = command("run", *arguments, *model, *backend, *tile)
    assert found == code, output
    assert words in output
    assert "Traceback" not in output
