"""A real SLURM on this machine: workers as jobs, one cancelled on the way, one that runs out of time."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from cellseg_batch.engine.storage.journal import Journal
from tests.support.images import blobs, labels_of, write_ome_zarr
from tests.support.processes import launch, wait_for_records

pytestmark = pytest.mark.cluster
_MISSING = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(name) is None]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment in which SLURM's commands find the cluster."""
    if _MISSING or os.geteuid():
        pytest.skip(f"SLURM cannot be started here: {', '.join(_MISSING) or 'not root'}")
    pytest.importorskip("dask_jobqueue")
    # A socket's path may have 107 characters; pytest's folders are too deep.
    folder = Path(subprocess.check_output(["mktemp", "-d", "/tmp/slurm.XXXXXX"], text=True).strip())
    script = Path(__file__).parents[2] / "support" / "slurm.sh"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("DASK_JOBQUEUE__SLURM__LOG_DIRECTORY", str(folder / "logs"))
        try:
            subprocess.run(["bash", script, "start", folder], check=True)
            until = time.monotonic() + 60
            while "idle" not in subprocess.run(["sinfo", "-h", "-o", "%t"], capture_output=True, text=True).stdout:
                assert time.monotonic() < until, (folder / "logs" / "slurmctld.log").read_text()[-3000:]
                time.sleep(0.5)
            yield folder
        finally:
            subprocess.run(["scancel", "--user", "root"], check=False)
            subprocess.run(["bash", script, "stop", folder], check=False)
            shutil.rmtree(folder, ignore_errors=True)


def jobs():
    """Numbers of the jobs that run."""
    return subprocess.check_output(["squeue", "-h", "-t", "RUNNING", "-o", "%i"], text=True).split()


def test_a_run_on_slurm_survives_the_end_of_its_jobs(tmp_path, tiny_model, segment, slurm):
    path = write_ome_zarr(tmp_path / "plate" / "a.zarr", blobs(1500, 1500), chunk=128)
    write_ome_zarr(tmp_path / "plate" / "b.zarr", blobs(300, 300, seed=1))
    asked = ["--scheduler", "slurm", "--workers", "2", "--cores", "1", "--memory", "1GB", "--walltime", "00:10:00"]
    run = launch(tmp_path / "plate", tiny_model, *asked)
    journal = Journal(path.with_name("a.zarr.cellseg") / "labels" / "cellseg")
    wait_for_records(journal, 5, run)
    subprocess.run(["scancel", jobs()[0]], check=True)
    output = run.communicate()[0]
    assert run.returncode == 0, output
    report = segment(tmp_path / "plate", block=64, downscale=1)
    assert report.status == "skipped"
    expected = segment(tmp_path / "plate", name="here")
    for one, same in zip(report.slides, expected.slides, strict=True):
        assert one.foreground_fraction == same.foreground_fraction
    np.testing.assert_array_equal(labels_of(report), labels_of(expected))
    assert not jobs(), "no job is left behind"


def test_what_a_job_could_not_end_in_its_time_goes_on_in_the_next(tmp_path, tiny_model, segment, slurm):
    """The run itself is a job here: SLURM warns it, it stops tidily, and the same command in a new job goes on."""
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(1500, 1500), chunk=128)
    journal = Journal(tmp_path / "a.zarr.cellseg" / "labels" / "cellseg")
    script = tmp_path / "job.sh"
    log = tmp_path / "job.log"
    run = launch(path, tiny_model)  # for its command line
    run.kill()
    run.communicate()
    command = " ".join(f"'{part}'" for part in run.args)
    script.write_text(f"#!/bin/bash\ncd {Path(__file__).parents[3]}\nsrun {command}\necho exit $?\n")
    submitted = subprocess.check_output(["sbatch", "--parsable", "-o", log, script], text=True).strip()
    while len(journal.numbers("blocks")) < 5:
        time.sleep(0.05)
    subprocess.run(["scancel", "--signal=USR1", submitted], check=True)
    while "exit" not in (log.read_text() if log.exists() else ""):
        time.sleep(0.2)
    assert "exit 138" in log.read_text()
    assert len(journal.numbers("blocks")) >= 5
    assert journal.finished() is None
    subprocess.check_output(["sbatch", "--wait", "-o", tmp_path / "second.log", script], text=True)
    assert "exit 0" in (tmp_path / "second.log").read_text()
    np.testing.assert_array_equal(labels_of(segment(path, block=64)), labels_of(segment(path, name="here")))
