"""The race: who runs, who wins, what is kept, and what is said when nothing can be used."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from cellseg_batch.engine.cli.compile import print_race
from cellseg_batch.engine.errors import BackendError
from cellseg_batch.engine.geometry import fit_squares
from cellseg_batch.engine.inference import race as racing
from cellseg_batch.engine.inference.backends.gate import Parity
from cellseg_batch.engine.inference.model_pool import ModelPool
from cellseg_batch.engine.inference.race import load_or_race, race, request_of, time_in_turns
from cellseg_batch.engine.inference.race_result import Candidate, RaceResult, Request
from cellseg_batch.engine.models import load_model
from cellseg_batch.engine.settings import TILE, Settings
from cellseg_batch.engine.storage.cache import Artefacts
from cellseg_batch.trainer.bundle import save_bundle

GOOD = Parity(max_dp=0.01, mean_dp=1e-5, flipped=1e-4, object_f1=0.999, object_change=0.0, objects=2100)
BAD = Parity(max_dp=0.9, mean_dp=1e-2, flipped=3e-3, object_f1=0.97, object_change=0.02, objects=2100)


def race_result(*candidates):
    request = Request("m", "auto", "auto", (256, 256), 1, 1)
    return RaceResult(request, "0", (1, 3, 256, 256), "cpu", ("GPU",), {"torch": "2"}, "today", candidates)


REFERENCE = Candidate("torch", "fp32", "", 1.0, 1.0, 1.0, GOOD)
FAST = Candidate("openvino", "bf16", "", 9.0, 8.0, 10.0, GOOD)
BROKEN = Candidate("openvino", "fp32", "", 20.0, 8.0, 30.0, BAD)
INT8 = Candidate("openvino", "int8", "", 30.0, 8.0, 40.0, GOOD)
ABSENT = Candidate("tensorrt", "fp16", "no GPU")


def test_the_fastest_that_passes_wins_and_int8_only_when_asked_for():
    result = race_result(REFERENCE, FAST, BROKEN, INT8, ABSENT)
    assert result.pick("auto", "auto") == FAST
    assert result.pick("auto", "int8") == INT8
    assert result.pick("torch", "auto") == REFERENCE
    rows = result.to_json()["candidates"]
    assert [row["winner"] for row in rows] == [False, True, False, False, False]
    assert [row["passed"] for row in rows] == [True, True, False, True, False]
    assert {"backend", "precision", "mpx_per_s", "max_dp", "mean_dp", "flipped", "object_change"} <= rows[0].keys()


def test_what_fails_the_gate_is_refused_with_its_figures_unless_the_gate_is_off():
    result = race_result(REFERENCE, BROKEN, ABSENT)
    with pytest.raises(BackendError, match=r"flips 3.0e-03 .* F1 0.9700 .*`gate=False`"):
        result.pick("openvino", "fp32")
    assert result.pick("openvino", "fp32", gate=False) == BROKEN
    with pytest.raises(BackendError, match="no GPU"):
        result.pick("tensorrt", "auto", gate=False)


def test_a_race_result_survives_its_file():
    result = race_result(REFERENCE, FAST, BROKEN, ABSENT)
    assert RaceResult.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_the_table_says_how_to_get_what_is_missing():
    console = Console(file=io.StringIO(), width=80)
    remedy = "needs nncf, which turns a network into integers; pip install 'cellseg-batch[int8]'"
    missing = [Candidate(backend, "int8", remedy) for backend in ("openvino", "another")]
    print_race(race_result(REFERENCE, *missing), Settings(), console)
    assert console.file.getvalue().splitlines()[-1] == f"missing  openvino int8, another int8: {remedy}"


def test_all_take_turns_and_the_hopeless_drop_out(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(racing.time, "perf_counter", lambda: clock[0])

    def call(name, seconds):
        def run():
            order.append(name)
            clock[0] += seconds

        return run

    seconds = time_in_turns({"a": call("a", 1.0), "b": call("b", 2.0), "c": call("c", 9.0)})
    assert seconds == {"a": [1.0] * 5, "b": [2.0] * 5, "c": [9.0]}
    assert order[:5] == ["a", "b", "c", "a", "b"]


@pytest.fixture(scope="module")
def asking(tiny_model):
    return lambda **changes: Request(
        **{
            "model": str(tiny_model),
            "backend": "auto",
            "precision": "auto",
            "tile": (256, 256),
            "batch": 2,
            "threads": 1,
        }
        | changes
    )


def test_a_race_runs_everything_that_is_here(asking, tiny_bundle, monkeypatch, tmp_path):
    monkeypatch.setitem(racing.__dict__, "why_not", lambda name, level: "not today" if level == "int8" else "")
    result = race(asking(threads=2, complete=True), tiny_bundle, Artefacts(tmp_path))
    rows = {(one.backend, one.precision): one for one in result.candidates}
    assert rows["openvino", "int8"].missing == "not today"
    assert rows["torch", "fp32"].parity.flipped == 0
    assert rows["openvino", "fp32"].passed
    assert rows["openvino", "fp32"].slowest <= rows["openvino", "fp32"].mpx_per_s <= rows["openvino", "fp32"].fastest
    assert result.shape == (2, 3, 256, 256)


def test_a_backend_that_breaks_is_listed_and_the_others_go_on(asking, tiny_bundle, monkeypatch, tmp_path):
    honest = racing.make_backend

    def breaks(bundle, name, precision, *rest):
        if (name, precision) == ("openvino", "fp32"):
            raise RuntimeError("illegal instruction")
        return honest(bundle, name, precision, *rest)

    monkeypatch.setattr(racing, "make_backend", breaks)
    result = race(asking(precision="fp32"), tiny_bundle, Artefacts(tmp_path))
    rows = {one.backend: one for one in result.candidates}
    assert "illegal instruction" in rows["openvino"].missing
    assert rows["torch"].passed


def test_the_result_is_kept_and_raced_again_only_on_request(asking, tiny_bundle, tmp_path, monkeypatch):
    artefacts, runs = Artefacts(tmp_path), []
    content = json.dumps(race_result(REFERENCE, FAST).to_json())
    monkeypatch.setattr(racing, "_race_elsewhere", lambda *asked: (asked[-1] / "race_result.json").write_text(content))
    request = asking(backend="openvino", precision="fp32")
    first = load_or_race(request, tiny_bundle, artefacts, lambda: runs.append(1))
    assert load_or_race(request, tiny_bundle, artefacts, lambda: runs.append(2)) == first
    assert runs == [1]
    load_or_race(request, tiny_bundle, artefacts, lambda: runs.append(3), again=True)
    assert runs == [1, 3]


def test_int8_is_raced_where_it_is_asked_for_or_everything_is(asking, tiny_bundle, monkeypatch, tmp_path):
    monkeypatch.setattr(
        racing, "why_not", lambda *name: "" if name == racing.REFERENCES["safetensors"] else "not today"
    )
    for precision, complete, listed in [("auto", False, False), ("auto", True, True), ("int8", False, True)]:
        result = race(asking(precision=precision, complete=complete), tiny_bundle, Artefacts(tmp_path))
        assert (("openvino", "int8") in {(one.backend, one.precision) for one in result.candidates}) == listed


@pytest.mark.parametrize(
    ("asked", "gpus", "large"),
    [
        ({}, [], False),
        ({}, ["H100"], True),
        ({"device": "cpu"}, ["H100"], False),
        ({"backend": "openvino"}, ["H100"], False),
        ({"device": "cuda"}, [], True),  # a driver that does not say what it has
    ],
)
def test_tiles_of_the_race_are_those_of_large_slides_where_a_gpu_may_win(monkeypatch, asked, gpus, large):
    monkeypatch.setattr(racing, "gpus", lambda: gpus)
    monkeypatch.setattr(racing, "visible_gpus", lambda: gpus)
    card = load_model("nuclei").card
    slide = fit_squares((8192, 8192), TILE, card.margin, card.total_stride)
    assert request_of(Settings(**asked), card).tile == (slide.tile if large else (1024, 1024))


def test_a_run_takes_the_result_of_a_complete_race(asking, tiny_bundle, tmp_path, monkeypatch):
    content = json.dumps(race_result(REFERENCE, FAST, INT8).to_json())
    monkeypatch.setattr(racing, "_race_elsewhere", lambda *asked: (asked[-1] / "race_result.json").write_text(content))
    runs = []
    load_or_race(asking(complete=True), tiny_bundle, Artefacts(tmp_path), lambda: runs.append(1))
    load_or_race(asking(), tiny_bundle, Artefacts(tmp_path), lambda: runs.append(2))
    assert runs == [1]
    for complete in (False, True):  # with a precision there is nothing to leave out
        request = asking(precision="int8", complete=complete)
        load_or_race(request, tiny_bundle, Artefacts(tmp_path), lambda: runs.append(3))
    assert runs == [1, 3]
    load_or_race(asking(), tiny_bundle, Artefacts(tmp_path), lambda: runs.append(4), again=True)
    assert runs == [1, 3, 4]


def test_one_changed_weight_needs_another_race(asking, tiny_bundle):
    weights = {name: array.copy() for name, array in tiny_bundle.weights.items()}
    weights["head.bias"][0] += 1
    request = asking()
    keys = [racing._key(request, one) for one in (tiny_bundle, replace(tiny_bundle, weights=weights))]
    assert keys[0] != keys[1]


def test_a_race_that_dies_says_so(asking, tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(racing.sys, "executable", "/bin/false")
    with pytest.raises(BackendError, match="exit 1"):
        load_or_race(asking(), tiny_bundle, Artefacts(tmp_path), lambda: None)


def test_a_run_after_the_race_does_not_load_torch(tiny_bundle, tmp_path):
    save_bundle(
        replace(tiny_bundle, card=replace(tiny_bundle.card, name="downscaling", downscale={"2": 15.0})),
        tmp_path / "model",
    )
    settings = Settings(model=str(tmp_path / "model"), backend="openvino", precision="fp32", threads=1)
    ModelPool(load_model(settings.model), settings)
    code = f"""
