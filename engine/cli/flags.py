"""Define the flags of the command line, each once, and give commands the flags that they name.

A command that takes `Settings` gets a flag for each field that it names; the field's default is in `Settings`.
This module knows no command.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from cellseg_batch.engine.cli.console import as_flags, plain_errors
from cellseg_batch.engine.errors import UsageError
from cellseg_batch.engine.settings import (
    BACKENDS,
    PRECISIONS,
    SCHEDULERS,
    SKIPS,
    STITCHES,
    TILE,
    ClusterSettings,
    Settings,
    check_name,
)
from cellseg_batch.engine.storage.paths import locate

_MODEL, _SHAPE, _SLIDE, _OUTPUT, _SCREEN = "Model", "Tiles and blocks", "Slide", "Output", "Screen"
_CLUSTER = "Cluster"


def _margin(text: str) -> int | str:
    if text == "exact":
        return text
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"expected a number of px or the word exact, found {text!r}") from None


def _bytes(text: str) -> int:
    from dask.utils import parse_bytes

    try:
        return int(parse_bytes(text))
    except ValueError:
        raise typer.BadParameter(f"expected a size such as 4GB or 800MiB, found {text!r}") from None


def to_path(text: str) -> Path:
    """Turn a path or a URL into a `Path`, local or remote."""
    try:
        return locate(text)
    except UsageError as error:
        raise typer.BadParameter(str(error)) from None


def _names(text: str) -> tuple[str, ...]:
    """Split a list of names at its commas."""
    return tuple(name for name in text.replace(" ", "").split(",") if name)


def _name(text: str) -> str:
    try:
        check_name(text)
    except UsageError as error:
        raise typer.BadParameter(as_flags(error.detail)) from None
    return text


# Arguments and flags that commands name one by one.
Slides = Annotated[
    list[Path],
    typer.Argument(
        parser=to_path,
        metavar="SLIDES",
        help="Images: stores, files, or folders of them; info --help lists the formats.",
    ),
]
Slide = Annotated[
    Path,
    typer.Argument(
        parser=to_path, metavar="SLIDE", help="One image, or a path that holds images (the first is taken)."
    ),
]
SlidesOrManifest = Annotated[
    list[Path] | None,
    typer.Argument(
        parser=to_path, metavar="SLIDES", help="Images: stores, files, or folders of them; or --manifest lists them."
    ),
]
RunInputs = Annotated[
    list[Path],
    typer.Argument(parser=to_path, metavar="SLIDES", help="The inputs of a run, or its output folder."),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        parser=to_path,
        metavar="FOLDER",
        help="The output folder of the run, which mirrors the inputs; default: in or beside them.",
        rich_help_panel=_OUTPUT,
    ),
]
Name = Annotated[
    str,
    typer.Option("--name", parser=_name, metavar="NAME", help="Name of the label group.", rich_help_panel=_OUTPUT),
]
Threads = Annotated[
    int | None, typer.Option("--threads", help="Threads of the model; default: every core.", rich_help_panel=_MODEL)
]
Workers = Annotated[int, typer.Option("--workers", help="Blocks in flight, or processes.", rich_help_panel=_SHAPE)]
Channel = Annotated[
    str | None,
    typer.Option(
        "--channel",
        help="Name or index, or nuclei=DAPI,membrane=1; default: RGB, else DAPI/Hoechst/DNA, else 0.",
        rich_help_panel=_SLIDE,
    ),
]
Axes = Annotated[
    str | None,
    typer.Option(
        "--axes", help="Axes of TIFFs and plain arrays that do not name theirs, e.g. czyx.", rich_help_panel=_SLIDE
    ),
]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON.", rich_help_panel=_SCREEN)
]
Log = Annotated[
    Path | None,
    typer.Option(
        "--log", metavar="FILE", help="Append what happens to this file, as lines of JSON.", rich_help_panel=_SCREEN
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=_SCREEN)]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more.", rich_help_panel=_SCREEN)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say only what failed.", rich_help_panel=_SCREEN)]


def _choice(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}."


def _flag(kind: Any, flag: str, panel: str, text: str, **more: Any) -> Any:
    return Annotated[kind, typer.Option(flag, help=text, rich_help_panel=panel, **more)]


_SETTINGS_FLAGS: dict[str, Any] = {
    "output": Output,
    "name": Name,
    "model": _flag(str, "--model", _MODEL, "A shipped model's name, or a bundle's folder."),
    "backend": _flag(str, "--backend", _MODEL, _choice(BACKENDS)),
    "precision": _flag(str, "--precision", _MODEL, _choice(PRECISIONS)),
    "device": _flag(str, "--device", _MODEL, "auto, cpu, cuda or cuda:0,1 (one model per GPU)."),
    "gate": _flag(bool, "--gate/--no-gate", _MODEL, "Refuse a backend that disagrees with the fp32 reference."),
    "threshold": _flag(float | None, "--threshold", _MODEL, "Probability of a foreground pixel; default: the model's."),
    "threads": Threads,
    "tile": _flag(
        int | None,
        "--tile",
        _SHAPE,
        f"Side in px of a square as large as a tile may be; default: {TILE}, or smaller where glass is left out.",
    ),
    "stitch": _flag(str, "--stitch", _SHAPE, f"{_choice(STITCHES)} Cut tiles at their cores, or fade them."),
    "margin": _flag(
        str | None,
        "--margin",
        _SHAPE,
        "Context cut from each side of a tile, in px; default: the model's.",
        parser=_margin,
        metavar="N|exact",
    ),
    "batch": _flag(int, "--batch", _SHAPE, "Tiles per call of the model."),
    "block": _flag(
        int | None, "--block", _SHAPE, "Side in px of what one task writes; default: 2048, or 4096 for a GPU."
    ),
    "workers": Workers,
    "scheduler": _flag(
        str,
        "--scheduler",
        _CLUSTER,
        f"Where blocks are computed: {', '.join(SCHEDULERS)} or the address of a dask scheduler.",
        metavar="WHERE",
    ),
    "max_memory": _flag(
        int | None,
        "--max-memory",
        _SHAPE,
        "Stay under this much host memory, e.g. 2GB.",
        parser=_bytes,
        metavar="SIZE",
    ),
    "level": _flag(int | None, "--level", _SLIDE, "Resolution, 0 is full; default: nearest the model's."),
    "pixel_size": _flag(float | None, "--pixel-size", _SLIDE, "µm per px of level 0, over the metadata's."),
    "downscale": _flag(
        int | None, "--downscale", _SLIDE, "Downscale images by this for the model; default: by what it finds."
    ),
    "skip_background": _flag(
        str, "--skip-background", _SLIDE, f"{_choice(SKIPS)} Leave out what shows nothing, or compute every tile."
    ),
    "channel": Channel,
    "axes": Axes,
    "wells": _flag(str | None, "--wells", _SLIDE, "Only these wells of plates.", parser=_names, metavar="A01,B*"),
    "fields": _flag(str | None, "--fields", _SLIDE, "Only these fields of each well.", parser=_names, metavar="0,1"),
    "mask": _flag(
        Path | None,
        "--mask",
        _SLIDE,
        "Only this region: GeoJSON as of QuPath, or a label image of any scale; or a folder of them.",
        parser=to_path,
        metavar="FILE",
    ),
    "mask_class": _flag(str | None, "--mask-class", _SLIDE, "Only outlines of this class in QuPath.", metavar="NAME"),
    "manifest": _flag(
        Path | None,
        "--manifest",
        _SLIDE,
        "Images from this CSV file: columns path, and any of pixel_size, channel, level, mask.",
        metavar="FILE",
    ),
    "shard": _flag(
        str | None, "--shard", _SLIDE, "Only this part of the images, e.g. 0/4 in the first of 4 jobs.", metavar="I/N"
    ),
    "instances": _flag(bool, "--instances", _OUTPUT, "Tell objects apart: each gets an id of its own."),
    "objects": _flag(bool, "--objects", _OUTPUT, "Measure every object into a table; implies --instances."),
    "expand": _flag(
        float | None,
        "--expand",
        _OUTPUT,
        "Expand nuclei into cells by this many µm, or px if the pixel size is unknown; implies --instances.",
        metavar="MICROMETRES",
    ),
    "probability": _flag(bool, "--probability", _OUTPUT, "Also write the probability as an image."),
    "tissue": _flag(bool, "--tissue", _OUTPUT, "Also write what is not taken for glass, as a label image."),
    "overwrite": _flag(bool, "--overwrite", _OUTPUT, "Replace labels of that name."),
    "retry_failed": _flag(bool, "--retry-failed", _OUTPUT, "Take up only the images that failed before."),
}
_CLUSTER_FLAGS: dict[str, Any] = {
    "queue": _flag(str | None, "--queue", _CLUSTER, "Queue, or SLURM's partition."),
    "account": _flag(str | None, "--account", _CLUSTER, "Who is charged; with LSF a project."),
    "walltime": _flag(str | None, "--walltime", _CLUSTER, "Time limit of each job, such as 04:00:00."),
    "gres": _flag(str | None, "--gres", _CLUSTER, "GPUs of each job: gpu:1 (SLURM), ngpus=1 (PBS), num=1 (LSF)."),
    "cores": _flag(int | None, "--cores", _CLUSTER, "Cores of each job."),
    "memory": _flag(str | None, "--memory", _CLUSTER, "Memory of each job, such as 16GB."),
    "config": _flag(Path | None, "--cluster-config", _CLUSTER, "A file of dask-jobqueue.", metavar="FILE"),
}

ENGINE = ("model", "backend", "precision", "device", "gate", "threads")
TILES = ("tile", "stitch", "margin", "batch", "block", "workers")
SLIDE = ("level", "pixel_size", "downscale", "skip_background", "channel", "axes")
EVERY = (*_SETTINGS_FLAGS, "cluster")

Command = Callable[..., None]


def takes_settings(*names: str) -> Callable[[Command], Command]:
    """Give a command the flags of some fields of `Settings`; it gets their values as its parameter ``settings``.

    The command also gets --debug, and a `CellsegError` ends it on one line.

    Args:
        names: names of the fields; ``cluster`` stands for all fields of `ClusterSettings`.
    """
    cluster = tuple(_CLUSTER_FLAGS) if "cluster" in names else ()
    plain = tuple(name for name in names if name != "cluster")
    flags = [
        # An empty default becomes None: the help shows no default, and `Settings` fills it in.
        *(parameter_of(name, _SETTINGS_FLAGS[name], getattr(Settings, name) or None) for name in plain),
        *(parameter_of(name, _CLUSTER_FLAGS[name], None) for name in cluster),
        parameter_of("debug", Debug, False),
    ]

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def filled(**given: Any) -> None:
            with plain_errors(given.pop("debug")):
                fields = {name: value for name in plain if (value := given.pop(name)) is not None}
                if cluster:
                    fields["cluster"] = ClusterSettings(**{name: given.pop(name) for name in cluster})
                command(**given, settings=Settings(**fields))

        own = [
            parameter_of(parameter.name, parameter.annotation, parameter.default)
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.name != "settings"
        ]
        arguments = [parameter for parameter in own if parameter.default is inspect.Parameter.empty]
        return with_parameters(filled, [*arguments, *flags, *own[len(arguments) :]])

    return decorate


def with_parameters(command: Command, parameters: list[inspect.Parameter]) -> Command:
    """Give a command that takes any keywords the signature that typer reads; returns the command."""
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def parameter_of(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    """Make a flag or an argument of a command, as typer reads it from a signature."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
