"""Write one self-contained HTML page about a run that goes on or has ended: figures, charts, failures, pictures.

The page fetches nothing, so it opens offline and can be mailed.  Figures come from the journals; pictures come from the
images and their labels, if these can be read.
"""

from __future__ import annotations

import base64
import io
import math
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

from cellseg_batch.engine.errors import CellsegError, OutputError, writing_to
from cellseg_batch.engine.reports.preview import write_preview
from cellseg_batch.engine.reports.status import SlideStatus, Status, read_status
from cellseg_batch.engine.reports.svg_charts import bars, plate_chart, rate_chart
from cellseg_batch.engine.run.records import BLOCKS, FinishedRecord, Manifest, TaskRecord
from cellseg_batch.engine.storage.journal import Journal
from cellseg_batch.engine.storage.paths import locate, printable

_BINS = 60
_PICTURES = 12
_PICTURE_SIDE = 560
_MOST_ROWS = 500
# A field of a plate: .../plate.zarr/<row>/<column>/<field>
_FIELD = re.compile(r"^(?P<plate>.+)/(?P<row>[A-Z]{1,2})/0*(?P<column>\d+)/[^/]+$")


@dataclass
class _Facts:
    """Figures from the journals that the status does not hold.

    Attributes:
        blocks: (POSIX time in seconds, pixels) of each block on disk.
        seconds: stage -> seconds, over all tasks.
        foreground: path of a finished image -> its share of foreground pixels.
        manifests: manifests of the started images.
    """

    blocks: list[tuple[float, float]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    foreground: dict[str, float] = field(default_factory=dict)
    manifests: list[Manifest] = field(default_factory=list)


def write_page(paths: list[Path], out: Path, name: str, output: Path | None) -> Status:
    """Write the page about the run over ``paths`` to ``out``; returns the status that it shows.

    Args:
        paths: inputs of the run, or its output folder.
        out: the file to write.
        name: name of the label group.
        output: output folder of the run; None if its labels lie in or beside the inputs.

    Raises:
        NoImageError: there is neither an image nor a journal.
        UsageError: there is no run of that name.
        OutputError: the page cannot be written.
    """
    facts = _Facts()
    status = read_status(paths, name, output)
    status = replace(status, slides=[_gather(slide, facts) for slide in status.slides])
    sections = [
        _summary(status, facts),
        _section("Throughput", _throughput(facts)),
        _section("Where the time went", bars(facts.seconds, "s") if any(facts.seconds.values()) else ""),
        _section("Failures", _failures(status)),
        *(_section(f"Plate {Path(plate).name}", chart) for plate, chart in _plates(facts)),
        _section("Pictures", _pictures(status, name, output)),
        _section("Images", _table(status, facts)),
    ]
    title = "cellseg-batch: " + ", ".join(f"{count} {state}" for state, count in status.counts.most_common())
    with writing_to(out, "a page"):
        page = _PAGE.format(title=escape(title), style=_STYLE, body="".join(sections))
        out.write_text(printable(page), encoding="utf-8")
    return status


def _gather(slide: SlideStatus, facts: _Facts) -> SlideStatus:
    """Add an image's figures to ``facts``; returns its status, which is failed if its journal cannot be read."""
    if slide.journal is None or not slide.blocks:
        return slide
    try:
        _add(slide, Journal(slide.journal), facts)
    except OutputError as error:  # it must not hide the other images
        return replace(slide, state="failed", reason=str(error))
    return slide


def _add(slide: SlideStatus, journal: Journal, facts: _Facts) -> None:
    manifest = journal.manifest(Manifest)
    if manifest is None:
        return  # removed meanwhile
    facts.manifests.append(manifest)
    facts.blocks += [(moment, slide.pixels / slide.blocks) for moment in journal.times(BLOCKS)]
    for name in manifest.passes:
        for _, task in journal.records(name, TaskRecord[Any]):
            for stage, seconds in task.seconds.items():
                facts.seconds[stage] = facts.seconds.get(stage, 0.0) + seconds
    finished = journal.finished(FinishedRecord)
    if finished is not None:
        facts.foreground[slide.path] = finished.foreground / slide.pixels


def _summary(status: Status, facts: _Facts) -> str:
    done = sum(pixels for _, pixels in facts.blocks)
    start = min((slide.begun for slide in status.slides if slide.begun is not None), default=0.0)
    wall = max((moment for moment, _ in facts.blocks), default=start) - start
    figures = {
        "images": f"{len(status.slides):,}",
        "segmented": f"{done / 1e6:,.1f} Mpx",
        "wall time": str(timedelta(seconds=round(wall))),
        "mean rate": f"{done / 1e6 / wall:,.2f} Mpx/s" if wall else "-",
    }
    if facts.foreground:
        figures["foreground"] = f"{100 * fmean(facts.foreground.values()):.1f} %"
    if status.seconds_left is not None:
        figures["left, about"] = str(timedelta(seconds=math.ceil(status.seconds_left)))
    chips = "".join(
        f'<span class="chip {state}">{count:,} {state}</span>' for state, count in status.counts.most_common()
    )
    cards = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{name}</span></div>' for name, value in figures.items()
    )
    models = sorted({_model(manifest) for manifest in facts.manifests})
    start_text = time.strftime("%Y-%m-%d %H:%M", time.localtime(start)) if start else "not begun"
    return (
        f"<header><h1>cellseg-batch</h1><p>begun {start_text}, page written {time.strftime('%Y-%m-%d %H:%M')}</p>"
        f'<p class="chips">{chips}</p></header><div class="cards">{cards}</div>'
        f'<p class="note">{"; ".join(map(escape, models))}</p>'
    )


