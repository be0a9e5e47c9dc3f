"""``cellseg-batch preview``: draw a picture of an image and its labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cellseg_batch.engine.cli.console import check_json, plain_errors, print_text
from cellseg_batch.engine.cli.flags import Axes, Channel, Debug, Name, Output, Slide
from cellseg_batch.engine.settings import Settings


def preview(
    slide: Slide,
    out: Annotated[Path, typer.Option("--out", help="The PNG to write.")],
    box: Annotated[
        str | None,
        typer.Option("--box", metavar="Y0,X0,Y1,X1", help="What to show, in px of the labels; default: everything."),
    ] = None,
    name: Name = Settings.name,
    output: Output = None,
    channel: Channel = None,
    axes: Axes = None,
    debug: Debug = False,
) -> None:
    """Write a picture of SLIDE, as it is stored, with the outlines of its labels and of its region.

    Objects too small for outlines are tinted, and a part at full resolution is shown beside the overview. Classes are
    tinted in their colours.
    """
    from cellseg_batch.engine.reports.preview import write_preview

    with plain_errors(debug):
        check_json(out, "--out")
        picture = write_preview(slide, out, _sides(box), name, output, channel, axes)
        height, width = picture.overview.shape[:2]
        others = f" (the first of {picture.images} images)" if picture.images > 1 else ""
        print_text(
            f"{out}: {picture.path}{others}, {width} x {height} px, {picture.zoom:.3g} px for each px of the labels"
        )
        if picture.note:
            print_text(f"without the outline of its region: {picture.note}")
        if picture.detail_box is not None:
            part = picture.detail_box
            box_text = f"{part.y0},{part.x0},{part.y1},{part.x1}"
            print_text(f"right of it at full resolution, where most objects are: {box_text}")


def _sides(text: str | None) -> tuple[int, int, int, int] | None:
    """Read y0, x0, y1, x1 in px from the text of ``--box``."""
    try:
        y0, x0, y1, x1 = map(int, (text or "0,0,0,0").split(","))
    except ValueError:
        raise typer.BadParameter(f"expected four numbers of px, Y0,X0,Y1,X1, found {text!r}") from None
    return None if text is None else (y0, x0, y1, x1)
