"""One run at a time on one output; a dead one's lock is taken over."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from cellseg_batch.engine.storage import lock
from cellseg_batch.engine.storage.lock import BusyError, Locks


def forge(path, **changes):
    """The lock of another owner."""
    with Locks().hold(path):
        owner = json.loads(path.read_text())
    path.write_text(json.dumps({**owner, "token": "other", **changes}))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal" / "mask.lock"


def test_a_lock_is_held_by_one_and_leaves_nothing(path):
    with Locks().hold(path), pytest.raises(BusyError, match=f"process {os.getpid()}"), Locks().hold(path):
        pass
    assert list(path.parent.iterdir()) == []


def test_a_lock_that_is_waited_for_is_held_after_its_owner(path, monkeypatch):
    turns, waits, pause = [], threading.Event(), time.sleep
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: waits.set() or pause(seconds / 100))

    def wait():
        with Locks().wait_for(path):
            turns.append("second")

    second = threading.Thread(target=wait)
    with Locks().hold(path):
        second.start()
        while second.is_alive() and not waits.wait(0.05):
            pass
        turns.append("first")
    second.join()
    assert turns == ["first", "second"]


def test_a_dead_process_of_this_machine_is_taken_over_at_once(path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    forge(path, pid=dead.pid)
    with Locks().hold(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_another_process_with_the_number_of_a_dead_one_is_not_it(path):
    forge(path, started=1.0)
    with Locks().hold(path):
        pass


def test_another_machine_is_taken_over_after_its_lease(path):
    forge(path, machine="other", host="node7")
    with pytest.raises(BusyError, match="node7"), Locks().hold(path):
        pass
    os.utime(path, (time.time() - 200, time.time() - 200))
    with Locks().hold(path):
        pass


def test_an_owner_renews_its_lease_and_notices_that_it_has_lost_it(path):
    locks = Locks(lease=0.05)
    with locks.hold(path):
        os.utime(path, (1, 1))
        while path.stat().st_mtime < 2:
            time.sleep(0.01)
        locks.check(path)
        forge(path.with_name("other"), machine="other")
        path.write_text(path.with_name("other").read_text())
        with pytest.raises(BusyError):
            locks.check(path)
    assert path.exists(), "another's lock is not given back"
    locks.close()


def test_of_many_that_take_over_one_wins(path):
    winners, losers, start = [], threading.Semaphore(0), threading.Barrier(8)

    def take_over():
        locks = Locks()
        start.wait()
        try:
            with locks.hold(path):
                winners.append(path)
                for _ in range(7):
                    losers.acquire(timeout=20)
        except BusyError:
            losers.release()

    forge(path, started=1.0)
    threads = [threading.Thread(target=take_over) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1


def test_what_a_killed_run_left_of_its_lock_is_swept(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    left = path.with_name(f"{path.name}.0123.partial")
    left.touch()
    with Locks().hold(path):
        assert not left.exists()
