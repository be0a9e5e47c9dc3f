"""Killed at random moments, run again, and the output is bit for bit that of a run that nothing happened to.

CELLSEG_CHAOS_SEED repeats a run; the seed is printed.
"""

import multiprocessing
import os
import random
import signal
import time

import numpy as np
import psutil
import pytest
import zarr
from pyarrow import parquet

from cellseg_batch.engine.campaign import run as run_campaign
from cellseg_batch.engine.files import PARTIAL_SUFFIX
from cellseg_batch.engine.journal import Journal
from cellseg_batch.engine.settings import Settings
from tests.conftest import Watcher, blobs, write_ome_zarr

SEED = int(os.environ.get("CELLSEG_CHAOS_SEED", "7"))
KILLS = 20


def segment_in_child(path, settings):
    os.setpgrp()
    run_campaign([path], settings, Watcher())


def records(folder):
    """How many tasks are journalled."""
    return len(list(folder.glob("*/**/*.json")))


def content(store):
    """Path -> pixels of every array of an output."""
    return {
        name: array[...]
        for name, array in zarr.open_group(str(store), mode="r").members(max_depth=None)
        if isinstance(array, zarr.Array) and not name.isdecimal()
    }


def kill_tree(process):
    """Kill a child and all that it started."""
    for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        one.kill()
    process.join()


def torment(path, settings, draw, pause):
    """Run over ``path`` in children, each of which is killed after a few more tasks; the number of kills."""
    # Children of a server that has torch loaded already start in no time.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.conftest", "cellseg_batch.engine.backends.torch_backend"])
    journal = Journal(path.with_name(path.name + ".cellseg") / "labels" / settings.name)
    kills = 0
    while kills < KILLS and journal.finished() is None:
        child = context.Process(target=segment_in_child, args=(path, settings))
        child.start()
        enough = records(journal.folder) + draw.randrange(5)
        while child.is_alive() and records(journal.folder) < enough:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, pause))
        if child.is_alive():
            if settings.scheduler == "processes" and draw.random() < 0.5:
                workers = [one for one in psutil.Process(child.pid).children(recursive=True) if one.num_threads() > 3]
                if workers:
                    draw.choice(workers).send_signal(signal.SIGKILL)
                    time.sleep(draw.uniform(0, 2))
            if child.is_alive():
                kill_tree(child)
                kills += 1
    return kills


@pytest.mark.parametrize(
    ("scheduler", "side"),
    [("threads", 700), pytest.param("processes", 1400, marks=pytest.mark.cluster)],
)
def test_a_run_that_is_killed_again_and_again_gives_the_same_bits(tmp_path, tiny_model, scheduler, side):
    draw = random.Random(SEED)
    print(f"chaos seed {SEED}")
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(side, side), levels=3, chunk=100)
    usual = {"model": str(tiny_model), "backend": "torch", "precision": "fp32", "threads": 1, "tile": 64, "block": 32}
    usual |= {"probability": True, "objects": True}
    run_campaign([path], Settings(**usual, name="whole"), Watcher())
    killed = Settings(**usual, name="killed", workers=2, scheduler=scheduler)
    assert torment(path, killed, draw, pause=0.05 if scheduler == "threads" else 1.0) == KILLS
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
