"""What a run says of itself while it goes on."""

import io
import os
import re
import subprocess
import sys

import pytest
from rich.console import Console

from cellseg_batch.engine.cli.progress import RunProgress
from cellseg_batch.engine.run.campaign import run
from cellseg_batch.engine.settings import Settings
from tests.support.images import blobs, write_ome_zarr

FLAGS = ["--backend", "torch", "--precision", "fp32", "--threads", "1"]


class Drawn(RunProgress):
    """A progress bar that is drawn after each task, and not only ten times a second."""

    def advanced(self, task):
        super().advanced(task)
        self._bar.refresh()


def test_the_bar_runs_forward_to_its_end_however_large_the_images_are(tmp_path, tiny_model):
    for name, side in (("a", 100), ("b", 500), ("c", 300)):
        write_ome_zarr(tmp_path / f"{name}.zarr", blobs(side, side), levels=1)
    settings = Settings(model=str(tiny_model), backend="torch", precision="fp32", threads=1, tile=96, block=128)
    run([tmp_path / "c.zarr"], settings, Drawn(Console(file=io.StringIO()), 0))
    screen = Console(file=io.StringIO(), force_terminal=True, width=80)
    with Drawn(screen, 0) as progress:
        run([tmp_path], settings, progress)
    shown = list(map(int, re.findall(r"(\d+) %", re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", screen.file.getvalue()))))
    assert len(set(shown)) > 10
    assert shown == sorted(shown)
    assert shown[-1] == 100, "the finished image is no part of the bar"


def test_compiling_is_said_once_and_only_where_there_is_something_to_compile(tmp_path, tiny_model):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(100, 100), levels=1)
    line = [sys.executable, "-m", "cellseg_batch.engine.cli", "run", path, "--model", tiny_model, *FLAGS]
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "kernels")}
    said = [
        subprocess.check_output([*map(str, line), "--probability", "--overwrite"], text=True, env=environment)
        for _ in range(2)
    ]
    assert [text.count("compiling what this run needs") for text in said] == [1, 0]
    assert all("1 done" in text for text in said)


@pytest.mark.parametrize("below", ["", "deeper/out"])
def test_an_output_that_cannot_be_a_folder_is_refused_before_any_work(tmp_path, refusal, below):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(100, 100), levels=1)
    (tmp_path / "file").touch()
    line = refusal("run", path, "--output", tmp_path / "file" / below)
    assert f"found {tmp_path}/file, which is no folder" in line


def test_a_run_without_slides_says_what_it_lacks(refusal):
    assert refusal("run").startswith("error  SLIDES: expected a slide, a store or a folder of them, found none")
