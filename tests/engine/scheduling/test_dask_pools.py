"""The same run on worker processes: same bits, and workers that die on the way."""

import os
import signal
import threading
import time

import numpy as np
import psutil
import pytest

from cellseg_batch.engine.errors import ClusterError, UsageError
from cellseg_batch.engine.scheduling import dask_pools as clusters
from cellseg_batch.engine.scheduling import process_keeper as processes
from cellseg_batch.engine.scheduling.scheduler import TaskGroup, run_workflows
from cellseg_batch.engine.settings import ClusterSettings, Settings
from cellseg_batch.engine.storage.journal import Journal
from tests.support.images import blobs, labels_of, write_ome_zarr
from tests.support.workers import die_of_thirteen, die_while_starting

# Sockets and pipes of a cluster that is going away are closed late, by the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def worker_processes():
    """The processes that hold a dask worker: they are forked from a child of this one."""
    return [one for child in psutil.Process().children() for one in child.children()]


def test_processes_give_the_bits_of_threads_and_survive_the_death_of_a_worker(tmp_path, segment):
    paths = [
        write_ome_zarr(tmp_path / f"{name}.zarr", blobs(500, 500, seed=seed), chunk=128)
        for seed, name in enumerate("ab")
    ]
    expected = segment(*paths, name="threads", probability=True)
    killed = []

    def kill_one():
        journal = Journal(tmp_path / "a.zarr.cellseg" / "labels" / "processes")
        while len(journal.numbers("blocks")) < 5:
            time.sleep(0.005)
        victim = worker_processes()[0]
        os.kill(victim.pid, signal.SIGKILL)
        killed.append(victim.pid)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    report = segment(*paths, name="processes", probability=True, scheduler="processes", workers=2, block=64)
    killer.join(60)
    assert len(killed) == 1
    assert [one.status for one in report.slides] == ["done", "done"]
    for index in (0, 1):
        np.testing.assert_array_equal(labels_of(report, index), labels_of(expected, index))
        np.testing.assert_array_equal(labels_of(report, index, level=1), labels_of(expected, index, level=1))
    assert report.stages["model"] > 0, "the seconds of other processes count too"
    assert not worker_processes(), "no process is left behind"


def test_a_run_whose_workers_cannot_start_ends_and_says_why(tmp_path, segment, monkeypatch):
    monkeypatch.setattr(processes, "_WAITS", (0.0, 0.0))
    monkeypatch.setattr(clusters, "_serve", die_while_starting)
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(60, 60))
    with pytest.raises(ClusterError, match="2 tries that ended before it had started, the last with exit code -9"):
        segment(path, scheduler="processes", workers=2)


def test_a_task_that_kills_its_worker_costs_only_itself():
    done, lost = [], []

    def workflow():
        yield TaskGroup(
            die_of_thirteen, range(60), done.append, lambda item, error: lost.append((item, type(error).__name__))
        )

    pool = clusters.open_pool(Settings(scheduler="processes", workers=2, backend="torch"))
    list(run_workflows(iter([workflow()]), pool))
    assert lost == [(13, "KilledWorker")]
    assert sorted(done) == [number for number in range(60) if number != 13]


def test_worker_processes_leave_signals_to_the_run():
    pool = clusters.open_pool(Settings(scheduler="processes", workers=1, backend="torch"))
    try:
        worker = pool.submit(os.getpid).result()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(worker, number)
        assert pool.submit(os.getpid).result() == worker
    finally:
        pool.close(wait=True)


def test_a_scheduler_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(clusters, "_CONNECT_SECONDS", 0.2)
    with pytest.raises(UsageError, match="scheduler=tcp"):
        clusters.open_pool(Settings(scheduler="tcp://127.0.0.1:9"))
    with pytest.raises(UsageError, match="tcp://host:8786"):
        Settings(scheduler="cloud")
    with pytest.raises(UsageError, match=r"slurm, pbs, lsf.* found threads; .* leave out `queue`, `gres`"):
        Settings(cluster=ClusterSettings(queue="gpu", gres="gpu:1"))


def test_slurm_says_what_it_needs(monkeypatch, tmp_path):
    pytest.importorskip("dask_jobqueue")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="expected the command sbatch, found none on PATH"):
        clusters.open_pool(Settings(scheduler="slurm", cluster=ClusterSettings(queue="q")))
    (tmp_path / "sbatch").write_text("")
    (tmp_path / "sbatch").chmod(0o755)
    with pytest.raises(UsageError, match="`cores`"):
        clusters.open_pool(Settings(scheduler="slurm", cluster=ClusterSettings(queue="q")))
