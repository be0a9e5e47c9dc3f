"""The diagnosis as JSON."""

import json
import os
from importlib.metadata import version


def test_a_diagnosis_has_typed_values(tmp_path, command):
    code, output = command("doctor", "--json", tmp_path / "doctor.json")
    assert (code, output.startswith(f"cellseg-batch {version('cellseg-batch')}: all is well")) == (0, True)
    diagnosis = json.loads((tmp_path / "doctor.json").read_text())
    assert diagnosis["cores"] == len(os.sched_getaffinity(0))
    assert 0 < diagnosis["free_bytes"] <= diagnosis["memory_bytes"]
    assert diagnosis["models"] == ["nuclei"]
    states = {(state["backend"], state["precision"]): state for state in diagnosis["backends"]}
    reference = states["torch", "fp32"]
    assert (reference["device"], reference["reason"], reference["remedy"]) == ("CPU", "", "")
    assert all(library.keys() == {"name", "version", "remedy"} for library in diagnosis["libraries"])


def test_a_gpu_that_nothing_uses_is_the_first_thing_said(tmp_path, command, nvidia_driver):
    nvidia_driver("NVIDIA H200", "580.10")
    _, output = command("doctor", "--json", tmp_path / "doctor.json")
    fault = json.loads((tmp_path / "doctor.json").read_text())["fault"]
    assert fault.startswith("no backend runs on the GPU; ")
    assert output.startswith(f"cellseg-batch {version('cellseg-batch')}: {fault}")
