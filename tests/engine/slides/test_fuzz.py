"""Damaged files and stores: a run says what is wrong with them, and makes up no pixels.

The environment variable CELLSEG_FUZZ sets the number of mutations, else 200. A failure names each mutation by its
number, which is also its folder: ``python -m tests.support.mutations NUMBER FOLDER`` makes it again, for
``cellseg-batch run FOLDER``.
"""

import json
import math
import os
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import tifffile
import zarr
from PIL import Image

from tests.support.mutations import mutate
from tests.support.processes import TINY_RUN, watch

pytestmark = pytest.mark.slow

COUNT = int(os.environ.get("CELLSEG_FUZZ", "200"))
# Mutations that a process reads: starting it takes longer than reading them.
BATCH = 20
# A process takes about 8 s of CPU for a batch, so that one image that takes 20 s is noticed, however busy the machine.
MOST_CPU_SECONDS = 25
# For a process that waits and takes no CPU.
MOST_SECONDS = 300
MOST_BYTES = 2 << 30


@pytest.mark.parametrize("first", range(0, COUNT, BATCH))
def test_damaged_images_are_done_right_or_named(tmp_path, tiny_model, first):
    numbers = range(first, first + BATCH)
    faults = faults_of(tmp_path / "together", numbers, tiny_model)
    for number in numbers if faults else ():  # find out which of them it is
        faults += faults_of(tmp_path / f"alone-{number}", [number], tiny_model)
    assert not faults, "\n".join(faults)


def faults_of(folder, numbers, model):
    """What `info` and `run` do wrong with these mutations, each in a folder below ``folder``."""
    changes = {f"{folder / str(number)}/": mutate(number, folder / str(number)) for number in numbers}
    faults, listed = _call("info", folder, "--model", model)
    more, done = _call("run", folder, "--model", model, *TINY_RUN)
    about = {image["path"]: image for image in listed.get("images", ())}
    slides = done.get("slides", ())
    unnamed = [part for part in changes if not any(slide["path"].startswith(part) for slide in slides)]
    finished = [slide for slide in slides if slide["status"] == "done"]
    misread = [(slide["path"], fault) for slide in finished for fault in _misread(slide, about)]
    return [
        *(f"mutations {numbers}: {fault}" for fault in faults + more),
        *(f"{part} ({changes[part]}) is neither done nor named" for part in unnamed),
        *(f"{path} ({changes[part]}): {fault}" for path, fault in misread for part in changes if path.startswith(part)),
    ]


def _call(command, folder, *options):
    """(faults, report) of a command."""
    report = folder.with_name(f"{folder.name}-{command}.json")
    start = [sys.executable, "-m", "cellseg_batch.engine.cli", command, folder, "--json", report]
    code, said, excess = watch([*start, *options], MOST_CPU_SECONDS, MOST_SECONDS, MOST_BYTES)
    faults = [f"{command} took {excess}"] if excess else []
    if not excess and (code not in (0, 1, 2) or "Traceback" in said):
        faults.append(f"{command} ended with {code}: {said[-2000:]}")
    return faults, json.loads(report.read_text()) if report.exists() else {}


def _misread(slide, about):
    """How the shape of a slide that is done differs from the one that other readers see."""
    image = about.get(slide["path"], {"reason": "not listed by info"})
    if image["reason"]:
        yield f"done, but {image['reason']}"
        return
    level = image["levels"][slide["level"]]
    labels = [length for axis, length in zip(image["axes"], level, strict=True) if axis != "c"]
    if slide["shape"] != labels:
        yield f"labels of {slide['shape']} for pixels of {level}"
    shapes = [*_shapes(Path(slide["path"]), slide["level"])]
    if [length for length in level if length > 1] not in shapes:
        yield f"read as {level}; others see {shapes}"


def _shapes(path, level):
    """Shapes in which independent readers see a level of an image, without axes of length 1."""
    for shape in _zarr_shapes(path, level) if path.is_dir() else _file_shapes(path):
        yield [length for length in shape if length > 1]


def _zarr_shapes(path, level):
    node = zarr.open(path, mode="r", use_consolidated=False)
    if isinstance(node, zarr.Array):
        yield node.shape
    elif described := node.attrs.get("ome", node.attrs).get("multiscales"):
        paths = [dataset["path"] for dataset in described[0]["datasets"]]
        yield [node[path].shape for path in paths if path in node][level]
    else:  # a pyramid of arrays that nothing describes
        yield sorted((array.shape for _, array in node.arrays()), key=math.prod, reverse=True)[level]


def _file_shapes(path):
    file = path if path.is_file() else path.parent  # the number of a series follows the name of a file
    if file.suffix in (".png", ".jpg", ".bmp"):
        with Image.open(file) as picture:
            yield from ((picture.height, picture.width, *samples) for samples in ((), (3,), (4,)))
        return
    companions = [{"omexml": companion.read_text("utf-8")} for companion in file.parent.glob("*.companion.ome")]
    # As described by OME-XML, or by the pages where these do not fit.
    for options in ({}, {"is_ome": False}, *companions):
        with suppress(Exception), tifffile.TiffFile(file, **options) as tiff:
            yield from [found.shape for series in tiff.series for found in series.levels]
