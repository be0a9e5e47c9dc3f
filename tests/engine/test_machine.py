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


_LET_GO = """
import numpy as np
from cellseg_batch.engine.machine import let_go_of_code, resident_bytes
from cellseg_batch.kernels import stitch_numba

def probability(stitch):
    out = np.zeros((8, 8), np.uint8)
    stitch.stitch_probability(np.eye(8, dtype=np.float32)[None, None], np.array([[0, 0, 0, 0, 8, 8]]), out)
    return out

first = probability(stitch_numba)  # loads LLVM, of 30 MB and more
before = resident_bytes()
let_go_of_code()
again = probability(stitch_numba)
print(before - resident_bytes(), np.array_equal(first, again), np.array_equal(first > 128, np.eye(8)))
"""


_MEANWHILE = """
import sys, threading
import numpy as np
from cellseg_batch.engine.machine import let_go_of_code
from cellseg_batch.kernels import stitch

sys.setswitchinterval(1e-6)
tile = np.zeros((1, 1, 1, 1), np.float32), np.zeros((1, 6), np.int64), np.zeros((1, 1), np.uint8)
thread = threading.Thread(target=stitch.stitch_probability, args=tile, daemon=True)
thread.start()
while thread.is_alive():
    let_go_of_code()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="nothing is given back elsewhere")
def test_libraries_are_given_back_while_kernels_are_loaded():
    subprocess.run([sys.executable, "-c", _MEANWHILE], check=True, timeout=60)


@pytest.mark.skipif(sys.platform != "linux", reason="nothing is given back elsewhere")
def test_libraries_that_are_given_back_still_run():
    said = subprocess.run([sys.executable, "-c", _LET_GO], capture_output=True, check=True, text=True).stdout.split()
    assert int(said[0]) > 20_000_000
    assert said[1:] == ["True", "True"]
