"""Processes that are kept alive: killed once they run, killed while they start, and left without a parent."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from cellseg_batch.engine.scheduling import process_keeper as processes
from cellseg_batch.engine.scheduling.process_keeper import Processes
from tests.support.workers import live

SCRIPT = """
import sys
from pathlib import Path
from cellseg_batch.engine.scheduling.process_keeper import Processes
from tests.support.workers import live
if __name__ == "__main__":
    Processes(live, [(Path(sys.argv[1]), 0)], (), print)
    sys.stdin.read()
"""


def wait_for(look):
    until = time.monotonic() + 600
    while not (found := look()):
        assert time.monotonic() < until
        time.sleep(0.01)
    return found


def alive(folder):
    """Numbers of the processes that have started and are alive."""
    return [int(note.read_text()) for note in folder.glob("*.started") if psutil.pid_exists(int(note.read_text()))]


@pytest.fixture
def keep(monkeypatch):
    """Start processes that are gone at the end of the test; they are tried again at once."""
    monkeypatch.setattr(processes, "_WAITS", (0.0,) * 5)
    kept = []

    def start(tasks, gone=print):
        kept.append(Processes(live, tasks, (), gone))
        return kept[-1]

    yield start
    for one in kept:
        one.close()


def test_one_that_is_killed_is_replaced_again_and_again(tmp_path, keep):
    kept = keep([(tmp_path, 0)])
    killed = set()
    for _ in range(8):
        (number,) = wait_for(lambda: set(alive(tmp_path)) - killed)
        os.kill(number, signal.SIGKILL)
        killed.add(number)
    wait_for(lambda: set(alive(tmp_path)) - killed)
    kept.close()
    assert not alive(tmp_path)


def test_one_that_dies_while_it_starts_is_tried_again(tmp_path, keep):
    keep([(tmp_path, 4)])
    wait_for(lambda: alive(tmp_path))
    assert len(list(tmp_path.glob("*.born"))) == 4


def test_when_none_starts_it_is_said_once_and_why(tmp_path, keep):
    said = []
    (tmp_path / "other").mkdir()
    keep([(tmp_path, 1000), (tmp_path / "other", 6)], gone=said.append)
    wait_for(lambda: len(list(tmp_path.rglob("*.born"))) == 10 and said)
    assert said == ["5 tries that ended before it had started, the last with exit code -9"]


def test_the_others_go_on_without_one_that_does_not_start(tmp_path, keep):
    said = []
    (tmp_path / "other").mkdir()
    keep([(tmp_path, 1000), (tmp_path / "other", 0)], gone=said.append)
    wait_for(lambda: len(list(tmp_path.glob("*.born"))) == 5 and alive(tmp_path / "other"))
    assert not said


def test_they_end_with_a_parent_that_is_killed(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", SCRIPT, tmp_path], stdin=subprocess.PIPE)
    (number,) = wait_for(lambda: alive(tmp_path))
    parent.kill()
    parent.communicate()
    wait_for(lambda: number not in alive(tmp_path))
