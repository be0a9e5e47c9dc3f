"""The diagnosis as JSON."""

import json
import os


def test_a_diagnosis_has_typed_values(tmp_path, command):
    assert command("doctor", "--json", tmp_path / "doctor.json")[0] == 0
    diagnosis = json.loads((tmp_path / "doctor.json").read_text())
    assert diagnosis["cores"] == len(os.sched_getaffinity(0))
    assert 0 < diagnosis["free_bytes"] <= diagnosis["memory_bytes"]
    assert diagnosis["models"] == ["nuclei", "nuclei-lite0"]
    states = {(state["backend"], state["precision"]): state for state in diagnosis["backends"]}
    reference = states["torch", "fp32"]
    assert (reference["device"], reference["reason"], reference["remedy"]) == ("CPU", "", "")
    assert all(library.keys() == {"name", "version", "remedy"} for library in diagnosis["libraries"])
