"""benchmarks/gpu.sh and what it runs, as far as they go without a GPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import zarr

from cellseg_batch.engine.inference.backends.cuda import Device
from cellseg_batch.engine.profiling.bench_slides import Form, shipped_pieces, write_slide
from tests.support.images import blobs, write_ome_zarr

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Import a module of the folder by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return lambda name: pytest.importorskip(name, reason="triton is not installed", exc_type=ModuleNotFoundError)


@pytest.fixture
def part(script, tmp_path):
    """A part of some lines of shell; ``$1`` is the file of rows."""
    make = script("gpu_parts").Part

    def call(name, lines, seconds=20, **needs):
        return make(name, seconds, ("sh", "-c", lines, "sh", str(tmp_path / "rows.jsonl")), needs)

    return call


ADD_A_ROW = """echo '{"part": "a", "mpx_per_s": 3}' >> $1; """


def test_parts_that_fail_cost_the_others_nothing(script, part, tmp_path):
    parts = script("gpu_parts")
    rows = parts.Rows(tmp_path)
    ends = tmp_path / "ends"
    run = parts.run_parts(
        [
            part("crash", ADD_A_ROW + "kill -SEGV $$"),
            part("hang", ADD_A_ROW + f"(sleep 0.4; touch {ends}) & sleep 60", seconds=0.2),
            part("wrong", "echo 2 kernels differ; exit 1"),
            part("tensorrt", "exit 1", nowhere_to_be_found="pip install it"),
            part("right", ADD_A_ROW + 'test "$WORDS" = given', seconds=20),
        ],
        rows,
        seconds=60,
        WORDS="given",
    )
    outcomes = list(run)
    assert [(outcome.status, outcome.reason) for outcome in outcomes] == [
        ("failed", "exit -11: no message"),
        ("failed", "stopped after 0 s"),
        ("failed", "exit 1: 2 kernels differ"),
        ("left out", "nowhere_to_be_found is not installed: pip install it"),
        ("passed", ""),
    ]
    written = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row.get("mpx_per_s", row.get("status")) for row in written] == [
        *(3, "failed", 3, "failed", "failed", "left out", 3, "passed")
    ]
    time.sleep(0.5)
    assert not ends.exists(), "a process of a stopped part went on"


def test_no_part_begins_or_ends_after_the_deadline(script, part, tmp_path):
    parts, start = script("gpu_parts"), time.monotonic()
    outcomes = list(parts.run_parts([part("a", "sleep 60"), part("b", ADD_A_ROW)], parts.Rows(tmp_path), seconds=0.3))
    assert time.monotonic() - start < 10
    assert [outcome.reason for outcome in outcomes] == ["stopped after 0 s", "no time was left"]
    assert outcomes[1].status == "failed"


def test_all_parts_together_take_less_than_eight_minutes(script):
    parts = script("bench_gpu").parts_for("cuda:0", Path("out"))
    assert sum(part.seconds for part in parts) <= 480 - 5  # what gpu.sh does before
    assert [part.name for part in parts][:2] == ["parity", "tests"], "what is wrong needs no figures"
    tests = [part for part in parts if "pytest" in part.command]
    assert all("filterwarnings=default" in part.command for part in tests), "warnings of other versions fail nothing"
    chosen = script("gpu_parts").choose(parts, ["monai", "parity"])
    assert [part.name for part in chosen] == ["parity", "monai"]
    with pytest.raises(ValueError, match=r"expected parts among parity, .*, found other"):
        script("gpu_parts").choose(parts, ["parity", "other"])


def test_the_exit_code_tells_of_failed_parts(script, part, tmp_path, monkeypatch, capsys):
    bench = script("bench_gpu")
    made = [part("good", "true"), part("absent", "true", nowhere_to_be_found="no"), part("bad", "false")]
    monkeypatch.setattr(bench, "parts_for", lambda device, out: made)
    for names, code in ((["good", "absent"], 0), ([], 1), (["none"], 2)):
        with pytest.raises(SystemExit) as ended:
            bench.main(["--out", str(tmp_path / "new"), *(["--only", *names] if names else [])])
        assert ended.value.code == code
    assert "gpu" in json.loads((tmp_path / "new" / "rows.jsonl").read_text().splitlines()[0])["conditions"]


def test_doctor_shows_how_each_part_ended_on_this_machine(script, part, tmp_path, monkeypatch, nvidia_driver, command):
    bench, file = script("bench_gpu"), tmp_path / "doctor.json"
    monkeypatch.setenv("CELLSEG_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")

    def doctor():
        assert command("doctor", "--json", file)[0] == 0
        diagnosis = json.loads(file.read_text())
        remedies = {state["backend"]: state["remedy"] for state in diagnosis["backends"]}
        return diagnosis["gpu_proof"], command("doctor")[1], "not yet run on hardware" in remedies["torch-cuda"]

    def run(*names):
        with pytest.raises(SystemExit):
            bench.main(["--out", str(tmp_path / "rows"), "--only", *names])

    ends = {"parity": "true", "tests": "exit 3"}
    monkeypatch.setattr(bench, "parts_for", lambda device, out: [part(name, line) for name, line in ends.items()])
    nvidia_driver("NVIDIA H200", "580.1.2")
    proof, printed, unproven = doctor()
    assert (proof, unproven) == (None, True)
    assert "not proven here" in printed
    run("parity", "tests")
    today = time.strftime("%Y-%m-%d", time.gmtime())
    proof, printed, unproven = doctor()
    assert (proof["gpu"], proof["driver"], unproven) == ("NVIDIA H200", "580.1.2", True)
    assert proof["versions"]["torch"] == torch.__version__
    assert [(one["name"], one["status"], one["date"]) for one in proof["parts"]] == [
        ("parity", "passed", today),
        ("tests", "failed", today),
    ]
    assert f"parity passed, {today}" in printed
    assert "benchmarks/gpu.sh" in printed
    ends["tests"] = "true"
    run("tests")
    proof, _, unproven = doctor()
    assert ([one["status"] for one in proof["parts"]], unproven) == (["passed", "passed"], False)
    nvidia_driver("NVIDIA H200", "590.1.2")
    assert doctor()[0] is None, "another driver proves nothing"
    nvidia_driver("NVIDIA H200", "580.1.2")
    assert doctor()[0] == proof
    (tmp_path / "cache" / "gpu_proof.json").write_text("{")
    assert doctor()[0] is None


@pytest.mark.parametrize("links", [True, False])
def test_a_slide_of_repeated_chunk_files(script, tmp_path, monkeypatch, links):
    def no_link(*paths):
        raise OSError("no hard links here")

    repeated_slide, pieces = script("repeated_slide"), shipped_pieces()
    if not links:
        monkeypatch.setattr(repeated_slide, "os", SimpleNamespace(link=no_link))
    path = repeated_slide.write_repeated_slide(tmp_path / "a.zarr", 1024, pieces, chunk=128, pattern=256)
    assert len(list((path / "0").rglob("c/*/*/*"))) == 3 * 8 * 8
    pattern = zarr.open_array(write_slide(tmp_path / "b.zarr", Form(256, chunk=128), pieces), path="0")[...]
    np.testing.assert_array_equal(zarr.open_array(path, path="0")[...], np.tile(pattern, (1, 4, 4)))


def test_a_slide_that_outlasts_the_fastest_gpus_takes_no_disk(script, tmp_path):
    path = script("repeated_slide").write_repeated_slide(
        tmp_path / "a.zarr", 32768, shipped_pieces(), chunk=1024, pattern=1024
    )
    slide = zarr.open_array(path, path="0")
    assert slide.shape == (3, 32768, 32768)
    np.testing.assert_array_equal(slide[:, :8, :8], slide[:, -1024:, -1024:][:, :8, :8])
    assert len({chunk.stat().st_ino for chunk in (path / "0").rglob("c/*/*/*")}) == 3


def test_monai_has_cudnn_settings_of_its_own(script, tmp_path, monkeypatch):
    seen = []

    def sliding_window(pixels, *arguments):
        seen.append((torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic))
        return pixels[:, :1]

    inferers = ModuleType("monai.inferers")
    inferers.sliding_window_inference = sliding_window
    monkeypatch.setitem(sys.modules, "monai", ModuleType("monai"))
    monkeypatch.setitem(sys.modules, "monai.inferers", inferers)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    bench = script("gpu_bench").Bench(Device("cpu"))
    (row,) = script("bench_gpu").measure_monai(bench, tmp_path)
    assert seen == [(True, False)] * 2
    assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic) == (False, True)
    assert row["mpx_per_s"] > 0


def test_a_file_of_rows_becomes_a_table(script):
    report = script("report")
    lines = [
        {"conditions": {"processor": "fast", "cores": 2, "load": 0.0, "commit": "c", "date": "2026-01-01"}},
        {"part": "slide", "name": "slide", "mpx_per_s": 1.0, "stages": {"model": 1.0}},
        {"part": "slide", "status": "passed"},
        {"part": "slide", "name": "slide", "mpx_per_s": 2.0, "stages": {"model": 1.0}},
    ]
    table = report._section("h200", report.gpu_results("\n".join(map(json.dumps, lines))))
    assert table.splitlines()[-3:] == ["| | Mpx/s |", "|---|---:|", "| slide | 2 |"]


@pytest.mark.slow
def test_every_part_of_the_benchmark_that_needs_no_gpu_runs(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    for name in ("parity", "networks", "kernels"):
        command = [sys.executable, "bench_gpu.py", "--measure", name, "--device", "cpu", "--out", tmp_path]
        subprocess.run(command, cwd=FOLDER, env=environment, check=True, capture_output=True)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    names = {row["name"] for row in rows}
    assert {"parity of gather_triton", "network nuclei, 1 x 64 px, torch-cuda", "blend_mask, 64 px"} <= names
    assert all(row["agrees"] for row in rows if row["part"] == "parity")
    assert all(row["mpx_per_s"] > 0 for row in rows if row["name"].startswith("network"))


@pytest.mark.slow
def test_whole_runs_are_measured(tmp_path):
    """On a GPU that takes no time, in this process alone: worker processes would look for a real one."""
    lines = """
