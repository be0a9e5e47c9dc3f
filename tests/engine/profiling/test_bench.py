"""Results of measurements: what a comparison flags, what it does not, and that the command writes what it reads."""

import json
from pathlib import Path

import numpy as np
import pytest
import zarr

from cellseg_batch.engine.profiling import bench as suite
from cellseg_batch.engine.profiling.bench_compare import compare_results
from cellseg_batch.engine.profiling.bench_slides import Form, shipped_pieces, write_plate, write_slide
from cellseg_batch.engine.slides.discover import find_images


def result(rates, seed, noise=0.03, machine=1.0):
    """What bench writes on a machine of some speed, whose rounds vary together and each on its own."""
    rng = np.random.default_rng(seed)
    speed = machine * rng.normal(1, noise, 5)
    rows = [{"name": name, "rounds": (rate * speed * rng.normal(1, noise, 5)).tolist()} for name, rate in rates.items()]
    return {"conditions": {"processor": "x"}, "yardstick": speed.tolist(), "rows": rows}


RATES = {"slide": 12.0, "plate": 10.0, "model": 13.0, "read": 200.0, "write": 150.0}


@pytest.mark.parametrize("seed", range(20))
def test_a_slowdown_of_a_fifth_is_flagged_and_nothing_else(seed):
    slower = {**RATES, "plate": RATES["plate"] * 0.8}
    rows = compare_results(result(RATES, seed), result(slower, 1000 + seed))
    assert [row.name for row in rows if row.regressed] == ["plate"]


@pytest.mark.parametrize("machine", [1.0, 0.8, 1.25])
@pytest.mark.parametrize("seed", range(10))
def test_the_same_code_is_not_flagged_even_if_the_machine_has_changed_its_speed(seed, machine):
    rows = compare_results(result(RATES, seed), result(RATES, 1000 + seed, machine=machine))
    assert not [row.name for row in rows if row.regressed]


def test_without_a_yardstick_the_rates_alone_decide(tmp_path, command):
    first, second = result(RATES, 1), result({**RATES, "model": 10.0}, 2)
    for name, content in (("a", first), ("b", second)):
        del content["yardstick"]
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    code, said = command("bench", "compare", tmp_path / "a.json", tmp_path / "b.json")
    assert code == 1
    assert said.count("slower") == 1
    assert command("bench", "compare", tmp_path / "b.json", tmp_path / "a.json")[0] == 0


@pytest.mark.parametrize("content", ["", "{}", '{"rows": [{"name": "a", "rounds": []}]}', '{"rows": 3}'])
def test_what_is_no_result_is_refused(tmp_path, command, content):
    (tmp_path / "a.json").write_text(content)
    code, said = command("bench", "compare", tmp_path / "a.json", tmp_path / "a.json")
    assert code == 2
    assert "expected a result of cellseg-batch bench" in said


def test_results_without_a_common_row_are_refused(tmp_path, command):
    for name in "ab":
        (tmp_path / name).write_text(json.dumps({"rows": [{"name": name, "rounds": [1.0]}]}))
    assert command("bench", "compare", tmp_path / "a", tmp_path / "b")[0] == 2


def test_the_command_measures_and_a_planted_slowdown_is_found(tmp_path, tiny_model, command, monkeypatch):
    monkeypatch.setattr(suite, "_FIELDS", 1)
    out, slow = tmp_path / "a.json", tmp_path / "b.json"
    flags = ["--model", tiny_model, "--backend", "torch", "--precision", "fp32", "--tile", 512]
    code, said = command("bench", "--out", out, "--rounds", 2, "--side", 256, *flags)
    assert code == 0, said
    content = json.loads(out.read_text())
    names = {row["name"] for row in content["rows"]}
    assert {"256 px slide, end to end", "plate of 1 fields, end to end", "model, alone", "read, alone"} <= names
    assert len(content["yardstick"]) == 2
    assert content["conditions"]["cores"] >= 1
    for row in content["rows"]:
        row["rounds"] = [rate * 0.5 for rate in row["rounds"]]
    slow.write_text(json.dumps(content))
    assert command("bench", "compare", out, out)[0] == 0
    assert command("bench", "compare", out, slow)[0] == 1


@pytest.mark.parametrize("form", [Form(600, chunk=256), Form(512, "uint16", 128, shard=256, levels=2, tissue=0.3)])
def test_slides_are_the_same_everywhere_and_of_the_form_that_was_asked_for(tmp_path, form):
    for name in "ab":
        write_slide(tmp_path / f"{name}.zarr", form, shipped_pieces())
    (slide,) = find_images(tmp_path / "a.zarr", None)
    first, second = (zarr.open_array(f"{tmp_path}/{name}.zarr/0", mode="r") for name in "ab")
    assert first.shape == (3 if form.dtype == "uint8" else 1, form.side, form.side)
    assert (first.dtype, len(slide.levels)) == (form.dtype, form.levels)
    np.testing.assert_array_equal(first[...], second[...])
    corner = first[0, :50, :50]
    assert (corner.std() < 3 * (257 if form.dtype == "uint16" else 1)) == (form.tissue < 1)


def test_plates_have_as_many_fields_as_asked_for(tmp_path):
    fields = find_images(write_plate(tmp_path / "p.zarr", 12, shipped_pieces()), None)
    assert [Path(field.path).parts for field in fields[::9]] == [("A", "1", "0"), ("A", "1", "9")]
    assert len(fields) == 12
    assert fields[11].levels[0].shape == (1, 1080, 1080)
