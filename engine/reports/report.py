"""Write one self-contained HTML page about a run that goes on or has ended: messages, figures, charts, pictures.

The page fetches nothing, so it opens offline and can be mailed.  Figures come from the journals; pictures come from the
images and their labels, if these can be read.
"""

from __future__ import annotations

import base64
import io
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from html import escape
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cellseg_batch.engine.errors import CellsegError, OutputError, ReadError, writing_to
from cellseg_batch.engine.reports.object_figures import ObjectFigures, read_object_figures, size_at
from cellseg_batch.engine.reports.preview import draw_preview
from cellseg_batch.engine.reports.status import SlideStatus, Status, read_status
from cellseg_batch.engine.reports.svg_charts import bars, histogram, plate_chart, rate_chart, stack
from cellseg_batch.engine.run.output_paths import TABLE_NAME
from cellseg_batch.engine.run.records import BLOCKS, FinishedRecord, Manifest, TaskRecord
from cellseg_batch.engine.storage.journal import Journal
from cellseg_batch.engine.storage.paths import locate, printable

_BINS = 60
_PICTURES = 12
_PICTURE_SIDE = 560
# The page over thousands of images stays a few megabytes.
_MOST_ROWS = 500
_MOST_MESSAGES = 100
_MOST_NAMES = 10
_MOST_PLATES = 12
_MOST_CHARTS = 9
# The states of images, those that need the reader first.
_URGENCY = ("failed", "stopped", "running", "waiting", "done")
# A field of a plate: .../plate.zarr/<row>/<column>/<field>
_FIELD = re.compile(r"^(?P<plate>.+)/(?P<row>[A-Z]{1,2})/0*(?P<column>\d+)/[^/]+$")


@dataclass(frozen=True)
class ClassKey:
    """Name and colour of a class."""

    name: str
    colour: str


@dataclass
class _Facts:
    """Figures from the journals that the status does not hold.

    Attributes:
        blocks: (POSIX time in seconds, pixels) of each block on disk.
        seconds: stage -> seconds, over all tasks.
        foreground: path of a finished image -> its share of foreground pixels.
        tissue: path of a started image of which glass is left out -> share of it that is not taken for glass.
        classes: path of a finished image with classes -> the classes and their shares of its pixels.
        objects: number of objects of the finished images; None if none of them tells objects apart.
        manifests: manifests of the started images.
        tables: path of a finished image with measured objects -> file of its table.
        heatmaps: path of a plate -> file of its heat maps, which may be missing.
        notes: remark -> paths of the images that it is about.
    """

    blocks: list[tuple[float, float]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    foreground: dict[str, float] = field(default_factory=dict)
    tissue: dict[str, float] = field(default_factory=dict)
    classes: dict[str, dict[ClassKey, float]] = field(default_factory=dict)
    objects: int | None = None
    manifests: list[Manifest] = field(default_factory=list)
    tables: dict[str, Path] = field(default_factory=dict)
    heatmaps: dict[str, Path] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)

    def note(self, path: str, remark: str) -> None:
        """Add a remark on an image."""
        self.notes.setdefault(remark, []).append(path)


def write_page(
    paths: list[Path], out: Path, name: str, output: Path | None, as_written: Callable[[str], str]
) -> Status:
    """Write the page about the run over ``paths`` to ``out``; returns the status that it shows.

    Args:
        paths: inputs of the run, or its output folder.
        out: the file to write.
        name: name of the label group.
        output: output folder of the run; None if its labels lie in or beside the inputs.
        as_written: writes the settings in backticks of a text as the reader sets them.

    Raises:
        NoImageError: there is neither an image nor a journal.
        UsageError: there is no run of that name.
        OutputError: the page cannot be written.
    """
    facts = _Facts()
    status = read_status(paths, name, output)
    slides = [_gather(slide, facts) for slide in status.slides]
    status = replace(status, slides=sorted(slides, key=lambda slide: _URGENCY.index(slide.state)))
    objects = _objects(facts)  # it may add remarks
    sections = [
        _summary(status, facts),
        _section("To do", _messages(_tasks(status), as_written)),
        _section("To know", _messages(facts.notes, as_written)),
        *(_section(f"Plate {Path(plate).name}", chart) for plate, chart in islice(_plates(facts), _MOST_PLATES)),
        _section("Classes", _classes(facts)),
        _section("Objects", objects),
        _section("Pictures", _pictures(status, name, output)),
        _section("Images", _table(status, facts)),
        _section("Throughput", _throughput(facts)),
        _section("Where the time went", bars(facts.seconds, "s") if any(facts.seconds.values()) else ""),
    ]
    title = "cellseg-batch: " + ", ".join(f"{count} {state}" for state, count in _counts(status))
    with writing_to(out, "a page"):
        page = _PAGE.format(title=escape(title), style=_STYLE, body="".join(sections))
        out.write_text(printable(page), encoding="utf-8")
    return status


