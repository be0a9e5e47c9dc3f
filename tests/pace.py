"""Runs whose pace a test sets, so that it can interfere with them on however busy a machine; cheap to import."""

import time

from cellseg_batch.engine import clusters
from cellseg_batch.engine.journal import Journal

serve, record = clusters._serve, Journal.record


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
