"""Files that a run takes its flags from, writes them to, and logs to."""

import json
from datetime import datetime

import pytest

from tests.support.images import blobs, write_ome_zarr

FLAGS = [
    "--backend",
    "torch",
    "--precision",
    "fp32",
    "--tile",
    "256",
    "--block",
    "64",
    "--margin",
    "exact",
    "--no-gate",
]


def manifest(store):
    return json.loads((store.with_name(store.name + ".cellseg") / "labels/cellseg/manifest.json").read_text())


def test_flags_of_a_file_give_the_run_that_typed_ones_give(tmp_path, command, tiny_model):
    typed, read = (write_ome_zarr(tmp_path / name / "a.zarr", blobs(200, 200)) for name in ("typed", "read"))
    config = tmp_path / "run.toml"
    more = ["--max-memory", "2GB", "--channel", "1", "--write-config", config]
    assert command("run", typed, "--model", tiny_model, *FLAGS, *more)[0] == 0
    assert 'margin = "exact"\n' in config.read_text()
    assert "gate = false\n" in config.read_text()
    assert command("run", read, "--config", config)[0] == 0
    assert manifest(typed)["decisions"] == manifest(read)["decisions"]
    again = tmp_path / "again.toml"
    assert command("run", read, "--config", config, "--write-config", again, "--overwrite", "--channel", "2")[0] == 0
    assert manifest(typed)["decisions"] != manifest(read)["decisions"], "what is typed wins"
    changed = set(again.read_text().splitlines()) ^ set(config.read_text().splitlines())
    assert changed == {'channel = "1"', 'channel = "2"', "overwrite = false", "overwrite = true"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('max-memry = "2GB"', "max-memry, which is none"),
        ("gate = 1", "gate: expected true or false, found 1"),
        ("tile = true", "tile: expected a text or a number, found True"),
        ('wells = ["A1"]', "wells: expected a text or a number, found ['A1']"),
        ("tile", "expected a TOML file"),
        ('config = "run.toml"', "config, which is none"),
        ("tile = 0", "--tile: expected 1 or more"),
        ('max-memory = "much"', "a size such as 4GB"),
    ],
)
def test_a_file_that_gives_no_flags_is_refused(tmp_path, command, text, words):
    (tmp_path / "run.toml").write_text(text)
    code, output = command("run", tmp_path, "--config", tmp_path / "run.toml")
    assert code == 2
    assert words in output.replace("│ ", "")


def test_a_log_tells_of_every_block_and_slide(tmp_path, command, tiny_model):
    good, bad = (write_ome_zarr(tmp_path / "in" / name, blobs(200, 200, 1), levels=1) for name in ("a.zarr", "b.zarr"))
    chunk = bad / "0" / "c" / "0" / "2" / "2"
    chunk.write_bytes(chunk.read_bytes()[:20])
    log = tmp_path / "run.log"
    for code in (1, 1):
        assert command("run", tmp_path / "in", "--model", tiny_model, *FLAGS, "--log", log)[0] == code
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    assert all(datetime.fromisoformat(line["time"]).tzinfo for line in lines)

    def of(slide, event):
        return [line for line in lines if line.get("slide") == str(slide) and line["event"] == event]

    blocks = of(good, "started")[0]["blocks"]
    assert sorted(line["block"] for line in of(good, "block") if line["pass"] == "blocks") == list(range(blocks))
    assert len(of(good, "done")) == len(of(good, "skipped")) == 1
    assert (len(of(bad, "block failed")) > 1, len(of(bad, "failed"))) == (True, 2)
    assert "readable pixels" in of(bad, "block failed")[0]["reason"]
    assert "readable pixels" in of(bad, "failed")[1]["reason"]


def test_a_log_that_cannot_be_written_costs_no_pixel(tmp_path, command, tiny_model):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(100, 100))
    code, output = command("run", path, "--model", tiny_model, *FLAGS, "--log", "/dev/full")
    assert (code, "1 done" in output, "/dev/full: expected a whole log" in output) == (1, True, True)
    assert command("run", path, "--model", tiny_model, *FLAGS, "--log", tmp_path / "no" / "log")[0] == 1
