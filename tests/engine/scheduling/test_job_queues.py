"""Workers as jobs of PBS and LSF, whose commands are stood in for by scripts that start the jobs on this machine."""

import os

import numpy as np
import pytest

from tests.support.images import blobs, labels_of, write_ome_zarr
from tests.support.processes import launch

# How a job is submitted: the command, the answer that names the job, how it is cancelled, GPUs, lines of its script.
QUEUES = {
    "pbs": (
        "qsub",
        "4711.server",
        "qdel",
        "ngpus=1",
        ["#PBS -q gpu", "#PBS -A lab", "#PBS -l select=1:ncpus=2:mem=1GB:ngpus=1", "#PBS -l walltime=00:10:00"],
    ),
    "lsf": (
        "bsub",
        "Job <4711> is submitted to queue <gpu>.",
        "bkill",
        "num=1",
        ["#BSUB -q gpu", '#BSUB -P "lab"', "#BSUB -n 2", "#BSUB -W 00:10", "#BSUB -gpu num=1"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", QUEUES)
def test_a_run_on_a_queue_gives_what_it_gives_here(tmp_path, tiny_model, segment, monkeypatch, name):
    pytest.importorskip("dask_jobqueue")
    submit, answer, cancel, gpus, lines = QUEUES[name]
    folder = tmp_path / "commands"
    folder.mkdir()
    (folder / submit).write_text(f"""#!/bin/bash
job=$(mktemp {folder}/job.XXXXXX)
cat "${{1:-/dev/stdin}}" > $job
setsid bash $job > $job.log 2>&1 &
echo $! >> {folder}/groups
echo '{answer}'
""")
    (folder / cancel).write_text(f"#!/bin/bash\nfor group in $(cat {folder}/groups); do kill -- -$group; done\n")
    for command in (submit, cancel):
        (folder / command).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(500, 500))
    asked = ["--scheduler", name, "--workers", "1", "--cores", "2", "--memory", "1GB", "--walltime", "00:10:00"]
    run = launch(path, tiny_model, *asked, "--queue", "gpu", "--account", "lab", "--gres", gpus)
    output = run.communicate(timeout=240)[0]
    logs = "\n".join(log.read_text() for log in folder.glob("job.*.log"))
    assert run.returncode == 0, output + logs
    (script, *_) = (job.read_text() for job in folder.glob("job.*") if job.suffix != ".log")
    for line in lines:
        assert line in script.splitlines()
    assert "--nthreads 2" in script
    done = segment(path, block=64)
    assert done.status == "skipped"
    np.testing.assert_array_equal(labels_of(done), labels_of(segment(path, name="here", block=64)))
