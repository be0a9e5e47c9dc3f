"""The flags of the command line, each written once; every command that shares a flag shares it from here.

Knows neither commands nor what they do; `cellseg_batch.engine.cli.flags` hands these to commands.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cellseg_batch.engine.errors import UsageError
from cellseg_batch.engine.settings import BACKENDS, PRECISIONS, SKIPS, STITCHES
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


def place(text: str) -> Path:
    """What a path or a URL names."""
    try:
        return locate(text)
    except UsageError as error:
        raise typer.BadParameter(str(error)) from None


def sides(text: str | None) -> tuple[int, int, int, int] | None:
    """What ``--box`` names."""
    try:
        y0, x0, y1, x1 = map(int, (text or "0,0,0,0").split(","))
    except ValueError:
        raise typer.BadParameter(f"expected four numbers of px, Y0,X0,Y1,X1, found {text!r}") from None
    return None if text is None else (y0, x0, y1, x1)


def _names(text: str) -> tuple[str, ...]:
    """The names in a list that commas separate."""
    return tuple(name for name in text.replace(" ", "").split(",") if name)


Slides = Annotated[
    list[Path],
    typer.Argument(parser=place, metavar="SLIDES", help="OME-Zarr, zarr, TIFF, SVS, PNG or JPEG, or folders of them."),
]
Slide = Annotated[
    Path,
    typer.Argument(parser=place, metavar="SLIDE", help="One image, or a path that holds images (the first is taken)."),
]
RunOf = Annotated[
    list[Path],
    typer.Argument(parser=place, metavar="SLIDES", help="The inputs of a run, or its output folder."),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        parser=place,
        metavar="FOLDER",
        help="Mirror the inputs here; default: in or beside them.",
        rich_help_panel=_OUTPUT,
    ),
]
Name = Annotated[str, typer.Option("--name", help="Name of the label group.", rich_help_panel=_OUTPUT)]
Model = Annotated[
    str, typer.Option("--model", help="A shipped model's name, or a bundle's folder.", rich_help_panel=_MODEL)
]
BackendName = Annotated[str, typer.Option("--backend", help="|".join(BACKENDS), rich_help_panel=_MODEL)]
Device = Annotated[
    str, typer.Option("--device", help="auto|cpu|cuda|cuda:0,1 (one engine per GPU).", rich_help_panel=_MODEL)
]
Precision = Annotated[str, typer.Option("--precision", help="|".join(PRECISIONS), rich_help_panel=_MODEL)]
Gate = Annotated[
    bool,
    typer.Option("--gate/--no-gate", help="Refuse a backend that disagrees with torch fp32.", rich_help_panel=_MODEL),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        "--threshold", help="Probability of a foreground pixel; default: the model's.", rich_help_panel=_MODEL
    ),
]
Threads = Annotated[
    int | None, typer.Option("--threads", help="Threads of the model; default: every core.", rich_help_panel=_MODEL)
]
TileSide = Annotated[
    int, typer.Option("--tile", help="Side in px of a square as large as a tile may be.", rich_help_panel=_SHAPE)
]
Stitch = Annotated[
    str,
    typer.Option(
        "--stitch", help="|".join(STITCHES) + ": cut tiles at their cores, or fade them.", rich_help_panel=_SHAPE
    ),
]
Margin = Annotated[
    str | None,
    typer.Option(
        "--margin",
        parser=_margin,
        metavar="N|exact",
        help="Context cut from each side of a tile, in px; default: the model's.",
        rich_help_panel=_SHAPE,
    ),
]
BatchSize = Annotated[int, typer.Option("--batch", help="Tiles per call of the model.", rich_help_panel=_SHAPE)]
BlockSide = Annotated[int, typer.Option("--block", help="Side in px of what one task writes.", rich_help_panel=_SHAPE)]
Workers = Annotated[int, typer.Option("--workers", help="Blocks in flight, or processes.", rich_help_panel=_SHAPE)]
Scheduler = Annotated[
    str,
    typer.Option(
        "--scheduler",
        metavar="threads|processes|slurm|ADDRESS",
        help="Where blocks are computed: here, or by a dask cluster.",
        rich_help_panel=_CLUSTER,
    ),
]
Queue = Annotated[str | None, typer.Option("--queue", help="SLURM partition.", rich_help_panel=_CLUSTER)]
Account = Annotated[str | None, typer.Option("--account", help="SLURM account.", rich_help_panel=_CLUSTER)]
Walltime = Annotated[
    str | None, typer.Option("--walltime", help="Of each job, such as 04:00:00.", rich_help_panel=_CLUSTER)
]
Gres = Annotated[
    str | None, typer.Option("--gres", help="Resources of each job, such as gpu:1.", rich_help_panel=_CLUSTER)
]
Cores = Annotated[int | None, typer.Option("--cores", help="Cores of each job.", rich_help_panel=_CLUSTER)]
JobMemory = Annotated[
    str | None, typer.Option("--memory", help="Memory of each job, such as 16GB.", rich_help_panel=_CLUSTER)
]
ClusterConfig = Annotated[
    Path | None,
    typer.Option("--cluster-config", metavar="FILE", help="A file of dask-jobqueue.", rich_help_panel=_CLUSTER),
]
MaxMemory = Annotated[
    int | None,
    typer.Option(
        "--max-memory",
        parser=_bytes,
        metavar="SIZE",
        help="Stay under this much host memory, e.g. 2GB.",
        rich_help_panel=_SHAPE,
    ),
]
LevelIndex = Annotated[
    int | None,
    typer.Option("--level", help="Resolution, 0 is full; default: nearest the model's.", rich_help_panel=_SLIDE),
]
PixelSize = Annotated[
    float | None,
    typer.Option("--pixel-size", help="µm per px of level 0, over the metadata's.", rich_help_panel=_SLIDE),
]
Downscale = Annotated[
    int | None,
    typer.Option(
        "--downscale", help="Downscale images by this for the model; default: by what it finds.", rich_help_panel=_SLIDE
    ),
]
SkipBackground = Annotated[
    str,
    typer.Option(
        "--skip-background",
        help="|".join(SKIPS) + ": leave out what shows nothing, or compute every tile.",
        rich_help_panel=_SLIDE,
    ),
]
Channel = Annotated[
    str | None,
    typer.Option(
        "--channel", help="Index or name; default: RGB, else DAPI/Hoechst/DNA, else 0.", rich_help_panel=_SLIDE
    ),
]
Axes = Annotated[
    str | None,
    typer.Option("--axes", help="Axes of arrays that do not name theirs, e.g. czyx.", rich_help_panel=_SLIDE),
]
Objects = Annotated[
    bool,
    typer.Option("--objects", help="Measure every object into a table; implies --instances.", rich_help_panel=_OUTPUT),
]
Wells = Annotated[
    str | None,
    typer.Option(
        "--wells", parser=_names, metavar="A01,B*", help="Only these wells of plates.", rich_help_panel=_SLIDE
    ),
]
Fields = Annotated[
    str | None,
    typer.Option(
        "--fields", parser=_names, metavar="0,1", help="Only these fields of each well.", rich_help_panel=_SLIDE
    ),
]
BoxSides = Annotated[
    str | None,
    typer.Option("--box", metavar="Y0,X0,Y1,X1", help="What to show, in px of the labels; default: everything."),
]
Instances = Annotated[
    bool,
    typer.Option("--instances", help="Tell objects apart: each gets an id of its own.", rich_help_panel=_OUTPUT),
]
Probability = Annotated[
    bool, typer.Option("--probability", help="Also write the probability as an image.", rich_help_panel=_OUTPUT)
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace labels of that name.", rich_help_panel=_OUTPUT)]
RetryFailed = Annotated[
    bool, typer.Option("--retry-failed", help="Take up only the images that failed before.", rich_help_panel=_OUTPUT)
]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON.", rich_help_panel=_SCREEN)
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=_SCREEN)]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more.", rich_help_panel=_SCREEN)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say only what failed.", rich_help_panel=_SCREEN)]