def _gather(slide: SlideStatus, facts: _Facts) -> SlideStatus:
    """Add an image's figures to ``facts``; returns its status, which is failed if its journal cannot be read."""
    for remark in slide.notes:
        facts.note(slide.path, remark)
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
    if manifest.decisions.tissue_tiles is not None:
        area = math.prod(manifest.decisions.input.plane_shape)
        facts.tissue[slide.path] = manifest.decisions.tissue_tiles.area / area
    facts.blocks += [(moment, slide.pixels / slide.blocks) for moment in journal.times(BLOCKS)]
    for name in manifest.passes:
        for _, task in journal.records(name, TaskRecord[Any]):
            for stage, seconds in task.seconds.items():
                facts.seconds[stage] = facts.seconds.get(stage, 0.0) + seconds
    finished = journal.finished(FinishedRecord)
    if finished is not None:
        facts.foreground[slide.path] = finished.foreground / slide.pixels
        if finished.classes:
            shares = {ClassKey(one.name, one.colour): one.pixels / slide.pixels for one in finished.classes}
            facts.classes[slide.path] = shares
        if finished.objects is not None:
            facts.objects = (facts.objects or 0) + finished.objects
        for remark in finished.notes:
            facts.note(slide.path, remark)
        for remark in manifest.decisions.cells.notes if manifest.decisions.cells else ():
            facts.note(slide.path, remark)
        if manifest.decisions.objects:
            facts.tables[slide.path] = journal.folder / TABLE_NAME
    field_path = _FIELD.match(slide.path)
    if field_path:  # the journal is <plate>/<row>/<column>/<field>/labels/<name>
        facts.heatmaps[field_path["plate"]] = journal.folder.parents[4] / f"{journal.folder.name}.plate" / "heatmap.png"


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
    if facts.objects is not None:
        figures["objects"] = f"{facts.objects:,}"
    if status.seconds_left is not None:
        figures["left, about"] = str(timedelta(seconds=math.ceil(status.seconds_left)))
    chips = "".join(f'<span class="chip {state}">{count:,} {state}</span>' for state, count in _counts(status))
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


def _counts(status: Status) -> list[tuple[str, int]]:
    """The states of images and their numbers, done first."""
    return [(state, status.counts[state]) for state in reversed(_URGENCY) if status.counts[state]]


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


def _tasks(status: Status) -> dict[str, list[str]]:
    """What the reader must do something about -> the paths of the images."""
    tasks: dict[str, list[str]] = {}
    for slide in status.slides:
        if slide.reason:
            tasks.setdefault(slide.reason, []).append(slide.path)
        elif slide.state == "stopped":
            tasks.setdefault("unfinished, and no run is at work on it: the same command goes on", []).append(slide.path)
    return tasks


def _messages(messages: dict[str, list[str]], as_written: Callable[[str], str]) -> str:
    """A table of texts and the images that they are about; "" without texts."""
    rows = "".join(
        f"<tr><td>{_names(paths)}</td><td>{escape(as_written(text))}</td></tr>"
        for text, paths in islice(messages.items(), _MOST_MESSAGES)
    )
    return _rows_table(rows, "<th>image</th><th>message</th>", len(messages) - _MOST_MESSAGES) if rows else ""


def _names(paths: list[str]) -> str:
    names = "<br>".join(map(escape, paths[:_MOST_NAMES]))
    more = len(paths) - _MOST_NAMES
    return f'{names}<br><span class="note">and {more:,} more</span>' if more > 0 else names


