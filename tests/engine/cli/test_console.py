"""Texts of the engine speak of settings, the command line of flags; errors are one line unless --debug is given."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields

import pytest
from typer.main import get_command

from cellseg_batch.engine.cli.console import as_flags, note_flags, print_text, printing_never_fails, write_json
from cellseg_batch.engine.cli.main import app
from cellseg_batch.engine.cli.train import train, with_recipe_flags
from cellseg_batch.engine.errors import ModelError
from cellseg_batch.engine.settings import ClusterSettings, Settings
from cellseg_batch.trainer.recipe import Recipe
from tests.support.images import blobs, write_ome_zarr


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("a smaller `tile` or `max_memory=800MB`", "a smaller --tile or --max-memory 800MB"),
        ("`margin=exact`", "--margin exact"),
        ("`gate=False` or `gate`", "--no-gate or --gate"),
        ("`overwrite=True`", "--overwrite"),
        ("`output`, `kind=csv` and `config=slurm.yaml`", "--output, --format csv and --cluster-config slurm.yaml"),
        ("use --tile; `zarr` says `nothing=1`, `a b` and `", "use --tile; `zarr` says `nothing=1`, `a b` and `"),
    ],
)
def test_settings_in_backticks_become_flags(text, flags):
    assert as_flags(text) == flags


def test_every_setting_and_every_field_of_a_recipe_has_a_flag_that_its_command_takes():
    note_flags(with_recipe_flags(train))
    run = " ".join(option for param in get_command(app).commands["run"].params for option in param.opts).split()
    for field in (*fields(Settings), *fields(ClusterSettings)):
        if field.name != "cluster":
            assert as_flags(f"`{field.name}`") in run
    for field in fields(Recipe):
        assert as_flags(f"`{field.name}=0.1`") == f"--{field.name.replace('_', '-')} 0.1"


def test_reasons_in_json_speak_of_flags(tmp_path):
    write_json(tmp_path / "report.json", {"slides": [{"reason": 'use `tile=96`, not "`block`"'}]})
    assert json.loads((tmp_path / "report.json").read_text())["slides"][0]["reason"] == 'use --tile 96, not "--block"'


def test_a_report_that_cannot_be_written_is_named_and_fails_the_command(tmp_path, command):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(60, 60))
    code, output = command("info", path, "--json", "/dev/full")
    assert (code, "error /dev/full: expected a report that can be written" in output) == (1, True)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_a_terminal_cannot_show_is_printed_as_codes(capfd, monkeypatch, encoding):
    with open(1, "w", encoding=encoding, closefd=False) as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        with printing_never_fails():
            print_text("0.5 µm of 細胞 and \udce4.tif [/b]")
    said = capfd.readouterr().out
    assert r"of \u7d30\u80de and \udce4.tif [/b]" in said
    assert ("0.5 \\xb5m" in said) == (encoding == "ascii")


def test_a_full_disk_of_the_log_is_named_once_and_ends_nothing(capfd, monkeypatch):
    with open("/dev/full", "w") as stdout, open(2, "w", closefd=False) as stderr:
        monkeypatch.setattr("sys.stdout", stdout)
        monkeypatch.setattr("sys.stderr", stderr)
        with printing_never_fails():
            for _ in range(1000):
                print_text("a line of progress")
    assert capfd.readouterr().err.count("No space left") == 1


def test_closed_streams_end_nothing(tmp_path):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(60, 60))
    report = tmp_path / "r.json"
    command = shlex.join([sys.executable, "-m", "cellseg_batch.engine.cli", "info", str(path), "--json", str(report)])
    assert subprocess.run(["sh", "-c", f"{command} <&- >&- 2>&-"], check=False).returncode == 0
    assert json.loads(report.read_text())["images"]


def test_debug_shows_where_an_error_of_ours_comes_from(tmp_path, command):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(60, 60))
    code, output = command("run", path, "--model", "nothing")
    assert code == 2
    assert re.match(r"error --model nothing: expected a shipped model", output)
    with pytest.raises(ModelError, match="`model=nothing`"):
        command("run", path, "--model", "nothing", "--debug")


def test_file_names_do_not_steer_the_terminal(tmp_path, command, tiny_model):
    for name in ("a\x1b[31m.zarr", "a\x9b2J.zarr"):
        write_ome_zarr(tmp_path / "slides" / name, blobs(60, 60))
    (tmp_path / "slides" / "b\x1b]0;title\x07.tif").write_bytes(b"no image")
    run = ["run", "--model", tiny_model, "--backend", "torch", "--json", tmp_path / "report.json"]
    for arguments in (["info", "--model", tiny_model], ["status"], run):
        _, output = command(*arguments, tmp_path / "slides")
        assert not re.search("[\x07\x1b\x9b]", output)
        assert r"b\x1b]0;title\x07.tif" in output
    slides = json.loads((tmp_path / "report.json").read_text())["slides"]
    assert any("a\x1b[31m.zarr" in slide["path"] for slide in slides)
