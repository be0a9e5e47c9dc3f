"""The launchers of the Triton kernels through Triton's real JIT, which needs no GPU; and their tables."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from cellseg_batch.kernels import _tensors

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install 'cellseg-batch[triton]'"
)


def launches_for(folder, *capabilities):
    """What every launcher launches, in a process where kernels are compiled and not interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, "-m", "tests.support.jit_without_gpu", *map(str, capabilities)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def check(launches):
    kernels = {"crop_kernel", "blend_kernel", "gather_kernel", "rows_kernel", "codes_kernel"}
    assert {launch["kernel"] for launch in launches} == kernels
    for launch in launches:
        assert min(launch["grid"]) > 0
        assert launch["warps"] == 4
        types = launch["types"]
        for name in ("threshold", "low", "scale", "foreground"):
            assert types.get(name, "fp32") == "fp32", "a whole number would be taken for an integer"
        tables = [types[name] for name in types if name in ("places_ptr", "tables_ptr", "weights_ptr", "columns_ptr")]
        assert set(tables) <= {"*i64"}


@needs_triton
def test_every_launcher_compiles_for_the_arguments_of_a_run(tmp_path):
    check(launches_for(tmp_path, 90))
    codes = [path.read_text() for path in tmp_path.rglob("blend_kernel.ptx")]
    masks = [code for code in codes if "ex2" not in code]  # a probability takes an exponential
    assert 0 < len(masks) < len(codes)
    assert not [code for code in masks if "div.full" in code], "an approximate division, where the CPU's is exact"


@needs_triton
@pytest.mark.slow
def test_every_launcher_compiles_for_other_gpus_too(tmp_path):
    check(launches_for(tmp_path, 80, 100))


def test_tables_go_up_as_cuda_builds_allow_it(monkeypatch):
    """There, torch refuses to pin what it makes from numpy; only a pinned table is copied without waiting."""
    pinned, real_empty = set(), torch.empty

    def tensor(*arguments, pin_memory=False, **keywords):
        raise RuntimeError("Can't pin tensor constructed from numpy")

    def empty(*arguments, pin_memory=False, **keywords):
        made = real_empty(*arguments, **keywords)
        if pin_memory:
            pinned.add(made.data_ptr())
        return made

    def to(self, device, non_blocking=False):
        assert (device, non_blocking) == (torch.device("cuda:1"), True)
        assert self.data_ptr() in pinned
        return self

    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.Tensor, "to", to)
    table = np.arange(12).reshape(3, 4)
    for view in (table, table[:, ::2], table.T):
        sent = _tensors.upload(view, torch.device("cuda:1"))
        assert sent.dtype == torch.int64
        np.testing.assert_array_equal(sent, view)
