"""Read the flags of a command from a TOML file, and write those in force as one.

A key is a flag without its dashes, a value what would be typed after it; of a flag without a value it is true or false.
What is typed on the command line wins over the file.
"""

from __future__ import annotations

import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import tomli_w
import typer
from typer.core import TyperOption

from cellseg_batch.engine.cli.console import plain_errors
from cellseg_batch.engine.errors import UsageError, writing_to
from cellseg_batch.engine.settings import Settings

_OWN = ("config_file", "write_config", "help")


def _read(context: typer.Context, file: Path | None) -> Path | None:
    with plain_errors(debug=False):
        if file is not None:
            context.default_map = read_config(file, _flags_of(context))
    return file


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        is_eager=True,
        callback=_read,
        help="Read flags from this TOML file, such as max-memory = '2GB'.",
        rich_help_panel="Screen",
    ),
]
WriteConfig = Annotated[
    Path | None,
    typer.Option(
        "--write-config", metavar="FILE", help="Write the flags in force as such a file.", rich_help_panel="Screen"
    ),
]


def read_config(file: Path, flags: dict[str, TyperOption]) -> dict[str, Any]:
    """The values of a file as click takes them for defaults: parameter -> what would be typed, or a truth value.

    Args:
        file: a TOML file.
        flags: flag without dashes -> its option.

    Raises:
        UsageError: the file cannot be read, or has a key that is no flag or a value that no flag takes.
    """
    try:
        content = tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(
            f"--config {file}", expected="a TOML file", found=str(error), remedy="write one with --write-config"
        ) from error
    values: dict[str, Any] = {}
    for key, value in content.items():
        if key not in flags:
            raise UsageError(
                f"--config {file}",
                expected="flags without their dashes, such as max-memory",
                found=f"{key}, which is none",
                remedy="see cellseg-batch run --help",
            )
        if isinstance(value, bool) != flags[key].is_flag or not isinstance(value, bool | int | float | str):
            raise UsageError(
                f"--config {file}: {key}",
                expected="true or false" if flags[key].is_flag else "a text or a number",
                found=repr(value),
                remedy="write what would be typed after the flag, and true for a flag that takes nothing",
            )
        values[flags[key].name or ""] = value if flags[key].is_flag else str(value)
    return values


def write_flags(file: Path | None, context: typer.Context, settings: Settings) -> None:
    """Write the flags in force, as `read_config` reads them; those without a value are left out.

    Raises:
        OutputError: the file cannot be written.
    """
    if file is None:
        return
    defaults = {field.name: getattr(settings, field.name) for field in fields(settings)}
    values: dict[str, bool | int | float | str] = {}
    for flag, option in _flags_of(context).items():
        name = option.name or ""
        value = defaults.get(name) if context.params[name] is None else context.params[name]
        if isinstance(value, tuple):
            value = ",".join(value)
        if value not in (None, ""):
            values[flag] = value if isinstance(value, bool | int | float) else str(value)
    with writing_to(file, "a file of flags"):
        file.write_text(tomli_w.dumps(values))


def _flags_of(context: typer.Context) -> dict[str, TyperOption]:
    """Flag without dashes -> its option, of every flag that a file may give."""
    options = [
        option for option in context.command.params if isinstance(option, TyperOption) and option.name not in _OWN
    ]
    return {max(option.opts, key=len).removeprefix("--"): option for option in options}