import json, pathlib, sys
import bench_gpu, bench_host
bench_host.install_null_gpu()
folder = pathlib.Path(sys.argv[1])
plate = next(bench_gpu.measure_plate("cuda:0", folder, 2))
print(json.dumps([*bench_gpu.measure_slide("cuda:0", folder, 512, 256), plate]))
"""
    command = [sys.executable, "-c", lines, tmp_path]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *slides, plate = json.loads(done.stdout.splitlines()[-1])
    assert {row["name"].partition(",")[0] for row in slides} == {"slide of 512 px"}
    assert plate["name"].startswith("plate of 2 fields")
    assert all(row["mpx_per_s"] > 0 and 0 <= row["gpu_busy"] <= 1 for row in (*slides, plate))


def test_the_script_takes_the_first_interpreter_that_has_torch(tmp_path):
    for name, lacks_torch in (("python3", 1), ("python", 0)):
        stub = f'#!/bin/sh\ntest "$1" = -c && exit {lacks_torch}\necho {name} looks for a GPU\nexit 1\n'
        (tmp_path / name).write_text(stub)
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYTHON", None)
    done = subprocess.run(["bash", FOLDER / "gpu.sh"], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "python looks for a GPU\n")


@pytest.mark.slow
def test_without_a_gpu_the_script_says_so():
    hidden = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(["bash", FOLDER / "gpu.sh"], env=hidden, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "expected a GPU that torch can use" in done.stderr


@pytest.mark.slow
def test_the_hosts_ceiling_is_measured_without_a_gpu(tmp_path):
    image = write_ome_zarr(tmp_path / "a.zarr", blobs(700, 600))
    command = [sys.executable, "bench_host.py", "--workers", "1", "--measure", image, tmp_path / "out"]
    done = subprocess.run(command, cwd=FOLDER, check=True, capture_output=True, text=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["mpx"] == 0.42
    assert min(figures["seconds"], figures["processor"]) > 0
