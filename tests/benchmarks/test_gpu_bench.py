"""benchmarks/gpu.sh and what it runs, as far as they go without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.images import blobs, write_ome_zarr

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_every_part_of_the_benchmark_that_needs_no_gpu_runs(tmp_path):
    out = tmp_path / "result.json"
    command = [sys.executable, "bench_gpu.py", "--device", "cpu", "--tiny", "--minutes", "99", "--out", out]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run(command, cwd=FOLDER, env=environment, check=True, capture_output=True)
    result = json.loads(out.read_text())
    assert "mean nothing" in result["conditions"]["gpu"]
    parts = {(row["part"], row.get("backend")) for row in result["rows"] if "missing" not in row}
    assert {("ceilings", None), ("kernels", None), ("networks", "torch-cuda")} <= parts
    missing = {row["missing"] for row in result["rows"] if row["part"] == "run"}
    assert missing == {"no GPU"}


@pytest.mark.slow
def test_without_a_gpu_the_script_says_so():
    hidden = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(["bash", FOLDER / "gpu.sh"], env=hidden, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "expected a GPU that torch can use" in done.stderr


@pytest.mark.slow
def test_the_hosts_ceiling_is_measured_without_a_gpu(tmp_path):
    image = write_ome_zarr(tmp_path / "a.zarr", blobs(700, 600))
    command = [sys.executable, "bench_host.py", "--workers", "1", "--measure", image, tmp_path / "out"]
    done = subprocess.run(command, cwd=FOLDER, check=True, capture_output=True, text=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["mpx"] == 0.42
    assert min(figures["seconds"], figures["processor"]) > 0
