"""What a process says of its own memory, and who bounds it."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from cellseg_batch.engine import machine
from cellseg_batch.engine.machine import peak_resident_bytes, resident_bytes
from tests.support.images import blobs, write_ome_zarr

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


@pytest.fixture
def heap_limits(monkeypatch):
    """What mallopt is asked for, which nothing then does."""
    asked = []
    library = SimpleNamespace(mallopt=lambda *limit: asked.append(limit))
    monkeypatch.setattr(machine, "ctypes", SimpleNamespace(CDLL=lambda name: library))
    monkeypatch.setattr(machine.sys, "platform", "linux")
    return asked


def test_only_the_command_line_bounds_heaps(heap_limits, segment, command, tiny_model, tmp_path):
    slide = write_ome_zarr(tmp_path / "slide.zarr", blobs(64, 64))
    assert segment(slide, name="python").status == "done"
    assert heap_limits == []
    arguments = ["--model", tiny_model, "--backend", "torch", "--precision", "fp32", "--threads", 1, "-q"]
    assert command("run", slide, *arguments)[0] == 0
    assert len(heap_limits) == 2