def _rows_table(rows: str, heads: str, more: int) -> str:
    note = f'<p class="note">and {more:,} more</p>' if more > 0 else ""
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>{note}'


def _plates(facts: _Facts) -> Iterator[tuple[str, str]]:
    """Yield (plate, its heat maps; without measured objects, charts of the foreground and classes of each well)."""
    plates: dict[str, dict[str, dict[tuple[str, int], list[float]]]] = {}
    for path, share in facts.foreground.items():
        field_path = _FIELD.match(path)
        if field_path:
            well = field_path["row"], int(field_path["column"])
            of_classes = {key.name: part for key, part in facts.classes.get(path, {}).items()}
            for name, part in {"foreground": share, **of_classes}.items():
                charts = plates.setdefault(field_path["plate"], {})
                charts.setdefault(name, {}).setdefault(well, []).append(100 * part)
    for plate, charts in sorted(plates.items()):
        heatmap = facts.heatmaps[plate]
        if heatmap.is_file():
            yield plate, f'<img class="heatmap" alt="heat maps" src="{_data_url("png", heatmap.read_bytes())}">'
        else:
            means = {name: {well: fmean(parts) for well, parts in wells.items()} for name, wells in charts.items()}
            shown = [plate_chart(wells, f"% {name}") for name, wells in islice(means.items(), _MOST_CHARTS)]
            more = len(means) - len(shown)
            note = f'<p class="note">and {more:,} more classes</p>' if more else ""
            yield plate, "".join([*shown, note])


def _classes(facts: _Facts) -> str:
    """A row for the mean over all images, and for each image, with what is of each class."""
    keys = list(dict.fromkeys(key for shares in facts.classes.values() for key in shares))
    means = {key: fmean(shares.get(key, 0.0) for shares in facts.classes.values()) for key in keys}
    rows = [("mean over images", means)] if len(facts.classes) > 1 else []
    rows += islice(facts.classes.items(), _MOST_ROWS)
    heads = "".join(f'<th class="number">{_key(key)}</th>' for key in keys)
    text = "".join(
        f"<tr><td>{escape(path)}</td><td>{stack([(key.name, shares.get(key, 0.0), key.colour) for key in keys])}</td>"
        + "".join(f'<td class="number">{f"{100 * shares[key]:.1f} %" if key in shares else ""}</td>' for key in keys)
        + "</tr>"
        for path, shares in rows
    )
    return _rows_table(text, f"<th>image</th><th>area</th>{heads}", len(facts.classes) - _MOST_ROWS) if keys else ""


def _key(key: ClassKey) -> str:
    return f'<span class="key" style="background:{key.colour}"></span> {escape(key.name)}'


def _objects(facts: _Facts) -> str:
    """A row for each image with measured objects; a table that cannot be read becomes a remark."""
    read: dict[str, ObjectFigures] = {}
    for path, table in islice(facts.tables.items(), _MOST_ROWS):
        try:
            read[path] = read_object_figures(table)
        except ReadError as error:
            facts.note(path, str(error))
    spans = {unit: _span([one for one in read.values() if one.unit == unit]) for unit in ("µm²", "px")}
    of_cells = any(figures.median_cell is not None for figures in read.values())
    rows = "".join(_object_row(path, figures, spans[figures.unit], of_cells) for path, figures in read.items())
    columns = ("objects", "density", "median area", *(("median cell area",) if of_cells else ()))
    numbers = "".join(f'<th class="number">{name}</th>' for name in columns)
    heads = f"<th>image</th>{numbers}<th>areas, on a scale of doublings</th>"
    return _rows_table(rows, heads, len(facts.tables) - _MOST_ROWS) if rows else ""


def _object_row(path: str, figures: ObjectFigures, span: range, of_cells: bool) -> str:
    medians = [figures.median, figures.median_cell] if of_cells else [figures.median]
    areas = "".join(
        f'<td class="number">{"" if area is None else f"{_short(area)} {figures.unit}"}</td>' for area in medians
    )
    ends = [f"{_short(size_at(edge))} {figures.unit}" for edge in (span.start, span.stop)]
    chart = histogram(figures.sizes[span.start : span.stop], *ends) if figures.count else ""
    return (
        f'<tr><td>{escape(path)}</td><td class="number">{figures.count:,}</td>'
        f'<td class="number">{_short(figures.density)} {figures.density_unit}</td>'
        f"{areas}<td>{chart}</td></tr>"
    )


