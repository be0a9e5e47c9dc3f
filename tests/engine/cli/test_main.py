"""What the command line says of itself: its version, its help, its completion."""

from importlib.metadata import version

import pytest
from typer.main import get_command

from cellseg_batch.engine.cli.main import app


def test_version(command):
    assert command("--version") == (0, f"cellseg-batch {version('cellseg-batch')}")


@pytest.mark.parametrize("name", [[], *([name] for name in get_command(app).commands), ["bench", "compare"]])
def test_help_is_whole_at_80_columns(monkeypatch, command, name):
    monkeypatch.setenv("COLUMNS", "80")
    code, output = command(*name, "--help")
    assert code == 0
    assert "…" not in output, "nothing is cut off"


def test_completion_can_be_shown(monkeypatch, command):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    code, output = command("--show-completion", "bash")
    assert code == 0, output
    assert "complete" in output


def test_train_has_the_flags_of_a_recipe_with_their_choices(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    output = command("train", "--help")[1]
    assert "--colour" in output
    assert "a sum of bce, dice, focal such as bce+dice" in output
