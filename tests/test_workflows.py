"""The Snakemake workflow on six slides, killed on the way and started again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zarr

from tests.support.images import blobs, labels_of, write_ome_zarr

SNAKEFILE = Path(__file__).parents[1] / "workflows" / "snakemake" / "Snakefile"
SNAKEMAKE = os.environ.get("CELLSEG_SNAKEMAKE") or shutil.which("snakemake")
"""Snakemake lives in an environment of its own: its dependencies are none of ours."""


@pytest.mark.slow
@pytest.mark.skipif(SNAKEMAKE is None, reason="no snakemake on PATH or in CELLSEG_SNAKEMAKE")
def test_a_workflow_that_is_killed_goes_on_to_the_same_labels(tmp_path, tiny_model, segment):
    slides, out = tmp_path / "slides", tmp_path / "out"
    for number in range(6):
        write_ome_zarr(slides / f"{number}.zarr", blobs(300, 300, seed=number), levels=1)
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "cellseg-batch").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cellseg_batch.engine.cli "$@"\n')
    (commands / "cellseg-batch").chmod(0o755)
    flags = f"--model {tiny_model} --backend torch --precision fp32 --tile 96 --block 64"
    snakemake = [SNAKEMAKE, "-s", SNAKEFILE, "--cores", "2", "--directory", tmp_path, "--config"]
    snakemake += [f"slides={slides}", f"out={out}", f"flags={flags}", "threads=1"]
    environment = {**os.environ, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"}
    with open(tmp_path / "first.log", "w") as log:
        run = subprocess.Popen(snakemake, env=environment, stdout=log, stderr=log, start_new_session=True)
        while not list(out.glob("reports/*.json")):
            assert run.poll() is None, (tmp_path / "first.log").read_text()
            time.sleep(0.05)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    done = len(list(out.glob("reports/*.json")))
    assert done < 6
    subprocess.run([*snakemake, "--unlock"], env=environment, check=True, capture_output=True)
    second = subprocess.run(
        [*snakemake, "--rerun-incomplete"], env=environment, capture_output=True, text=True, check=False
    )
    assert second.returncode == 0, second.stderr
    for number in range(6):
        (slide,) = json.loads((out / "reports" / f"{number}.zarr.json").read_text())["slides"]
        assert slide["status"] in ("done", "skipped")
        expected = segment(slides / f"{number}.zarr", block=64, threads=1, downscale=None)
        labels = zarr.open_array(f"{slide['labels']}/0", mode="r")[...]
        np.testing.assert_array_equal(labels, labels_of(expected))
