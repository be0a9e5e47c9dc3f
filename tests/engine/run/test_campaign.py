"""Many slides, and all that happens to them on a bad day: nothing lost, every failure named."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

from cellseg_batch.engine.errors import ComputeError, OutputError, ReadError
from cellseg_batch.engine.run import lifecycle
from cellseg_batch.engine.run import pipeline as pipeline_room
from cellseg_batch.engine.run import worker as worker_room
from cellseg_batch.engine.slides.ome_zarr import Zarr
from cellseg_batch.engine.storage.journal import Failure, Journal
from cellseg_batch.engine.storage.lock import Locks
from cellseg_batch.engine.storage.object_stores import may_pass
from tests.support.images import blobs, labels_of, write_ome_zarr
from tests.support.processes import TINY_RUN, launch, wait_for_records


@pytest.fixture
def in_a_hurry(monkeypatch):
    """What fails is tried again at once."""
    monkeypatch.setattr(worker_room, "_PAUSES", (0.0, 0.0))


def break_seven(folder):
    """Seven images that cannot be segmented, each for another reason; name -> how to mend it."""
    good = folder.parent / "good"
    write_ome_zarr(good / "a.zarr", blobs(40, 40), levels=1, chunk=20)
    Image.fromarray(blobs(40, 40, 1)[0]).save(good / "a.png")
    tifffile.imwrite(good / "a.tif", blobs(40, 40, 1)[0], compression="zlib")

    def put(name, damage):
        kind = good / f"a.{name.rpartition('.')[2]}"
        (shutil.copytree if kind.is_dir() else shutil.copy)(kind, folder / name)
        damage(folder / name)

    def halve(path):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    put("cut.png", halve)
    put("text.png", lambda path: path.write_text("not a picture"))
    put("half.tif", halve)
    put("json.zarr", lambda path: (path / "zarr.json").write_text("{"))
    put("chunk.zarr", lambda path: halve(path / "0" / "c" / "1" / "0" / "1"))
    put("level.zarr", lambda path: shutil.rmtree(path / "0"))
    put("blocked.zarr", lambda path: (path / "labels").write_text("a file where a group should be"))

    def mend():
        for path in [folder / name for name in names]:
            if path.is_dir():
                shutil.copytree(good / "a.zarr", path, dirs_exist_ok=True)
            else:
                shutil.copy(good / f"a{path.suffix}", path)
        (folder / "blocked.zarr" / "labels").unlink()

    names = ["cut.png", "text.png", "half.tif", "json.zarr", "chunk.zarr", "level.zarr", "blocked.zarr"]
    return names, mend


def test_of_200_slides_seven_fail_in_seven_ways_and_are_taken_up_once_mended(tmp_path, segment, command, in_a_hurry):
    folder = tmp_path / "slides"
    (tmp_path / "good").mkdir()
    folder.mkdir()
    picture = Image.fromarray(blobs(40, 40, 1)[0])
    for number in range(193):
        picture.save(folder / f"{number:03}.png")
    names, mend = break_seven(folder)
    report = segment(folder, downscale=1)
    failed = [one for one in report.slides if one.status == "failed"]
    assert (report.status, len(report.slides), len(failed)) == ("failed", 200, 7)
    assert sorted(Path(one.path).name for one in failed) == sorted(names)
    assert all(one.reason for one in failed)
    assert len({one.reason.replace(one.path, "") for one in failed}) == 7, [one.reason for one in failed]
    mend()
    again = segment(folder, downscale=1, retry_failed=True)
    assert [one.reason for one in again.slides] == [""] * 7
    assert segment(folder, downscale=1, retry_failed=True).slides == []
    whole = segment(folder, downscale=1)
    assert (whole.status, {one.status for one in whole.slides}) == ("skipped", {"skipped"})
    assert not list(folder.rglob("failed/**/*.json")), "nothing is left of the notes"


def test_the_command_names_what_failed_and_says_so_with_its_exit_code(tmp_path, command, tiny_model):
    (tmp_path / "in").mkdir()
    Image.fromarray(blobs(40, 40, 1)[0]).save(tmp_path / "in" / "good.png")
    (tmp_path / "in" / "bad.png").write_text("no picture")
    arguments = ["run", tmp_path / "in", "--model", tiny_model, *TINY_RUN]
    code, output = command(*arguments)
    assert (code, "bad.png" in output, "1 done, 1 failed" in output) == (1, True, True)
    shutil.copy(tmp_path / "in" / "good.png", tmp_path / "in" / "bad.png")
    code, output = command(*arguments, "--retry-failed")
    assert (code, "good.png" in output) == (0, False)
    code, output = command(*arguments)
    assert (code, "2 skipped" in output) == (0, True)


def test_a_block_that_cannot_be_read_is_noted_until_it_is_done(tmp_path, segment, in_a_hurry):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(300, 300, 1), levels=1)
    chunk = path / "0" / "c" / "0" / "4" / "4"
    content = chunk.read_bytes()
    chunk.write_bytes(content[:20])
    journal = Journal(tmp_path / "a.zarr.cellseg" / "labels" / "cellseg")
    assert segment(path).status == "failed"
    failed = {number: failure.reason for number, failure in journal.records("failed/blocks", Failure)}
    assert failed
    assert all("readable pixels" in reason for reason in failed.values())
    assert journal.numbers("blocks").isdisjoint(failed)
    chunk.write_bytes(content)
    assert segment(path, retry_failed=True).status == "done"
    assert not journal.numbers("failed/blocks")


def test_a_store_that_fails_now_and_then_costs_nothing(tmp_path, segment, monkeypatch, in_a_hurry):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(700, 700), chunk=100)
    expected = segment(path, name="calm")
    reads = []
    open_level = Zarr.open_level

    class Moody:
        def __init__(self, array):
            self.array = array

        def __getitem__(self, place):
            reads.append(place)
            if len(reads) % 50 == 0:
                raise ConnectionResetError("the store is busy")
            return self.array[place]

    monkeypatch.setattr(Zarr, "open_level", lambda *arguments: Moody(open_level(*arguments)))
    report = segment(path, name="moody", block=64)
    assert len(reads) > 50
    assert report.status == "done"
    np.testing.assert_array_equal(labels_of(report), labels_of(expected))


@pytest.mark.parametrize(
    "error", [KeyError("key"), ComputeError("block 0", expected="finite logits", found="7 NaN", remedy="try fp32")]
)
def test_what_would_fail_again_is_not_tried_again(tmp_path, segment, monkeypatch, error):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(200, 200))
    tried = []

    def fails(slide, number):
        tried.append(number)
        raise error

    monkeypatch.setattr(worker_room, "_PAUSES", (60.0, 60.0))
    monkeypatch.setattr(pipeline_room, "segment_block", fails)
    (slide,) = segment(path).slides
    assert ("finite logits" if isinstance(error, ComputeError) else "KeyError") in slide.reason
    assert len(tried) == len(set(tried)) > 1


def test_the_reason_of_an_unexpected_error_is_one_line_without_flags(tmp_path, segment, monkeypatch):
    def fails(*arguments):
        raise KeyError("trim")

    monkeypatch.setattr(lifecycle, "plan_slide", fails)
    (slide,) = segment(write_ome_zarr(tmp_path / "a.zarr", blobs(60, 60))).slides
    assert slide.reason == "KeyError: 'trim'"


@pytest.mark.parametrize(
    ("error", "cause", "passes"),
    [
        (TimeoutError("slow"), None, True),
        (ReadError("a", expected="b", found="c", remedy="d"), ConnectionResetError("busy"), True),
        (OutputError("a", expected="b", found="c", remedy="d"), OSError(28, "full"), True),
        (ReadError("a", expected="b", found="c", remedy="d"), RuntimeError("stale (os error 116)"), True),
        (ReadError("a", expected="b", found="c", remedy="d"), RuntimeError("the checksum is invalid"), False),
        (ComputeError("a", expected="b", found="c", remedy="d"), None, False),
        (TypeError("a"), None, False),
    ],
)
def test_what_may_pass_is_what_a_store_had_a_part_in(error, cause, passes):
    error.__cause__ = cause
    assert may_pass(error) == passes


def test_the_traceback_of_a_failed_block_is_shown_on_request(tmp_path, tiny_model):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(300, 300, 1), levels=1)
    chunk = path / "0" / "c" / "0" / "4" / "4"
    chunk.write_bytes(chunk.read_bytes()[:20])
    for flags in ([], ["--debug"]):
        run = launch(path, tiny_model, *flags)
        said, _ = run.communicate()
        assert run.returncode == 1
        assert "readable pixels" in said
        assert ("Traceback" in said and "in segment_block" in said) == bool(flags), said


def test_two_runs_at_once_share_the_images(tmp_path, tiny_model, segment):
    for name in "abcdef":
        write_ome_zarr(tmp_path / "in" / f"{name}.zarr", blobs(200, 200))
    runs = [launch(tmp_path / "in", tiny_model, "--json", str(tmp_path / f"{number}.json")) for number in (0, 1)]
    output = [run.communicate()[0] for run in runs]
    states = {}
    for number in (0, 1):
        for one in json.loads((tmp_path / f"{number}.json").read_text())["slides"]:
            states.setdefault(one["path"], []).append(one["status"])
            assert one["status"] != "held" or "no other run" in one["reason"], output[number]
    assert [run.returncode for run in runs] == [0, 0], output
    for path, both in states.items():
        assert sorted(both) in (["done", "held"], ["done", "skipped"]), (path, both)
    assert segment(tmp_path / "in", downscale=1, block=64).status == "skipped"
    expected = segment(tmp_path / "in", name="alone")
    for index, one in enumerate(expected.slides):
        done = zarr.open_array(one.labels.replace("alone", "cellseg") + "/0", mode="r")[...]
        np.testing.assert_array_equal(done, labels_of(expected, index))


def test_an_image_that_another_run_works_on_is_left_to_it(tmp_path, segment, command, tiny_model):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(60, 60))
    with Locks().hold(tmp_path / "a.zarr.cellseg" / "labels" / "cellseg.lock"):
        report = segment(path)
        assert (report.status, str(os.getpid()) in report.slides[0].reason) == ("held", True)
        code, said = command("run", path, "--model", tiny_model, *TINY_RUN)
        assert (code, "held" in said) == (0, True)
    assert segment(path, retry_failed=True).slides == [], "it has not failed"
    assert segment(path).status == "done"
    assert segment(path).status == "skipped"


def test_a_run_that_finds_all_images_finished_chooses_no_backend(tmp_path, segment, command, tiny_model):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(200, 200))
    assert segment(path).backend == "torch"
    again = segment(path, backend="auto", precision="auto")
    assert (again.status, again.backend, again.compile_seconds) == ("skipped", "", 0)
    code, said = command("run", path, "--model", tiny_model, "--tile", 96)
    assert (code, "1 skipped" in said) == (0, True)
    assert not [word for word in ("choosing", "compile", "model", "blocks") if f" {word} " in said]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_tidily(tmp_path, tiny_model, segment, number, code):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(900, 900), chunk=128)
    journal = Journal(tmp_path / "a.zarr.cellseg" / "labels" / "cellseg")
    run = launch(path, tiny_model)
    wait_for_records(journal, 5, run)
    run.send_signal(number)
    output = run.communicate()[0]
    assert run.returncode == code, output
    assert "stopping: what is in flight is being finished" in output
    assert "goes on where this one stopped" in output
    assert "Traceback" not in output
    assert not list((tmp_path / "a.zarr.cellseg").rglob("*.lock"))
    done = len(journal.numbers("blocks"))
    report = segment(path)
    assert report.status == "done"
    assert report.slides[0].pixels < 900 * 900
    assert done >= 5


def test_a_second_interrupt_ends_a_run_at_once(tmp_path, tiny_model, segment):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(900, 900), chunk=128)
    run = launch(path, tiny_model)
    wait_for_records(Journal(tmp_path / "a.zarr.cellseg" / "labels" / "cellseg"), 5, run)
    for _ in range(2):
        run.send_signal(signal.SIGINT)
    run.communicate()
    assert run.returncode == 130
    assert segment(path).status == "done"


def test_an_output_that_was_changed_meanwhile_is_not_called_complete(tmp_path, segment, in_a_hurry):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(300, 300, 1), levels=1)
    chunk = path / "0" / "c" / "0" / "4" / "4"
    content = chunk.read_bytes()
    chunk.write_bytes(content[:20])
    segment(path)
    first = zarr.open_array(str(path / "labels" / "cellseg" / "0"), mode="r+")
    first[:20, :20] = 1 - first[:20, :20]
    chunk.write_bytes(content)
    report = segment(path)
    assert report.status == "failed"
    assert "other pixels than task 0 wrote" in report.slides[0].reason
    assert segment(path, overwrite=True).status == "done"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_named_and_what_is_done_is_kept(tmp_path, segment, small_disk, in_a_hurry):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(600, 600), chunk=100)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1_700_000))
    report = segment(path, output=small_disk, block=64, workers=1)
    assert report.status == "failed"
    assert "No space left" in report.slides[0].reason
    journal = next(small_disk.rglob("manifest.json")).parent
    done = len(Journal(journal).numbers("blocks"))
    assert done > 0
    ballast.unlink()
    report = segment(path, output=small_disk, block=64)
    assert report.status == "done"
    assert report.slides[0].pixels < 600 * 600
    expected = segment(path, name="elsewhere")
    np.testing.assert_array_equal(labels_of(report), labels_of(expected))


def test_no_thread_of_a_run_is_left_behind(tmp_path, segment):
    before = threading.active_count()
    segment(write_ome_zarr(tmp_path / "a.zarr", blobs(60, 60)))
    until = time.monotonic() + 60
    while threading.active_count() > before + 1 and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() <= before + 1, "zarr's own event loop may have started"
