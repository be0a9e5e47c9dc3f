"""``cellseg-batch train``: train a model, with a flag for each field of a recipe."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from cellseg_batch.engine.cli.console import plain_errors
from cellseg_batch.engine.cli.flags import Debug, Threads, parameter_of, with_parameters
from cellseg_batch.engine.errors import ComputeError, UsageError, trainer_errors

if TYPE_CHECKING:
    from cellseg_batch.trainer.recipe import Recipe


def train(
    data: Annotated[
        Path, typer.Argument(help="Annotated images: images/ with labels/, masks/ or COCO, or DSB folders.")
    ],
    changes: dict[str, Any],
    out: Annotated[Path, typer.Option("--out", help="Folder of the bundle, its log and its pictures.")],
    preset: Annotated[str, typer.Option("--preset", help="A recipe's name or file; flags below change it.")] = "nuclei",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    fine_tune: Annotated[str | None, typer.Option("--fine-tune", help="Start from this model's weights.")] = None,
    max_steps: Annotated[int | None, typer.Option("--max-steps", min=1, help="A shorter run.")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Train a model on DATA by a preset recipe; --out becomes the bundle of its best weights."""
    import torch

    from cellseg_batch.engine.cli.training_progress import TrainingProgress
    from cellseg_batch.engine.models import load_model
    from cellseg_batch.trainer.train import train as train_network

    console = Console()
    with plain_errors(debug, "--resume goes on from the last score, if there is one"):
        recipe = _read_recipe(preset, changes)
        start = load_model(fine_tune) if fine_tune is not None else None
        if threads is not None:
            torch.set_num_threads(threads)
        with _as_cellseg_errors(data, out), TrainingProgress(console) as progress:
            train_network(
                data, out, recipe, progress, fine_tune=start, resume=resume, max_steps=max_steps, device=device
            )
        console.print(f"{out}: now cellseg-batch run SLIDES --model {out}", highlight=False, soft_wrap=True)


def with_recipe_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command a flag for each field of a recipe; it gets their values as its parameter ``changes``."""
    from cellseg_batch.trainer.recipe import Rule, rules, types

    def flag(name: str, rule: Rule) -> inspect.Parameter:
        long_name = "--" + name.replace("_", "-")
        text = f"{rule.text.removesuffix('.')}: {rule.expected}." if rule.choices else rule.text
        names = f"{long_name}/--{rule.opposite}" if rule.opposite else long_name
        option = typer.Option(names, help=text, rich_help_panel=rule.group, show_default=False)
        return parameter_of(name, Annotated[types()[name] | None, option], None)

    @functools.wraps(command)
    def filled(**given: Any) -> None:
        changes = {name: value for name in rules() if (value := given.pop(name)) is not None}
        command(**given, changes=changes)

    own = [parameter for parameter in _parameters(command) if parameter.name != "changes"]
    return with_parameters(filled, [*own, *(flag(name, rule) for name, rule in rules().items())])


def _parameters(command: Callable[..., None]) -> list[inspect.Parameter]:
    parameters = inspect.signature(command, eval_str=True).parameters.values()
    return [parameter_of(parameter.name, parameter.annotation, parameter.default) for parameter in parameters]


def _read_recipe(preset: str, changes: dict[str, Any]) -> Recipe:
    """Read the recipe of a preset and change some of its fields.

    Raises:
        UsageError: there is no such preset, or a field has an impossible value.
    """
    from cellseg_batch.trainer.recipe import RecipeError, load_preset

    try:
        return load_preset(preset, **changes)
    except RecipeError as error:
        raise _field_error(error) from error
    except ValueError as error:
        raise UsageError(
            f"--preset {preset}",
            expected="a recipe whose fields all have possible values",
            found=str(error),
            remedy="see cellseg-batch train --help",
        ) from error


def _field_error(error: Any) -> UsageError:
    """Turn the error of a recipe's field into a `UsageError`."""
    remedy = "see cellseg-batch train --help"
    return UsageError(f"`{error.field}`", expected=error.expected, found=repr(error.found), remedy=remedy)


@contextmanager
def _as_cellseg_errors(data: Path, out: Path) -> Iterator[None]:
    """Turn the errors of the trainer, including a loss that is not finite, into `CellsegError`."""
    from cellseg_batch.trainer.recipe import RecipeError

    with trainer_errors(f"train {data}"):
        try:
            yield
        except RecipeError as error:
            raise _field_error(error) from error
        except FloatingPointError as error:
            raise ComputeError(
                f"train {data}",
                expected="a finite loss",
                found=str(error),
                cause="too high a learning rate, or damaged images",
                remedy=f"lower `learning_rate`; the best weights so far are in {out}",
            ) from error
