"""Draw small charts as SVG text or boxes: rate over time, shares of a whole, a plate of wells, sizes.

The charts know numbers and labels only. Their colours are CSS variables of the page around them, so they follow its
light or dark theme.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT = 860, 220
_LEFT, _BOTTOM, _TOP = 52, 26, 10
_WELL = 26
_BAR_WIDTH, _BAR_HEIGHT = 180, 34


def rate_chart(rates: Sequence[float], labels: Sequence[str], unit: str) -> str:
    """Draw ``rates`` over time as an area.

    Args:
        rates: at least one; each is the rate over one of equally long spans of time.
        labels: texts spread evenly below the axis, first at its start and last at its end.
        unit: unit of the rates.
    """
    top = nice_ceiling(max(rates)) or 1.0
    width, height = _WIDTH - _LEFT - 10, _HEIGHT - _BOTTOM - _TOP
    step = width / len(rates)
    base = _TOP + height
    heights = [base - height * rate / top for rate in rates]
    points = " ".join(f"{_LEFT + (i + side) * step:.1f},{y:.1f}" for i, y in enumerate(heights) for side in (0, 1))
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(unit)} over time">']
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = base - share * height
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_LEFT + width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{share * top:g}</text>')
    parts.append(f'<polygon class="area" points="{_LEFT},{base} {points} {_LEFT + width},{base}"/>')
    parts.append(f'<polyline class="line" points="{points}"/>')
    for i, rate in enumerate(rates):
        x = _LEFT + i * step
        parts.append(
            f'<rect class="hover" x="{x:.1f}" y="{_TOP}" width="{step:.1f}" height="{height}">'
            f"<title>{rate:.2f} {escape(unit)}</title></rect>"
        )
    for i, label in enumerate(labels):
        share = i / max(1, len(labels) - 1)
        anchor = "start" if i == 0 else "end" if i == len(labels) - 1 else "middle"
        x = _LEFT + share * width
        parts.append(f'<text class="tick" x="{x:.1f}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{escape(label)}</text>')
    return "".join([*parts, "</svg>"])


def bars(values: Mapping[str, float], unit: str) -> str:
    """Draw a horizontal bar for each of ``values``, the longest first."""
    most = max(values.values(), default=0.0) or 1.0
    rows = []
    for name, value in sorted(values.items(), key=lambda item: -item[1]):
        share = 100 * value / most
        track = f'<span class="track"><span class="fill" style="width:{share:.1f}%"></span></span>'
        figure = f'<span class="value">{value:,.1f} {escape(unit)}</span>'
        rows.append(f'<div class="bar"><span class="name">{escape(name)}</span>{track}{figure}</div>')
    return "".join(rows)


def stack(parts: Iterable[tuple[str, float, str]]) -> str:
    """Draw shares of a whole, one behind the other; the rest of the whole stays empty.

    Args:
        parts: name, share in [0, 1] and colour (``#rrggbb``) of each.
    """
    spans = (
        f'<span style="width:{100 * share:.2f}%;background:{colour}" title="{escape(name)} {100 * share:.1f} %"></span>'
        for name, share, colour in parts
    )
    return f'<div class="track stack">{"".join(spans)}</div>'


def plate_chart(wells: Mapping[tuple[str, int], float], unit: str) -> str:
    """Draw a plate of wells, the highest value darkest, with rows in the order A-Z, AA-AF.

    Wells in between that have no value are drawn empty.

    Args:
        wells: (row, column) -> value.
        unit: unit of the values.
    """
    rows = sorted({row for row, _ in wells}, key=lambda row: (len(row), row))
    columns = range(min(column for _, column in wells), max(column for _, column in wells) + 1)
    low, high = min(wells.values()), max(wells.values())
    width, height = _WELL * (len(columns) + 1) + 8, _WELL * (len(rows) + 1) + 4
    parts = [
        f'<svg viewBox="0 0 {width} {height}" style="max-width:{width * 1.4:.0f}px" role="img" aria-label="plate">'
    ]
    for j, column in enumerate(columns):
        parts.append(f'<text class="tick" x="{_WELL * (j + 1.5):.0f}" y="16" text-anchor="middle">{column}</text>')
    for i, row in enumerate(rows):
        parts.append(
            f'<text class="tick" x="14" y="{_WELL * (i + 1.65):.0f}" text-anchor="middle">{escape(row)}</text>'
        )
        for j, column in enumerate(columns):
            value = wells.get((row, column))
            share = 0.0 if value is None else (value - low) / (high - low) if high > low else 1.0
            style = 'class="empty"' if value is None else f'class="well" fill-opacity="{0.12 + 0.88 * share:.2f}"'
            text = "no value" if value is None else f"{value:,.4g} {unit}"
            centre = f'cx="{_WELL * (j + 1.5):.0f}" cy="{_WELL * (i + 1.5):.0f}"'
            parts.append(f'<circle {style} {centre} r="11"><title>{escape(row)}{column}: {text}</title></circle>')
    return "".join([*parts, f'</svg><p class="note">{low:,.4g} to {high:,.4g} {unit}, the highest darkest</p>'])


def histogram(counts: Sequence[int], low: str, high: str) -> str:
    """Draw a small histogram, as tall as its highest bin.

    Args:
        counts: at least one; number in each bin.
        low, high: texts at the start and the end of the axis.
    """
    top, width = max(counts) or 1, _BAR_WIDTH / len(counts)
    path = "".join(
        f"M{i * width:.1f} {_BAR_HEIGHT}v{-_BAR_HEIGHT * count / top:.1f}h{width:.1f}V{_BAR_HEIGHT}z"
        for i, count in enumerate(counts)
        if count
    )
    base = _BAR_HEIGHT + 12
    return (
        f'<svg class="small" viewBox="0 0 {_BAR_WIDTH} {base + 2}" role="img" aria-label="sizes">'
        f'<path class="bin" d="{path}"/><line class="grid" x1="0" x2="{_BAR_WIDTH}" y1="{_BAR_HEIGHT}" '
        f'y2="{_BAR_HEIGHT}"/><text class="tick" x="0" y="{base}">{escape(low)}</text>'
        f'<text class="tick" x="{_BAR_WIDTH}" y="{base}" text-anchor="end">{escape(high)}</text></svg>'
    )


def nice_ceiling(value: float) -> float:
    """The smallest of 1, 2, 4, 5, 10 times a power of ten that is not below ``value``; 0 for 0."""
    if value <= 0:
        return 0.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * step for step in (1, 2, 4, 5, 10) if power * step >= value * (1 - 1e-12))
