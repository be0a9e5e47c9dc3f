"""Runs in processes of their own, which tests watch and kill."""

import subprocess
import sys
import time

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
