"""What tests have processes do; it is imported in each of them, and cheap."""

import os
import signal
import threading
import time

from cellseg_batch.engine.scheduling import dask_pools as clusters
from cellseg_batch.engine.storage.journal import Journal

serve, record = clusters._serve, Journal.record


def die_of_thirteen(number):
    if number == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die_while_starting(place, started):
    os.kill(os.getpid(), signal.SIGKILL)


def live(task, started):
    """Leave a note of its birth and, if enough were stillborn before, one of its start."""
    folder, stillborn = task
    born = folder / f"{time.monotonic_ns()}.born"
    born.write_text(str(os.getpid()))
    if len(list(folder.glob("*.born"))) <= stillborn:
        os.kill(os.getpid(), signal.SIGKILL)
    started()
    born.rename(born.with_suffix(".started"))
    threading.Event().wait()


def records(folder):
    """How many tasks are journalled."""
    return len(list(folder.glob("*/**/*.json")))


def allow(folder, count):
    """Let a run journal so many tasks, and then wait."""
    partial = folder.with_suffix(".next")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(str(count))
    partial.rename(folder.with_suffix(".allowed"))


def record_slowly(journal, part, number, content):
    while records(journal.folder) >= int(journal.folder.with_suffix(".allowed").read_text()):
        time.sleep(0.01)
    record(journal, part, number, content)


def set_pace():
    """Have this process, and the worker processes that it starts, do no more than they are allowed to."""
    Journal.record = record_slowly
    clusters._serve = serve_slowly


def serve_slowly(place, started):
    set_pace()
    serve(place, started)
