"""The shared folder of compiled artefacts: sound or made anew, once, by whoever comes first."""

import errno
import json
import subprocess
import sys
import tempfile
import time
from unittest.mock import Mock

import pytest

from cellseg_batch.engine.errors import UsageError
from cellseg_batch.engine.storage import cache as artefacts_room
from cellseg_batch.engine.storage.cache import Artefacts

KEY = {"what": "test", "number": 1}


def fill(folder):
    (folder / "model.bin").write_bytes(bytes(range(256)) * 64)


@pytest.fixture
def artefacts(tmp_path):
    return Artefacts(tmp_path / "cache")


def test_an_entry_is_made_once_and_found_again(artefacts):
    made = []
    first = artefacts.get(KEY, lambda folder: (fill(folder), made.append(1)))
    second = artefacts.get(KEY, lambda folder: made.append(2))
    assert first == second == artefacts.find(KEY)
    assert made == [1]
    assert json.loads((first / "key.json").read_text()) == KEY
    assert artefacts.find({**KEY, "number": 2}) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: path.write_bytes(b"\x01" + path.read_bytes()[1:]),
        lambda path: path.unlink(),
        lambda path: (path.parent / "checksums.json").write_text("{"),
        lambda path: (path.parent / "checksums.json").unlink(),
    ],
    ids=["truncated", "one bit flipped", "file gone", "checksums torn", "checksums gone"],
)
def test_a_damaged_entry_is_made_anew(artefacts, damage):
    folder = artefacts.get(KEY, fill)
    damage(folder / "model.bin")
    assert artefacts.find(KEY) is None
    assert [entry.sound for entry in artefacts.entries()] == [False]
    artefacts.get(KEY, fill)
    assert (folder / "model.bin").read_bytes() == bytes(range(256)) * 64
    assert [entry.sound for entry in artefacts.entries()] == [True]


def test_a_failed_make_leaves_nothing(artefacts):
    def fail(folder):
        fill(folder)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        artefacts.get(KEY, fail)
    assert artefacts.entries() == []
    assert not list(artefacts.folder.glob("*partial*"))


def test_what_a_killed_process_left_is_no_entry_and_goes_with_the_next_make(artefacts):
    folder = artefacts.get(KEY, fill)
    leftover = artefacts.folder / f"{folder.name}.partial-x"
    leftover.mkdir()
    (leftover / "key.json").write_text("{}")
    assert [entry.folder for entry in artefacts.entries()] == [folder]
    artefacts.drop(KEY)
    artefacts.get(KEY, fill)
    assert not leftover.exists()


def test_clear_removes_entries_and_leftovers(artefacts):
    folder = artefacts.get(KEY, fill)
    artefacts.get({**KEY, "number": 2}, fill)
    leftover = artefacts.folder / f"{folder.name}.partial-x"
    leftover.mkdir()
    assert artefacts.clear() == 2
    assert artefacts.entries() == []
    assert not leftover.exists()


def test_where_nothing_can_be_written_it_is_kept_for_this_process(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(artefacts_room._log, "warning", lambda text, *values: said.append(text % values))
    (tmp_path / "file").write_text("in the way")
    artefacts = Artefacts(tmp_path / "file" / "cache")
    assert (artefacts.get(KEY, fill) / "model.bin").exists()
    assert "not kept" in said[0]


def test_sound_entries_of_a_cache_that_cannot_be_written_are_used(tmp_path, monkeypatch):
    Artefacts(tmp_path).get(KEY, fill)
    monkeypatch.setattr(artefacts_room, "_is_writable", lambda folder: False)
    artefacts, made = Artefacts(tmp_path), []
    assert artefacts.get(KEY, lambda folder: made.append(1)).parent == tmp_path
    assert len(artefacts.entries()) == 1
    other = artefacts.get({**KEY, "number": 2}, fill)
    assert other.parent != tmp_path
    assert artefacts.find({**KEY, "number": 2}) == other
    artefacts.drop(KEY)
    assert artefacts.get(KEY, fill).parent == other.parent, "what was dropped is made anew"


def test_a_disk_that_fills_up_costs_the_cache_and_not_the_run(tmp_path, monkeypatch):
    artefacts = Artefacts(tmp_path / "cache")

    def fill_elsewhere(folder):
        if folder.is_relative_to(tmp_path):
            raise OSError(errno.ENOSPC, "No space left on device")
        fill(folder)

    assert not artefacts.get(KEY, fill_elsewhere).is_relative_to(tmp_path)
    monkeypatch.setattr(tempfile, "mkdtemp", Mock(side_effect=FileNotFoundError("No usable temporary directory")))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match="CELLSEG_CACHE_DIR"):
        Artefacts(tmp_path / "file" / "cache").get(KEY, fill)


def test_eight_processes_at_once_make_one_entry(tmp_path):
    code = f"""
import os, sys, time
from pathlib import Path
from cellseg_batch.engine.storage.cache import Artefacts
def make(folder):
    with open({str(tmp_path / "made")!r}, "a") as stream:
        stream.write(f"{{os.getpid()}}\\n")
    time.sleep(0.3)
    (folder / "model.bin").write_bytes(b"x" * 100000)
sys.stdin.readline()
folder = Artefacts(Path({str(tmp_path / "cache")!r})).get({KEY!r}, make)
print(len((folder / "model.bin").read_bytes()))
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    time.sleep(0.5)
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate()[0] for process in processes] == ["100000\n"] * 8
    assert len((tmp_path / "made").read_text().splitlines()) == 1
