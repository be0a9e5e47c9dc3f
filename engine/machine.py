"""What this machine is, what this process may use and has used (cores, memory), and modules run in another one."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """NVIDIA GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name and name != "-1"]
    return [str(number) for number, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]


def processor() -> str:
    """Model of this machine's processor, with a hash of the features that the system reports."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    features = hashlib.sha256(" ".join(sorted(fields.get("flags", fields.get("Features", "")).split())).encode())
    name = fields.get("model name") or platform.processor() or platform.machine()
    return f"{name} ({features.hexdigest()[:8]})"


def gpus() -> list[str]:
    """What the NVIDIA driver says of its GPUs, and which of them are visible; [] without one.  Needs no torch."""
    models = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    gpu_names = [line.partition(":")[2].strip() for path in models for line in path.read_text().splitlines()[:1]]
    return [*gpu_names, f"visible: {os.environ.get('CUDA_VISIBLE_DEVICES', 'all')}"] if gpu_names else []


def package_version(package: str) -> str | None:
    """Version of an installed package; None if it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def bound_heaps() -> None:
    """Have freed memory of this process given back: arrays of 2 MiB and more at once, smaller ones above that a heap.

    Left alone, glibc raises these limits to the largest array that it has seen, up to 32 and 64 MiB, and keeps as much
    in the heap of each thread. Other C libraries are left as they are.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 2 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 << 20)


def run_module(name: str, *arguments: str, given: bytes | None = None) -> tuple[bytes, str]:
    """What a module prints in a process of its own, and how that failed; "" if it did not.

    Args:
        name: of the module.
        arguments: of its command line.
        given: what it reads.
    """
    command = [sys.executable, "-m", name, *arguments]
    done = subprocess.run(command, input=given, capture_output=True, check=False)
    words = (done.stderr.decode(errors="replace").strip() or "no message").splitlines()[-1]
    return done.stdout, f"exit {done.returncode}: {words}" if done.returncode else ""


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """Largest resident memory of this process so far."""
    about = Path("/proc/self/status")
    if about.exists():
        # What getrusage says may be the memory of the program that started this one.
        for line in about.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
