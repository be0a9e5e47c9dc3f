"""Runs in processes of their own, which tests watch and kill."""

import subprocess
import sys
import tempfile
import time
from contextlib import suppress

import psutil

TINY_RUN = ["--backend", "torch", "--precision", "fp32", "--threads", "1", "--tile", "96", "--block", "64"]


def launch(path, model, *more):
    """``cellseg-batch run`` in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "cellseg_batch.engine.cli",
        "run",
        str(path),
        "--model",
        str(model),
        *TINY_RUN,
        *more,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_records(journal, count, process):
    while len(journal.numbers("blocks")) < count:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)


def kill_when(command, reached):
    """Run a command and kill it, so that nothing can be cleaned up, once ``reached()``."""
    process = subprocess.Popen(command)
    while not reached():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    process.kill()
    process.wait()


def watch(command, most_cpu_seconds, most_seconds, most_bytes):
    """Run a command, and kill it once it takes more; returns (exit code, what it printed, what it took too much of)."""
    excess, deadline = "", time.monotonic() + most_seconds
    with tempfile.TemporaryFile() as output:
        process = psutil.Popen([str(word) for word in command], stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None and not excess:
            time.sleep(0.02)
            with suppress(psutil.NoSuchProcess):
                family = [process, *process.children(recursive=True)]
                cpu_seconds = sum(sum(member.cpu_times()[:2]) for member in family)
                taken = sum(member.memory_info().rss for member in family)
                excess = (
                    (f"{cpu_seconds:.0f} s of CPU" if cpu_seconds > most_cpu_seconds else "")
                    or (f"{taken >> 20} MiB" if taken > most_bytes else "")
                    or (f"more than {most_seconds} s" if time.monotonic() > deadline else "")
                )
                for member in family if excess else ():
                    member.kill()
        code = process.wait()
        output.seek(0)
        return code, output.read().decode(errors="replace"), excess
