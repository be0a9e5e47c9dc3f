"""How far a run is can be read from its journals, while it runs and afterwards, by another process."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zarr

from cellseg_batch.engine.reports.status import read_status
from cellseg_batch.engine.storage.journal import Journal
from cellseg_batch.engine.storage.lock import Locks
from tests.support.images import blobs, write_ome_zarr


@pytest.fixture
def folder(tmp_path):
    for name in "abc":
        write_ome_zarr(tmp_path / "in" / f"{name}.zarr", blobs(200, 200, seed=ord(name)))
    return tmp_path / "in"


def states(status):
    return {slide.path.rsplit("/", 1)[-1]: slide.state for slide in status.slides}


def test_before_during_and_after_a_run(folder, tiny_model):
    assert states(read_status([folder], "cellseg", None)) == dict.fromkeys(["a.zarr", "b.zarr", "c.zarr"], "waiting")
    flags = ["--model", tiny_model, "--backend", "torch", "--precision", "fp32", "--tile", 48, "--block", 16]
    line = [sys.executable, "-m", "cellseg_batch.engine.cli", "run", folder, "--quiet", "--threads", 1, *flags]
    process = subprocess.Popen(list(map(str, line)))
    try:
        journal = Journal(folder / "a.zarr.cellseg" / "labels" / "cellseg")
        while len(journal.numbers("blocks")) < 3:
            assert process.poll() is None, "the run ended before it was looked at"
            time.sleep(0.01)
        during = read_status([folder], "cellseg", None)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    first = during.slides[0]
    assert first.state == "running"
    assert 3 <= first.blocks_done < first.blocks
    assert first.pixels == 200 * 200
    assert during.mpx_per_s > 0
    assert during.seconds_left > 0
    # This machine sees that the process is dead, before its lock has expired.
    assert read_status([folder], "cellseg", None).slides[0].state == "stopped"


def test_a_finished_run_is_done_and_exits_with_0(folder, segment, command, tmp_path):
    segment(folder)
    code, said = command("status", folder, "--json", tmp_path / "status.json")
    assert code == 0
    assert "3 images: 3 done" in said
    content = json.loads((tmp_path / "status.json").read_text())
    assert content["counts"] == {"done": 3}
    assert [slide["tasks_done"] == slide["tasks"] > 0 for slide in content["slides"]] == [True] * 3
    assert content["seconds_left"] is None


def test_what_follows_the_blocks_is_still_to_come(folder, segment):
    segment(folder / "a.zarr", objects=True)
    journal = Journal(folder / "a.zarr.cellseg" / "labels" / "cellseg")
    done = read_status([folder / "a.zarr"], "cellseg", None).slides[0]
    assert done.pixels_done == pytest.approx(done.pixels) == 200 * 200
    for number in journal.numbers("instances"):
        journal.forget("instances", number)
    with Locks().hold(journal.folder.with_name("cellseg.lock")):
        status = read_status([folder / "a.zarr"], "cellseg", None)
        assert (status.slides[0].state, status.slides[0].blocks_done) == ("running", done.blocks)
        assert 0.8 * done.pixels < status.slides[0].pixels_done < 0.95 * done.pixels
        assert status.seconds_left > 0


def test_the_output_folder_alone_is_enough(folder, segment, tmp_path):
    segment(folder, output=tmp_path / "out")
    shutil.rmtree(folder)
    assert states(read_status([tmp_path / "out"], "cellseg", None)) == dict.fromkeys(
        ["a.zarr", "b.zarr", "c.zarr"], "done"
    )


def test_links_are_followed_and_no_folder_is_searched_twice(folder, segment, tmp_path):
    (folder / "b.zarr").rename(tmp_path / "b.zarr")
    (tmp_path / "elsewhere").mkdir()
    (folder / "c.zarr").rename(tmp_path / "elsewhere" / "c.zarr")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    (folder / "above").symlink_to(tmp_path)
    segment(folder, tmp_path / "b.zarr")
    slides = read_status([folder], "cellseg", None).slides
    assert [Path(slide.path).name for slide in slides] == ["a.zarr", "c.zarr"]


def test_images_among_the_members_of_a_zarr_group_are_found_in_the_output_folder(folder, segment, tmp_path):
    zarr.open_group(str(folder), mode="a")
    (folder / "below").mkdir()
    (folder / "a.zarr").rename(folder / "below" / "a.zarr")
    segment(folder, output=tmp_path / "out")
    shutil.rmtree(folder)
    assert states(read_status([tmp_path / "out"], "cellseg", None)) == dict.fromkeys(
        ["a.zarr", "b.zarr", "c.zarr"], "done"
    )


def test_a_run_that_nobody_works_on_has_stopped(folder, segment):
    segment(folder)
    journal = Journal(folder / "b.zarr.cellseg" / "labels" / "cellseg")
    (journal.folder / "finished.json").unlink()
    status = read_status([folder], "cellseg", None)
    assert states(status) == {"a.zarr": "done", "b.zarr": "stopped", "c.zarr": "done"}
    assert status.seconds_left is None


def test_a_damaged_image_has_failed_until_it_is_mended(folder, segment, command):
    chunk = next(one for one in (folder / "b.zarr" / "0" / "c").rglob("*") if one.is_file())
    whole = chunk.read_bytes()
    chunk.write_bytes(b"damaged")
    segment(folder)
    code, said = command("status", folder)
    assert code == 1
    assert "readable pixels" in said
    assert said.count("│ done │") == 2
    assert states(read_status([folder], "cellseg", None)) == {"a.zarr": "done", "b.zarr": "failed", "c.zarr": "done"}
    chunk.write_bytes(whole)
    segment(folder)
    assert command("status", folder)[0] == 0


def test_images_that_cannot_be_opened_are_named(folder, command, segment):
    (folder / "torn.tif").write_bytes(b"torn")
    segment(folder / "torn.tif")
    code, said = command("status", folder)
    assert code == 1
    assert "torn.tif" in said
    assert "1 failed" in said


def test_images_that_cannot_be_opened_are_named_before_a_run_and_as_it_named_them(folder, command, segment):
    (folder / "torn.tif").write_bytes(b"torn")
    (folder / "scan.czi").write_bytes(b"no reader")
    before = {slide.path: slide.reason for slide in read_status([folder], "cellseg", None).slides if slide.reason}
    failed = {slide.path: slide.reason for slide in segment(folder).slides if slide.status == "failed"}
    assert before == failed
    assert {path.rsplit("/", 1)[-1] for path in failed} == {"torn.tif", "scan.czi"}
    for notes in folder.glob("*.cellseg/failed"):
        shutil.rmtree(notes)
    code, said = command("status", folder)
    assert code == 1
    assert "5 images: 3 done, 2 failed" in said
    assert all(f"{path}: {reason}" in said for path, reason in failed.items())


def test_a_finished_image_has_failed_if_the_latest_run_says_so(folder, segment, command):
    segment(folder)
    segment(folder, threshold=0.4)
    code, said = command("status", folder)
    assert code == 1
    assert "3 images: 3 failed" in said
    assert "--threshold was 0.5, now 0.4" in said
    segment(folder)
    assert command("status", folder)[0] == 0


@pytest.fixture
def lock(monkeypatch):
    """Take away the right to look into a folder; the system would not take it from the user who runs tests as root."""

    def call(folder):
        for method in (Path.stat, Path.iterdir, Path.read_bytes):

            def ask(path, *arguments, method=method, **more):
                if folder in path.parents or (path == folder and method.__name__ == "iterdir"):
                    raise PermissionError(13, "Permission denied", str(path))
                return method(path, *arguments, **more)

            monkeypatch.setattr(Path, method.__name__, ask)

    return call


def test_an_image_that_may_not_be_looked_into_fails_alone(folder, segment, command, lock):
    lock(folder / "b.zarr")
    report = segment(folder)
    assert [one.status for one in report.slides] == ["done", "failed", "done"]
    assert report.slides[1].reason == "the folder cannot be listed: Permission denied"
    assert states(read_status([folder], "cellseg", None)) == {"a.zarr": "done", "b.zarr": "failed", "c.zarr": "done"}


def test_a_journal_that_may_not_be_looked_into_hides_no_other(folder, segment, command, lock):
    segment(folder)
    lock(folder / "b.zarr.cellseg")
    for subcommand in ("status", "verify"):
        code, said = command(subcommand, folder)
        assert code == 1
        assert "expected a record that may be read, found PermissionError" in said
    found = states(read_status([folder], "cellseg", None))
    assert (found["a.zarr"], found["b.zarr"], found["c.zarr"]) == ("done", "failed", "done")


@pytest.mark.parametrize("name", ["../x", "x" * 300], ids=["path", "long"])
def test_names_that_no_label_group_can_have_are_refused(folder, command, tmp_path, name):
    out = ["--out", tmp_path / "out"]
    for line in (["status"], ["verify"], ["report", *out], ["preview", *out], ["export-objects", "--format=csv", *out]):
        code, said = command(*line, folder, "--name", name)
        assert code == 2
        assert "expected a plain name" in " ".join(said.split())


def test_verify_refuses_what_no_run_has_begun(folder, command):
    code, said = command("verify", folder)
    assert code == 2
    assert "expected a run that has begun" in said


def test_a_path_with_nothing_is_refused(tmp_path, command):
    assert command("status", tmp_path)[0] == 2


def test_a_name_that_no_run_has_is_refused_with_those_that_there_are(folder, segment, command, tmp_path):
    out, page = tmp_path / "out", ["--out", tmp_path / "page.html"]
    segment(folder / "a.zarr", name="nuclei")
    segment(folder / "a.zarr", name="cells", output=out)
    for arguments, name in (([folder], "nuclei"), ([out], "cells"), ([folder, "-o", out], "cells")):
        for subcommand in (["status"], ["verify"], ["report", *page]):
            code, said = command(*subcommand, *arguments, "--name", "nuclie")
            assert code == 2
            assert "--name nuclie" in said
            assert f"has begun ({name})" in said
            assert command(*subcommand, *arguments, "--name", name)[0] == 0


def test_with_an_output_folder_only_what_lies_in_it_is_listed(folder, segment, command, tmp_path):
    segment(folder)
    segment(folder / "a.zarr", output=tmp_path / "out")
    for paths in ([folder], [tmp_path / "out"]):
        status = read_status(paths, "cellseg", tmp_path / "out")
        assert all(tmp_path / "out" in slide.journal.parents for slide in status.slides)
        assert status.counts["done"] == 1
    code, said = command("verify", folder, "-o", tmp_path / "out")
    beside = command("verify", folder)[1]
    assert code == 0
    assert int(said.split()[0]) * 3 == int(beside.split()[0])