from dataclasses import replace
import sys
from cellseg_batch.engine.inference.model_pool import ModelPool
from cellseg_batch.engine.models import load_model
from cellseg_batch.engine.settings import Settings
settings = Settings(model={settings.model!r}, backend="openvino", precision="fp32", threads=1)
for instances in (False, True):
    model_pool = ModelPool(load_model(settings.model), replace(settings, instances=instances))
    for factor in (1, 2):
        with model_pool.session(model_pool.downscaled(model_pool.chosen, factor), (1, 3, 64, 64), "uint8") as session:
            assert session.logits().shape[1] == (3 if instances else 1)
print("torch" in sys.modules)
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=os.environ).strip() == "False"


def test_the_compile_command(tiny_model, tmp_path, command):
    arguments = ["compile", "--model", tiny_model, "--backend", "openvino", "--precision", "fp32", "--threads", 1]
    code, output = command(*arguments, "--tile", 256, "--json", tmp_path / "race.json")
    assert code == 0, output
    assert "winner" in output
    content = json.loads((tmp_path / "race.json").read_text())
    assert [row["winner"] for row in content["candidates"]] == [True]
    code, output = command("compile", "--list")
    assert code == 0
    assert "race" in output
    assert "sound" in output
    assert "['" not in output
    code, output = command("compile", "--model", tiny_model, "--backend", "tensorrt")
    assert code == 2