def _model(manifest: Manifest) -> str:
    model, backend = manifest.decisions.model, manifest.decisions.backend
    return f"model {model.name} in {backend.name} {backend.precision}"


def _throughput(facts: _Facts) -> str:
    if len(facts.blocks) < 2:
        return ""
    first, last = min(facts.blocks)[0], max(facts.blocks)[0]
    width = max((last - first) / _BINS, 1e-3)
    totals = [0.0] * _BINS
    for moment, pixels in facts.blocks:
        totals[min(int((moment - first) / width), _BINS - 1)] += pixels
    labels = [
        time.strftime("%H:%M:%S", time.localtime(first + share * (last - first))) for share in (0, 0.25, 0.5, 0.75, 1)
    ]
    return rate_chart([total / 1e6 / width for total in totals], labels, "Mpx/s")


def _failures(status: Status) -> str:
    rows = "".join(
        f"<tr><td>{escape(slide.path)}</td><td>{escape(slide.reason)}</td></tr>"
        for slide in status.slides
        if slide.reason
    )
    return f"<table><thead><tr><th>image</th><th>reason</th></tr></thead><tbody>{rows}</tbody></table>" if rows else ""


def _plates(facts: _Facts) -> Iterator[tuple[str, str]]:
    """Yield (plate, chart of the mean foreground of each of its wells)."""
    plates: dict[str, dict[tuple[str, int], list[float]]] = {}
    for path, share in facts.foreground.items():
        field_path = _FIELD.match(path)
        if field_path:
            wells = plates.setdefault(field_path["plate"], {})
            wells.setdefault((field_path["row"], int(field_path["column"])), []).append(100 * share)
    for plate, wells in sorted(plates.items()):
        yield plate, plate_chart({well: fmean(shares) for well, shares in wells.items()}, "% foreground")


def _pictures(status: Status, name: str, output: Path | None) -> str:
    figures: list[str] = []
    for slide in status.slides:
        if slide.state == "done" and len(figures) < _PICTURES:
            picture = _picture(slide, name, output)
            if picture:
                caption = escape("/".join(Path(slide.path).parts[-3:]))
                figures.append(
                    f'<figure><img alt="{caption}" src="{picture}"><figcaption>{caption}</figcaption></figure>'
                )
    return f'<div class="pictures">{"".join(figures)}</div>' if figures else ""


def _picture(slide: SlideStatus, name: str, output: Path | None) -> str:
    """An image with the outlines of its labels, as a data URL; "" if it cannot be read."""
    with suppress(CellsegError, OSError), tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "picture.png"
        write_preview(locate(slide.path), file, None, name, output, None, None)
        with Image.open(file) as picture:
            picture.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
            stream = io.BytesIO()
            picture.convert("RGB").save(stream, "JPEG", quality=85)
        return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
    return ""


