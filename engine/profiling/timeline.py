"""What the intervals of a run say: how busy each stage was, what the device waited for, and a trace for Perfetto.

It knows intervals only, no slides and no models.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from cellseg_batch.engine.stage_clock import Interval

IDLE = "scheduler"
"""The share of the time in which nothing that is counted goes on: planning, scheduling, Python."""

_HOST = ("read", "upload", "seeds", "growth", "measure", "write", "pyramid", IDLE)


def on_device(stage: str) -> bool:
    """Whether a stage is on a block's way through the device: of these, blocks overlap in next to nothing."""
    return stage not in _HOST


def occupied(intervals: Iterable[Interval]) -> float:
    """Seconds in which at least one of ``intervals`` lasts."""
    total, until = 0.0, float("-inf")
    for start, end in sorted((one.start, one.end) for one in intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def busy_seconds(intervals: Iterable[Interval]) -> dict[str, float]:
    """Seconds of each stage, over all threads."""
    seconds: dict[str, float] = defaultdict(float)
    for one in intervals:
        seconds[one.stage] += one.end - one.start
    return seconds


def wall_seconds(intervals: Sequence[Interval]) -> float:
    """Seconds from the first work to the last."""
    return max(one.end for one in intervals) - min(one.start for one in intervals)


def shares(intervals: Sequence[Interval], workers: int) -> dict[str, float]:
    """Share of a long run that each stage would account for if it went on as here; together 1.

    A sample is short: its first reads and last writes count for more than they would.  So the time of a block in the
    long run is taken to be that of the device, or what a worker spends on it divided by ``workers`` if that is more;
    then the device waits, for reading and writing in proportion to their seconds.  Time in which nothing is counted
    comes on top.
    """
    busy = busy_seconds(intervals)
    device = occupied(one for one in intervals if on_device(one.stage))
    host = {stage: seconds for stage, seconds in busy.items() if stage in _HOST and stage != "pyramid"}
    waiting = max(0.0, (device + sum(host.values())) / workers - device)
    parts = {stage: waiting * seconds / sum(host.values()) for stage, seconds in host.items()}
    on_it = sum(seconds for stage, seconds in busy.items() if on_device(stage))
    parts |= {stage: device * seconds / on_it for stage, seconds in busy.items() if on_device(stage)}
    parts["pyramid"] = occupied(one for one in intervals if one.stage == "pyramid")
    parts[IDLE] = wall_seconds(intervals) - occupied(intervals)
    return {stage: seconds / sum(parts.values()) for stage, seconds in parts.items()}


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
