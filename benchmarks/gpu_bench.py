"""Share what the parts of bench_gpu need: the device, its clock and its peak rates."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from statistics import median
from typing import Any

import torch

from cellseg_batch.engine.inference.backends.cuda import Device

Row = dict[str, Any]


class Bench:
    """A device and its clock.  On the CPU in its stead everything is tiny and the figures mean nothing.

    Attributes:
        device: the device to measure.
        tiny: whether measurements are as small as they can be.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.tiny = not device.is_gpu

    @cached_property
    def copy(self) -> float:
        """Bytes per second of a copy, read and written bytes both counted."""
        source = self.device.zeros(((1 << 10) if self.tiny else (1 << 30),), torch.uint8)
        target = torch.empty_like(source)
        return 2 * source.numel() / self.seconds(lambda: target.copy_(source))

    @cached_property
    def flops(self) -> float:
        """Operations per second of a matrix product in float16."""
        side = 64 if self.tiny else 8192
        left, right = (torch.randn(side, side, device=self.device.torch_device).half() for _ in range(2))
        return 2 * side**3 / self.seconds(lambda: torch.matmul(left, right))

    def seconds(self, call: Callable[[], object], repeats: int = 10) -> float:
        """Seconds of the device for a call: the median over rounds, each with ``repeats`` calls.

        The calls of a round wait on the device until all are enqueued, so that Python's time is not counted.
        """
        stream, times = self.device.stream(), []
        rounds, repeats = (1, 1) if self.tiny else (15, repeats)
        with self.device.on(stream):
            call()
            for _ in range(rounds):
                start, end = self.device.event(), self.device.event()
                if self.device.is_gpu:
                    torch.cuda._sleep(20_000_000)  # cycles, about 10 ms
                start.record(stream)
                for _ in range(repeats):
                    call()
                end.record(stream)
                end.synchronize()
                times.append(start.elapsed_time(end) / 1000 / repeats)
        return median(times)
