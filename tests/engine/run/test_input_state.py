"""Finished means finished for these pixels: changed images are named, copied and touched ones are not."""

import os
import shutil

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

from cellseg_batch.engine.reports.verify import verify
from cellseg_batch.engine.run import input_state
from tests.support.images import blobs, labels_of, write_ome_zarr


def write_png(path, seed):
    Image.fromarray(blobs(40, 40, 1, seed)[0]).save(path)


def write_level(level, version="0.5"):
    """Write the pixels of one level anew; the others stay."""

    def write(path, seed):
        if not path.exists():
            write_ome_zarr(path, blobs(80, 80), version=version)
        zarr.open_array(str(path / str(level)), mode="r+")[...] = blobs(80 >> level, 80 >> level, 3, seed)

    return write


def write_second_file(path, seed):
    planes = {"first": blobs(40, 40, 1)[0], "second": blobs(40, 40, 1, seed)[0]}
    uuids = {name: f"urn:uuid:00000000-0000-0000-0000-00000000000{number}" for number, name in enumerate(planes)}
    data = "".join(
        f'<TiffData FirstT="{number}" IFD="0" PlaneCount="1"><UUID FileName="{name}.ome.tif">{uuid}</UUID></TiffData>'
        for number, (name, uuid) in enumerate(uuids.items())
    )
    for name, uuid in uuids.items():
        xml = (
            f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="{uuid}"><Image ID="Image:0">'
            '<Pixels ID="Pixels:0" DimensionOrder="XYTCZ" Type="uint8" SizeX="40" SizeY="40" SizeT="2" SizeC="1" '
            f'SizeZ="1"><Channel ID="Channel:0:0" SamplesPerPixel="1"/>{data}</Pixels></Image></OME>'
        )
        path.mkdir(exist_ok=True)
        file = path / f"{name}.ome.tif"
        if name == "second" or not file.exists():
            tifffile.imwrite(file, planes[name], description=xml, metadata=None)


def later(path):
    """Give every file a later time, as a copy does."""
    for file in [path, *path.rglob("*")]:
        os.utime(file, (2e9, 2e9))


@pytest.mark.parametrize(
    ("name", "write", "changes"),
    [
        ("a.png", write_png, {}),
        ("a.zarr", write_level(0), {}),
        ("b.zarr", write_level(0, "0.4"), {"objects": True}),
        ("c.zarr", write_level(1), {"level": 1}),
        ("parts", write_second_file, {}),
    ],
)
def test_a_changed_image_is_named_and_done_anew_when_asked(tmp_path, segment, command, name, write, changes):
    path = tmp_path / name
    write(path, 1)
    first = labels_of(segment(path, **changes))
    later(path)
    assert segment(path, **changes).slides[0].status == "skipped"
    assert verify([path], "cellseg", None, 1).changed == []
    write(path, 2)
    (slide,) = segment(path, **changes).slides
    assert (slide.status, "has changed since" in slide.reason, "`overwrite`" in slide.reason) == ("failed", True, True)
    assert verify([path], "cellseg", None, 1).changed == [slide.path]
    code, said = command("verify", path)
    assert (code, f"changed {slide.path}" in said) == (1, True)
    write(path, 1)
    assert segment(path, **changes).slides[0].status == "skipped", "restored"
    write(path, 2)
    anew = segment(path, overwrite=True, **changes)
    assert anew.slides[0].status == "done"
    assert not np.array_equal(labels_of(anew), first)
    assert segment(path, **changes).slides[0].status == "skipped"
    assert verify([path], "cellseg", None, 1).changed == []


def test_an_image_whose_files_are_as_they_were_is_not_read(tmp_path, segment, monkeypatch):
    write_png(tmp_path / "a.png", 1)
    segment(tmp_path)
    monkeypatch.setattr(input_state, "SlideReader", lambda *_: pytest.fail("no pixel is read"))
    assert segment(tmp_path).slides[0].status == "skipped"


def test_an_image_that_changes_before_it_is_finished_is_not_continued(tmp_path, segment):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(80, 80), levels=1)
    segment(path)
    (tmp_path / "a.zarr.cellseg" / "labels" / "cellseg" / "finished.json").unlink()
    write_ome_zarr(tmp_path / "new.zarr", blobs(80, 80, seed=1), levels=1)
    shutil.copytree(tmp_path / "new.zarr" / "0", path / "0", dirs_exist_ok=True)
    assert "has changed since" in segment(path).slides[0].reason
