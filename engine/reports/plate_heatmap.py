"""Draw a plate's figures as colours, well by well: one panel per figure, one picture per plate.

A separate process draws the picture: matplotlib would stay in the memory of the run, beyond the announced peak.
"""

from __future__ import annotations

import json
import sys
from typing import IO, Any

import numpy as np

from cellseg_batch.engine.errors import OutputError
from cellseg_batch.engine.machine import run_module

# Column of the wells' table -> heading. A panel is left out if no well has its figure; px is left out if µm are known.
_PANELS = {
    "count": "objects",
    "median_area": "median area, px",
    "median_area_um2": "median area, µm²",
    "confluence": "confluence",
    "median_cell_area": "median area of cells, px",
    "median_cell_area_um2": "median area of cells, µm²",
    "cell_confluence": "confluence of cells",
    "border_fraction": "objects at the border, share",
    "focus": "focus",
    "saturation": "saturated pixels, share",
    "failed_fields": "failed fields",
}
# Beginning of columns of which there are several -> the panel that theirs follow, and their heading.
_FAMILIES = {
    "count_": ("count", "objects"),
    "mean_intensity_": ("median_area_um2", "mean intensity"),
    "confluence_": ("confluence", "confluence"),
}
_COLUMNS = 3


def heatmaps(title: str, wells: list[dict[str, Any]], rows: list[str], columns: list[str]) -> bytes:
    """Have another process draw the picture of `draw_heatmaps`; returns the PNG.

    Raises:
        OutputError: the process failed.
    """
    picture, failure = run_module(__name__, given=json.dumps([title, wells, rows, columns]).encode())
    if failure:
        raise OutputError(
            f"heat maps of {title}",
            expected="a process that draws them",
            found=failure,
            cause="too little memory",
            remedy="run again; the tables are there",
        )
    return picture


def draw_heatmaps(title: str, wells: list[dict[str, Any]], rows: list[str], columns: list[str], out: IO[bytes]) -> None:
    """Draw every figure of the wells, as PNG.

    Args:
        title: title of the picture.
        wells: rows of the wells' table.
        rows, columns: names of all rows and columns of the plate; missing rows and columns of wells are added.
        out: binary stream to write to.
    """
    from matplotlib.figure import Figure

    rows = list(dict.fromkeys([*rows, *(well["row"] for well in wells)]))
    columns = list(dict.fromkeys([*columns, *(well["column"] for well in wells)]))
    panels = _panels(wells)
    lines = -(-len(panels) // _COLUMNS)
    width = min(max(3.4, 0.34 * len(columns) + 1.2), 9)
    height = min(max(1.7, 0.34 * len(rows) + 1.0), 7)
    figure = Figure(figsize=(_COLUMNS * width, lines * height + 0.4), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(lines, _COLUMNS, squeeze=False).ravel()
    for axes, (name, heading) in zip(grid, panels.items(), strict=False):
        values = np.full((len(rows), len(columns)), np.nan)
        for well in wells:
            if _known(well, name):
                values[rows.index(well["row"]), columns.index(well["column"])] = well[name]
        axes.set_facecolor("0.88")
        low, high = np.nanmin(values), np.nanmax(values)
        # If all wells have the same value, the scale begins at 0, so that rounding does not show as a pattern.
        image = axes.imshow(values, cmap="viridis", vmin=low if low < high else 0, vmax=high or 1)
        figure.colorbar(image, ax=axes, shrink=0.9, format="%.5g").ax.tick_params(labelsize=7)
        for well in wells:
            if well["failed_fields"] == well["fields"]:
                centre = columns.index(well["column"]), rows.index(well["row"])
                axes.text(*centre, "×", color="crimson", ha="center", va="center", fontweight="bold")
        axes.set_title(heading, fontsize=10)
        axes.set_xticks(range(len(columns)), columns, fontsize=7, rotation=90 if len(columns) > 12 else 0)
        axes.set_yticks(range(len(rows)), rows, fontsize=7)
    for axes in grid[len(panels) :]:
        axes.axis("off")
    figure.supxlabel("grey: not in this run; ×: every field failed", fontsize=8, x=0.01, ha="left")
    figure.savefig(out, format="png", dpi=110)


def _panels(wells: list[dict[str, Any]]) -> dict[str, str]:
    """Column -> heading of each panel to draw, with those of classes and channels behind what they are parts of."""
    names = dict.fromkeys(name for well in wells for name in well)
    ordered = {}
    for panel, heading in _PANELS.items():
        ordered[panel] = heading
        for start, (before, title) in _FAMILIES.items():
            if before == panel:
                ordered |= {name: f"{title}, {name.removeprefix(start)}" for name in names if name.startswith(start)}
    known = {name for name in ordered if any(_known(well, name) for well in wells)}
    known -= {name.removesuffix("_um2") for name in known if name.endswith("_um2")}
    if not any(well["failed_fields"] for well in wells):
        known.remove("failed_fields")
    return {name: heading for name, heading in ordered.items() if name in known}


def _known(well: dict[str, Any], name: str) -> bool:
    return well.get(name) is not None


if __name__ == "__main__":
    title, wells, rows, columns = json.load(sys.stdin)
    draw_heatmaps(title, wells, rows, columns, sys.stdout.buffer)