def _short(value: float) -> str:
    """A number of three digits, or of all those before the decimal point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _span(figures: list[ObjectFigures]) -> range:
    """The bins of sizes that hold objects of any image: one axis for all, so that images can be compared."""
    filled = [number for image in figures for number, count in enumerate(image.sizes) if count]
    return range(min(filled, default=0), max(filled, default=0) + 1)


def _pictures(status: Status, name: str, output: Path | None) -> str:
    """Pictures of a few finished images, from all over the list."""
    done = [slide for slide in status.slides if slide.state == "done"]
    chosen = done[:: max(1, -(-len(done) // _PICTURES))]
    figures = "".join(_figure(slide, name, output) for slide in chosen)
    return f'<div class="pictures">{figures}</div>' if figures else ""


def _figure(slide: SlideStatus, name: str, output: Path | None) -> str:
    """An image with the outlines of its labels; "" if it cannot be read."""
    caption = escape("/".join(Path(slide.path).parts[-3:]))
    with suppress(CellsegError, OSError):
        preview = draw_preview(locate(slide.path), _PICTURE_SIDE, None, name, output)
        images = f'<img alt="{caption}" src="{_jpeg(preview.overview)}">'
        if preview.detail is None:
            return f"<figure>{images}<figcaption>{caption}</figcaption></figure>"
        images += f'<img alt="the framed part" src="{_jpeg(preview.detail)}">'
        note = "tinted where objects are; right: the framed part at full resolution"
        return f'<figure class="pair"><div>{images}</div><figcaption>{caption}: {note}</figcaption></figure>'
    return ""


def _jpeg(picture: NDArray[np.uint8]) -> str:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "JPEG", quality=85, subsampling=0)  # subsampling would blur thin outlines
    return _data_url("jpeg", stream.getvalue())


def _data_url(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64," + base64.b64encode(content).decode()


def _table(status: Status, facts: _Facts) -> str:
    rows = []
    for slide in status.slides[:_MOST_ROWS]:
        shares = facts.tissue.get(slide.path), facts.foreground.get(slide.path)
        texts = ["" if share is None else f"{100 * share:.1f} %" for share in shares]
        blocks = f"{slide.blocks_done:,} / {slide.blocks:,}" if slide.blocks else ""
        rows.append(
            f'<tr><td>{escape(slide.path)}</td><td><span class="chip {slide.state}">{slide.state}</span></td>'
            f'<td class="number">{blocks}</td><td class="number">{slide.pixels / 1e6:,.1f}</td>'
            + "".join(f'<td class="number">{text}</td>' for text in texts)
            + "</tr>"
        )
    numbers = "".join(f'<th class="number">{name}</th>' for name in ("blocks", "Mpx", "tissue", "foreground"))
    heads = f"<th>image</th><th>state</th>{numbers}"
    return _rows_table("".join(rows), heads, len(status.slides) - _MOST_ROWS)


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
.scroll{max-height:640px;overflow:auto}@media print{.scroll{max-height:none}}
td:first-child{overflow-wrap:anywhere;min-width:140px}
.number{white-space:nowrap}tr:last-child td{border-bottom:0}
.stack{display:flex;min-width:180px}.stack span{height:100%}
.key{display:inline-block;width:10px;height:10px;border-radius:3px}
.bin{fill:var(--accent)}svg.small{width:180px}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(420px,100%),1fr));gap:16px}figure{margin:0}
figure img{max-width:100%;max-height:560px;border-radius:8px;display:block}img.heatmap{max-width:100%}
.pair{grid-column:1/-1}.pair div{display:flex;gap:12px;align-items:start}
.pair img{min-width:0;max-width:calc(50% - 6px)}
figcaption{font-size:12px;color:var(--soft);margin-top:6px;overflow-wrap:anywhere}
"""
