"""Killed at random moments, run again, and the output is bit for bit that of a run that nothing happened to.

CELLSEG_CHAOS_SEED repeats a run; the seed is printed.
"""

import multiprocessing
import os
import random
import signal
import time
from contextlib import suppress

import numpy as np
import psutil
import pytest
import zarr
from pyarrow import parquet

from cellseg_batch.engine.run.campaign import run as run_campaign
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.storage.atomic_files import PARTIAL_SUFFIX
from cellseg_batch.engine.storage.journal import Journal
from tests.support.images import blobs, write_ome_zarr
from tests.support.watcher import Watcher
from tests.support.workers import allow, records, set_pace

SEED = int(os.environ.get("CELLSEG_CHAOS_SEED", "7"))
KILLS = 20


def segment_in_child(path, settings):
    set_pace()
    run_campaign([path], settings, Watcher())


def content(store):
    """Path -> pixels of every array of an output."""
    return {
        name: array[...]
        for name, array in zarr.open_group(str(store), mode="r").members(max_depth=None)
        if isinstance(array, zarr.Array) and not name.isdecimal()
    }


def workers_of(child):
    """The processes that work for a child; they are forked from a server of its own."""
    below = psutil.Process(child.pid).children(recursive=True)
    return [one for one in below if one.ppid() != child.pid]


def kill(child, whole, draw):
    """Kill a child with all that it started, or if not the ``whole``, one of its workers if it has any."""
    with suppress(psutil.NoSuchProcess):
        workers = workers_of(child)
        if workers and not whole:
            draw.choice(workers).kill()
            return
        for one in workers:
            with suppress(psutil.NoSuchProcess):  # killed just before
                one.kill()
        psutil.Process(child.pid).kill()
    child.join()


def torment(path, settings, draw):
    """Run over ``path`` in children; after every few tasks kill a worker or the whole child.  Returns the kills."""
    # Children of a server that has torch loaded already start in no time.
    context = multiprocessing.get_context("forkserver")
    needed = [
        "tests.conftest",
        "tests.support.workers",
        "cellseg_batch.engine.inference.backends.torch_cpu",
        "distributed",
    ]
    context.set_forkserver_preload(needed)
    folder = path.with_name(path.name + ".cellseg") / "labels" / settings.name
    kills = 0
    while kills < KILLS and not Journal(folder).is_finished:
        child = context.Process(target=segment_in_child, args=(path, settings))
        child.start()
        while child.is_alive() and kills < KILLS:
            enough = records(folder) + draw.randrange(5)
            allow(folder, enough + 3)
            while child.is_alive() and records(folder) < enough:
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.05))
            if child.is_alive():
                kill(child, kills % 5 == 4, draw)
                kills += 1
        child.kill()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
    return kills


@pytest.mark.parametrize("scheduler", ["threads", pytest.param("processes", marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_gives_the_same_bits(tmp_path, tiny_model, scheduler):
    side = 500
    draw = random.Random(SEED)
    print(f"chaos seed {SEED}")
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(side, side), levels=3, chunk=100)
    usual = {"model": str(tiny_model), "backend": "torch", "precision": "fp32", "threads": 1, "tile": 64, "block": 32}
    usual |= {"probability": True, "objects": True}
    run_campaign([path], Settings(**usual, name="whole"), Watcher())
    assert torment(path, Settings(**usual, name="killed", workers=2, scheduler=scheduler), draw) == KILLS
    report = run_campaign([path], Settings(**usual, name="killed"), Watcher())
    assert report.status == "done"
    assert 0 < report.slides[0].pixels < side * side, "the last run had something left to do, and not all"
    for store in (path, tmp_path / "a.cellseg.zarr"):
        expected = {name: pixels for name, pixels in content(store).items() if "whole" in name}
        assert expected
        for name, pixels in expected.items():
            np.testing.assert_array_equal(content(store)[name.replace("whole", "killed")], pixels)
    tables = [
        parquet.read_table(tmp_path / "a.zarr.cellseg" / "labels" / name / "objects.parquet")
        for name in ("whole", "killed")
    ]
    assert tables[0].num_rows > 100
    assert tables[0].equals(tables[1])
    assert not list(tmp_path.rglob(f"*{PARTIAL_SUFFIX}")), "what was half written is swept"
