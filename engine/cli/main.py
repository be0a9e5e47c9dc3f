"""Assemble the command line from its commands, each in the module of its name.

A command turns its flags into one call of another folder and prints the result.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cellseg_batch.engine.cli.bench import bench
from cellseg_batch.engine.cli.check_model import check_model
from cellseg_batch.engine.cli.compile import compile_model
from cellseg_batch.engine.cli.console import note_flags, printing_never_fails
from cellseg_batch.engine.cli.convert import convert
from cellseg_batch.engine.cli.demo import demo
from cellseg_batch.engine.cli.doctor import doctor
from cellseg_batch.engine.cli.evaluate import evaluate
from cellseg_batch.engine.cli.export import export
from cellseg_batch.engine.cli.export_labels import export_labels
from cellseg_batch.engine.cli.export_objects import export_objects
from cellseg_batch.engine.cli.import_model import import_model
from cellseg_batch.engine.cli.info import info
from cellseg_batch.engine.cli.plan import plan
from cellseg_batch.engine.cli.preview import preview
from cellseg_batch.engine.cli.profile import profile
from cellseg_batch.engine.cli.report import report
from cellseg_batch.engine.cli.run import run
from cellseg_batch.engine.cli.status import status
from cellseg_batch.engine.cli.train import train, with_recipe_flags
from cellseg_batch.engine.cli.verify import verify
from cellseg_batch.engine.cli.verify_seams import verify_seams

_COMMANDS: dict[str, Callable[..., None]] = {
    "run": run,
    "demo": demo,
    "info": info,
    "doctor": doctor,
    "plan": plan,
    "status": status,
    "verify": verify,
    "report": report,
    "preview": preview,
    "convert": convert,
    "export-objects": export_objects,
    "export-labels": export_labels,
    "verify-seams": verify_seams,
    "compile": compile_model,
    "import-model": import_model,
    "check-model": check_model,
    "profile": profile,
    "train": train,
    "evaluate": evaluate,
    "export": export,
}


class _Commands(TyperGroup):
    """The group of all commands.  `train` gets its flags when it is called, as the fields of a recipe need torch."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if name == "train":
            train_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
            train_app.command(name)(note_flags(with_recipe_flags(train)))
            command = typer.main.get_command(train_app)
        return name, command, rest


app = typer.Typer(cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"cellseg-batch {version('cellseg-batch')}")
        raise typer.Exit


@app.callback()
def _common(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Segment cells and nuclei in huge microscopy slides."""


def _train_placeholder() -> None:
    """Stand in for `train` in the list of commands."""


for _name, _command in _COMMANDS.items():
    app.command(_name, help=inspect.getdoc(_command))(_train_placeholder if _command is train else note_flags(_command))
app.add_typer(bench, name="bench")


def main() -> None:
    """Run ``cellseg-batch`` with the arguments of the process."""
    with printing_never_fails():
        app(args=sys.argv[1:], prog_name="cellseg-batch")


if __name__ == "__main__":
    main()
