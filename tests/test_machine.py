"""What a process says of its own memory."""

import subprocess
import sys

import numpy as np
import pytest

from cellseg_batch.engine.machine import let_go_of_code, peak_resident_bytes, resident_bytes
from cellseg_batch.kernels import stitch_numba, stitch_reference

_SAY = "from cellseg_batch.engine.machine import peak_resident_bytes as peak; print(peak())"


def test_the_peak_stays_when_memory_is_given_back():
    before = resident_bytes()
    np.ones(100_000_000, np.uint8)
    assert peak_resident_bytes() > before + 80_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="told by /proc")
def test_the_peak_is_not_that_of_the_program_that_started_this_one():
    held = np.ones(400_000_000, np.uint8)
    said = subprocess.run([sys.executable, "-c", _SAY], capture_output=True, check=True)
    assert int(said.stdout) < held.nbytes / 2


@pytest.mark.skipif(sys.platform != "linux", reason="nothing is given back elsewhere")
def test_libraries_that_are_given_back_still_run():
    def mask(stitch) -> np.ndarray:
        out = np.zeros((8, 8), np.uint8)
        stitch.stitch_mask(np.eye(8, dtype=np.float32)[None, None], np.array([[0, 0, 0, 0, 8, 8]]), 0.5, out)
        return out

    expected = mask(stitch_reference)
    assert np.array_equal(mask(stitch_numba), expected)  # which loads LLVM, of 30 MB and more
    before = resident_bytes()
    let_go_of_code()
    assert resident_bytes() < before - 20_000_000
    assert np.array_equal(mask(stitch_numba), expected)
    assert expected.any()