def _table(status: Status, facts: _Facts) -> str:
    rows = []
    for slide in status.slides[:_MOST_ROWS]:
        share = facts.foreground.get(slide.path)
        blocks = f"{slide.blocks_done:,} / {slide.blocks:,}" if slide.blocks else ""
        rows.append(
            f'<tr><td>{escape(slide.path)}</td><td><span class="chip {slide.state}">{slide.state}</span></td>'
            f'<td class="number">{blocks}</td><td class="number">{slide.pixels / 1e6:,.1f}</td>'
            f'<td class="number">{"" if share is None else f"{100 * share:.1f} %"}</td></tr>'
        )
    more = len(status.slides) - _MOST_ROWS
    note = f'<p class="note">and {more:,} more</p>' if more > 0 else ""
    numbers = "".join(f'<th class="number">{name}</th>' for name in ("blocks", "Mpx", "foreground"))
    heads = f"<th>image</th><th>state</th>{numbers}"
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>{note}"


def _section(title: str, content: str) -> str:
    """A section of the page; "" if it has no content."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head><body><main>{body}</main></body></html>
"""

_STYLE = """
:root{color-scheme:light dark;--ground:#f6f7f9;--card:#fff;--ink:#1b2330;--soft:#667085;--edge:#e3e7ee;--accent:#2563c9;
--done:#12805c;--failed:#c0362c;--running:#2563c9;--stopped:#a86400;--waiting:#667085}
@media (prefers-color-scheme:dark){:root{--ground:#12161d;--card:#1a202a;--ink:#e7ebf2;--soft:#97a1b3;--edge:#2b3340;
--accent:#6ea2f5;--done:#45c496;--failed:#f0776c;--running:#6ea2f5;--stopped:#e0a44a;--waiting:#97a1b3}}
*{box-sizing:border-box}body{margin:0;background:var(--ground);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1020px;margin:0 auto;padding:32px 20px 64px}h1{font-size:26px;margin:0;letter-spacing:-.02em}
h2{font-size:16px;margin:0 0 14px}header p{margin:4px 0;color:var(--soft)}
section,.card{background:var(--card);border:1px solid var(--edge);border-radius:12px}
section{padding:20px 22px;margin-top:18px;overflow-x:auto}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin-top:18px}
.card{padding:14px 16px}.card b{display:block;font-size:21px;font-variant-numeric:tabular-nums;letter-spacing:-.01em}
.card span,.note{color:var(--soft);font-size:13px}.chips{display:flex;gap:8px;flex-wrap:wrap}
.chip{display:inline-block;padding:1px 10px;border-radius:99px;font-size:13px;border:1px solid currentColor}
.done{color:var(--done)}.failed{color:var(--failed)}.running{color:var(--running)}.stopped{color:var(--stopped)}
.waiting{color:var(--waiting)}svg{width:100%;height:auto;display:block}.tick{fill:var(--soft);font-size:11px}
.grid{stroke:var(--edge)}.area{fill:var(--accent);fill-opacity:.14}.line{fill:none;stroke:var(--accent);stroke-width:1.6}
.hover{fill:transparent}.hover:hover{fill:var(--accent);fill-opacity:.12}.well{fill:var(--accent)}
.empty{fill:none;stroke:var(--edge)}
.bar{display:grid;grid-template-columns:90px 1fr 110px;gap:12px;align-items:center;margin:6px 0}
.track{background:var(--ground);border-radius:6px;height:14px;overflow:hidden}
.fill{display:block;height:100%;background:var(--accent)}
.bar .value,.number{text-align:right;font-variant-numeric:tabular-nums}
table{border-collapse:collapse;width:100%;font-size:14px}th{text-align:left;color:var(--soft);font-weight:500}
th.number{text-align:right}td,th{padding:7px 10px 7px 0;border-bottom:1px solid var(--edge);vertical-align:top}
td:first-child{overflow-wrap:anywhere}tr:last-child td{border-bottom:0}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(240px,1fr));gap:16px}figure{margin:0}
figure img{width:100%;aspect-ratio:1;object-fit:cover;border-radius:8px;display:block;background:var(--edge)}
figcaption{font-size:12px;color:var(--soft);margin-top:6px;overflow-wrap:anywhere}
"""
