"""Measure utilisation and energy of the first NVIDIA GPU during a run, if NVML is available."""

from __future__ import annotations

import importlib
import threading
from contextlib import suppress
from types import TracebackType
from typing import Any

_PERIOD = 0.05


class GpuMeter:
    """Meter of the GPU, at work as long as its context lasts.

    Attributes:
        figures: mean and largest utilisation in %, and energy in J, as far as the GPU reports them; empty without NVML
            or a GPU.
    """

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}
        self._ended = threading.Event()
        self._samples: list[int] = []

    def __enter__(self) -> GpuMeter:
        self._nvml = _open_nvml()
        if self._nvml is not None:
            self._handle = self._nvml.nvmlDeviceGetHandleByIndex(0)
            self._energy = self._millijoules()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._nvml is None:
            return
        self._ended.set()
        self._thread.join()
        if self._samples:
            self.figures["gpu_utilisation"] = sum(self._samples) / len(self._samples)
            self.figures["gpu_utilisation_peak"] = max(self._samples)
        energy = self._millijoules()
        if energy is not None and self._energy is not None:
            self.figures["gpu_energy_j"] = (energy - self._energy) / 1000
        self._nvml.nvmlShutdown()

    def _millijoules(self) -> int | None:
        try:
            return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        except self._nvml.NVMLError:  # GPUs older than Volta do not count energy
            return None

    def _watch(self) -> None:
        with suppress(self._nvml.NVMLError):  # a part of a GPU (MIG) does not report utilisation
            while True:
                self._samples.append(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu)
                if self._ended.wait(_PERIOD):
                    return


def _open_nvml() -> Any:
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        return nvml if nvml.nvmlDeviceGetCount() else None
    except Exception:  # not installed, no driver, no GPU: nothing to measure
        return None
