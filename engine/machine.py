"""Describe this machine and this process (cores, GPUs, memory), and run modules in processes of their own."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

# Parameter numbers from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Environment variable with the share of the visible GPU's memory that this process may use.
GPU_SHARE = "CELLSEG_GPU_SHARE"
# Of one name, in the file systems of Linux, macOS and Windows.
MOST_NAME_BYTES = 255
# nvidia-smi takes seconds where the driver has to be loaded first.
_TOOL_SECONDS = 20


def cores() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """NVIDIA GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name and name != "-1"]
    return [str(number) for number, _ in enumerate(_driver_gpus())]


def gpu_share() -> float:
    """Share of a GPU's memory that this process may use: less than 1 if other processes of the run use the same GPU."""
    return float(os.environ.get(GPU_SHARE, 1))


def processor() -> str:
    """Model of this machine's processor, with a hash of the features that the system reports."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    features = hashlib.sha256(" ".join(sorted(fields.get("flags", fields.get("Features", "")).split())).encode())
    name = fields.get("model name") or platform.processor() or platform.machine()
    return f"{name} ({features.hexdigest()[:8]})"


def gpus() -> list[str]:
    """Model names of the GPUs that the NVIDIA driver lists, then a line on which are visible; [] without a GPU.

    Needs no torch.
    """
    models = _driver_gpus()
    return [*models, f"visible: {os.environ.get('CUDA_VISIBLE_DEVICES', 'all')}"] if models else []


@cache
def _driver_gpus() -> tuple[str, ...]:
    """Model names of this machine's GPUs.

    WSL 2 and gVisor hide the driver's files; there its tool knows, and if that is missing the device files at least
    show the number of GPUs.
    """
    files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    if files:
        return tuple(line.partition(":")[2].strip() for file in files for line in file.read_text().splitlines()[:1])
    if (names := _ask_tool("name")) is not None:
        return names
    return tuple("NVIDIA GPU" for _ in Path("/dev").glob("nvidia[0-9]*"))


@cache
def gpu_driver() -> str:
    """Version of the NVIDIA driver; "" if it is not known."""
    file = Path("/proc/driver/nvidia/version")
    words = file.read_text().splitlines()[0].split() if file.exists() else _ask_tool("driver_version") or ()
    return next((word for word in words if re.fullmatch(r"\d+(\.\d+)+", word)), "")


def _ask_tool(what: str) -> tuple[str, ...] | None:
    """What the driver's tool says of each GPU; None if it says nothing."""
    if shutil.which("nvidia-smi") is not None:
        command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
        with suppress(OSError, subprocess.SubprocessError):
            answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TOOL_SECONDS)
            return tuple(filter(None, map(str.strip, answer.stdout.splitlines())))
    return None


def is_path(text: str) -> bool:
    """Whether a text can be a path on this machine: it has no NUL, no name of over 255 bytes, and can be encoded."""
    try:
        names = os.fsencode(text).split(os.fsencode(os.sep))
    except UnicodeEncodeError:
        return False
    return "\0" not in text and max(map(len, names)) <= MOST_NAME_BYTES


def package_version(package: str) -> str | None:
    """Version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def bound_heaps() -> None:
    """Have this process return freed memory: arrays of 2 MiB and more at once, of smaller ones all above 2 MiB a heap.

    By itself glibc raises these limits to the largest array that it has seen, up to 32 and 64 MiB, and keeps as much
    in the heap of each thread.  Other C libraries keep their settings.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 2 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 << 20)


def run_module(name: str, *arguments: str, given: bytes | None = None) -> tuple[bytes, str]:
    """Run a module in a process of its own.

    Args:
        name: full name of the module.
        arguments: arguments of its command line.
        given: bytes on its standard input.

    Returns:
        Its standard output, and a line on its failure; "" if it succeeded.
    """
    command = [sys.executable, "-m", name, *arguments]
    process = subprocess.run(command, input=given, capture_output=True, check=False)
    message = (process.stderr.decode(errors="replace").strip() or "no message").splitlines()[-1]
    return process.stdout, f"exit {process.returncode}: {message}" if process.returncode else ""


def resident_bytes() -> int:
    """Resident memory of this process now, in bytes."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """Largest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage may report the memory of the program that started this one.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
