"""Share what the parts of bench_gpu need: the device, its clock and its peak rates, and rows saved as they come."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from cellseg_batch.engine.inference.backends.cuda import Device
from cellseg_batch.engine.profiling.bench_conditions import conditions

Row = dict[str, Any]


class Bench:
    """A device, the size of its measurements, and the rows so far.

    Attributes:
        device: the device to measure.
        copy: bytes per second of a copy, read and written bytes both counted; 0 until measured.
        flops: operations per second of a matrix product in float16; 0 until measured.
    """

    def __init__(self, device: Device, tiny: bool, minutes: float, out: Path) -> None:
        self.device = device
        self.tiny = tiny
        self.copy = self.flops = 0.0
        self._deadline = time.monotonic() + 60 * minutes
        self._out = out
        self._rows: list[Row] = []

    def part(self, name: str, measure: Callable[[], list[Row]]) -> None:
        """Measure a part and save its rows, or the reason why it has none."""
        if time.monotonic() > self._deadline:
            rows = [{"missing": "no time was left"}]
        else:
            try:
                rows = measure()
            except Exception as error:  # a part that fails must not stop the others
                rows = [{"missing": f"{type(error).__name__}: {error}"}]
        for row in rows:
            self._rows.append({"part": name, **row})
            print(json.dumps(self._rows[-1]), flush=True)
        gpu = self.device.model if self.device.is_gpu else "none: these figures mean nothing"
        about = {"gpu": gpu, "cuda": torch.version.cuda, **conditions()}
        self._out.write_text(json.dumps({"conditions": about, "rows": self._rows}, indent=2) + "\n")

    def seconds(self, call: Callable[[], object], repeats: int = 10) -> float:
        """Seconds of the device for a call: the median over rounds, each with ``repeats`` calls."""
        stream, times = self.device.stream(), []
        with self.device.on(stream):
            call()
            for _ in range(2 if self.tiny else 15):
                start, end = self.device.event(), self.device.event()
                start.record(stream)
                for _ in range(repeats):
                    call()
                end.record(stream)
                end.synchronize()
                times.append(start.elapsed_time(end) / 1000 / repeats)
        return median(times)

    def measure_ceilings(self) -> list[Row]:
        """Measure the peak rates of the device's memory and arithmetic, with a copy and a matrix product."""
        source = self.device.zeros(((1 << 10) if self.tiny else (1 << 30),), torch.uint8)
        target = torch.empty_like(source)
        self.copy = 2 * source.numel() / self.seconds(lambda: target.copy_(source))
        side = 64 if self.tiny else 8192
        left, right = (torch.randn(side, side, device=self.device.torch_device).half() for _ in range(2))
        self.flops = 2 * side**3 / self.seconds(lambda: torch.matmul(left, right))
        return [{"copy_gb_per_s": self.copy / 1e9, "float16_tflops": self.flops / 1e12}]
