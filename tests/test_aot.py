"""Every Triton kernel compiled for real GPUs, which needs triton and no GPU."""

import importlib.util
import os
import subprocess
import sys

import pytest


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install 'cellseg-batch[triton]'"
)
def test_every_kernel_compiles_for_every_gpu_without_spilling(tmp_path):
    # In its own process: the compiler, where other tests interpret; and with an empty cache.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    output = subprocess.run(
        [sys.executable, "-m", "cellseg_batch.kernels.aot"], env=environment, capture_output=True, text=True, check=True
    ).stdout
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if line.startswith("|")]
    header, measured = rows[0], [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]
    assert header[:4] == ["kernel", "GPU", "registers", "spilled"]
    assert {row["GPU"] for row in measured} == {"sm_80", "sm_90a", "sm_100a"}
    assert {row["kernel"].split()[0] for row in measured} == {"stitch", "blend", "gather"}
    assert len(measured) == 3 * 16
    for row in measured:
        assert row["spilled"] == "0", row
        assert 0 < int(row["registers"]) <= 128, row  # four programs of four warps fit a processor
        if not row["kernel"].startswith("gather"):
            assert row["vector load"] == "16", row
