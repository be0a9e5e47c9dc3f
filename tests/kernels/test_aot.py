"""Every Triton kernel compiled for real GPUs, which needs triton and no GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

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
    version, _, *table = output.splitlines()
    header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table)
    measured = {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}
    assert len(measured) == 16
    assert {kernel.split()[0] for kernel in measured} == {"stitch", "blend", "gather", "rows", "codes"}
    for kernel, found in measured.items():
        assert found["spilled"] == "0", kernel
        for target in ("sm_80", "sm_90a", "sm_100a"):
            assert 0 < int(found[target]) <= 128, kernel  # so that four programs of four warps fit a processor
        if kernel.split()[0] in ("stitch", "blend", "codes"):
            assert found["vector load"] == "16", kernel
    written = (Path(__file__).parents[2] / "kernels" / "README.md").read_text()
    if f"With {version} and the ptxas" in written:
        assert "\n".join(table) in written, "kernels/README.md shows the table of another state of the kernels"
