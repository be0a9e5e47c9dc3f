"""What a process says of its own memory."""

import subprocess
import sys

import numpy as np
import pytest

from cellseg_batch.engine.machine import peak_resident_bytes, resident_bytes

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
