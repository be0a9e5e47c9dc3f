"""Read the intervals of a run: the busy time of each stage, the waits of the device, and a trace for Perfetto.

This module knows intervals only, no slides and no models.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from cellseg_batch.engine.stage_clock import Interval

IDLE = "scheduler"
"""Name for the time in which no stage is busy: planning, scheduling, Python."""

_HOST = ("read", "upload", "seeds", "growth", "expand", "measure", "write", "pyramid", IDLE)


def on_device(stage: str) -> bool:
    """Whether a stage computes on the device; such stages of different blocks hardly overlap."""
    return stage not in _HOST


def occupied(intervals: Iterable[Interval]) -> float:
    """Seconds that ``intervals`` cover together, overlaps counted once."""
    total, until = 0.0, float("-inf")
    for start, end in sorted((interval.start, interval.end) for interval in intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def busy_seconds(intervals: Iterable[Interval]) -> dict[str, float]:
    """Stage -> seconds, summed over all threads."""
    seconds: dict[str, float] = defaultdict(float)
    for interval in intervals:
        seconds[interval.stage] += interval.end - interval.start
    return seconds


def wall_seconds(intervals: Sequence[Interval]) -> float:
    """Seconds from the start of the first interval to the end of the last."""
    return max(interval.end for interval in intervals) - min(interval.start for interval in intervals)


def shares(intervals: Sequence[Interval], workers: int) -> dict[str, float]:
    """Stage -> share of the time of a long run that goes on like this one; the shares sum to 1.

    A sample is short, so its first reads and last writes weigh more than in a long run.  The time of a block in a long
    run is therefore the larger of two: the time of the device, and the time that a worker spends on the block divided
    by ``workers``.  If the second is larger, the device waits, for reading and writing in proportion to their seconds.
    Time in which no stage is busy comes on top.
    """
    busy = busy_seconds(intervals)
    device = occupied(interval for interval in intervals if on_device(interval.stage))
    host = {stage: seconds for stage, seconds in busy.items() if stage in _HOST and stage != "pyramid"}
    waiting = max(0.0, (device + sum(host.values())) / workers - device)
    parts = {stage: waiting * seconds / sum(host.values()) for stage, seconds in host.items()}
    device_busy = sum(seconds for stage, seconds in busy.items() if on_device(stage))
    parts |= {stage: device * seconds / device_busy for stage, seconds in busy.items() if on_device(stage)}
    parts["pyramid"] = occupied(interval for interval in intervals if interval.stage == "pyramid")
    parts[IDLE] = wall_seconds(intervals) - occupied(intervals)
    return {stage: seconds / sum(parts.values()) for stage, seconds in parts.items()}


def predict_seconds(blocks: int, workers: int, read: float, device: float, write: float) -> float:
    """Predict the seconds for ``blocks`` equal blocks on ``workers`` threads that share a device.

    Args:
        blocks: number of blocks.
        workers: number of threads.
        read, device, write: seconds per block to read, to compute on the device and to write.
    """
    free, device_free = [0.0] * min(workers, blocks), 0.0
    for _ in range(blocks):
        device_free = max(heapq.heappop(free) + read, device_free) + device
        heapq.heappush(free, device_free + write)
    return max(free)


def chrome_trace(intervals: Sequence[Interval]) -> dict[str, Any]:
    """The intervals in Chrome's trace format, which Perfetto shows: a row per thread, times in µs."""
    begin = min(interval.start for interval in intervals)
    events = [
        {
            "name": interval.stage,
            "cat": "device" if on_device(interval.stage) else "host",
            "ph": "X",
            "ts": (interval.start - begin) * 1e6,
            "dur": (interval.end - interval.start) * 1e6,
            "pid": 1,
            "tid": interval.thread,
        }
        for interval in intervals
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}
