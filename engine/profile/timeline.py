"""What the intervals of a run say: how busy each stage was, what the device waited for, and a trace for Perfetto.

It knows intervals only, no slides and no models.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from cellseg_batch.engine.stages import Interval

IDLE = "scheduler"
"""The share of the time in which nothing that is counted goes on: planning, scheduling, Python."""

_HOST = ("read", "write", "pyramid")


def on_device(stage: str) -> bool:
    """Whether a stage keeps the device: one block at a time passes through these."""
    return stage not in _HOST


def occupied(intervals: Iterable[Interval]) -> float:
    """Seconds in which at least one of ``intervals`` lasts."""
    total, until = 0.0, float("-inf")
    for start, end in sorted((one.start, one.end) for one in intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def span(intervals: Sequence[Interval]) -> tuple[float, float]:
    """(start, end) of the steady part: from the first work on the device to the last, or to the pyramid's end."""
    device = [one for one in intervals if on_device(one.stage)]
    last = [one.end for one in intervals if on_device(one.stage) or one.stage == "pyramid"]
    return min(one.start for one in device), max(last)


def shares(intervals: Sequence[Interval]) -> dict[str, float]:
    """Share of the steady part that each stage accounts for; together 1.

    A moment in which the device works is the device's.  One in which it waits is shared by the stages that are busy
    then, by their number of threads, or is nobody's (`IDLE`).
    """
    start, end = span(intervals)
    events = [(one.start, 1, one.stage) for one in intervals] + [(one.end, -1, one.stage) for one in intervals]
    active: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for (moment, change, stage), (following, *_) in pairwise([*sorted(events), (end, 0, "")]):
        active[stage] += change
        length = min(following, end) - max(moment, start)
        if length <= 0:
            continue
        busy = {name: count for name, count in active.items() if count and on_device(name)}
        busy = busy or {name: count for name, count in active.items() if count} or {IDLE: 1}
        for name, count in busy.items():
            total[name] += length * count / sum(busy.values())
    return {name: seconds / (end - start) for name, seconds in total.items()}


def predict_seconds(blocks: int, workers: int, read: float, device: float, write: float) -> float:
    """Seconds for ``blocks`` equal blocks on ``workers`` threads that share one device."""
    free, device_free = [0.0] * min(workers, blocks), 0.0
    for _ in range(blocks):
        device_free = max(heapq.heappop(free) + read, device_free) + device
        heapq.heappush(free, device_free + write)
    return max(free)


def chrome_trace(intervals: Sequence[Interval]) -> dict[str, Any]:
    """The intervals in Chrome's trace format, which Perfetto shows: one row a thread, times in µs."""
    begin = min(one.start for one in intervals)
    events = [
        {
            "name": one.stage,
            "cat": "device" if on_device(one.stage) else "host",
            "ph": "X",
            "ts": (one.start - begin) * 1e6,
            "dur": (one.end - one.start) * 1e6,
            "pid": 1,
            "tid": one.thread,
        }
        for one in intervals
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}
