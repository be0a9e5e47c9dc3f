"""A CSV file lists the slides of a run, and what each of them asks for."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tifffile

from cellseg_batch import segment
from cellseg_batch.engine.errors import UsageError
from tests.support.images import blobs, labels_of, write_ome_zarr

SETTINGS = {"backend": "torch", "precision": "fp32", "tile": 96, "block": 128, "threads": 1}


def decisions(report, index):
    labels = report.slides[index].labels
    store, _, inside = labels.partition(".zarr/")
    return json.loads(Path(f"{store}.zarr.cellseg/{inside}/manifest.json").read_text())["decisions"]


def test_each_row_has_its_own_level_channel_and_pixel_size(tmp_path, tiny_model):
    names = [{"label": name} for name in ("actin", "DAPI", "tubulin")]
    for name in "abc":
        write_ome_zarr(tmp_path / "slides" / f"{name}.zarr", blobs(200, 220), channels=names)
    rows = ["path,channel,pixel_size,level", "slides/a.zarr,tubulin,0.25,", "slides/c.zarr,,,1", "slides/b.zarr,0,,0"]
    (tmp_path / "list.csv").write_text("\ufeff" + "\r\n".join(rows) + "\r\n")
    report = segment(manifest=tmp_path / "list.csv", model=tiny_model, pixel_size=0.5, **SETTINGS)
    assert [slide.path.rpartition("/")[2] for slide in report.slides] == ["a.zarr", "c.zarr", "b.zarr"]
    assert [slide.channels for slide in report.slides] == [("tubulin",), ("DAPI",), ("actin",)]
    assert [slide.level for slide in report.slides] == [1, 1, 0]
    assert [slide.pixel_size_um for slide in report.slides] == [0.5, 1, 0.5]
    path = tmp_path / "slides" / "a.zarr"
    alone = segment(path, model=tiny_model, pixel_size=0.25, channel="tubulin", name="alone", **SETTINGS)
    np.testing.assert_array_equal(labels_of(report), labels_of(alone))
    assert decisions(report, 0) == decisions(alone, 0)
    again = segment(manifest=tmp_path / "list.csv", model=tiny_model, pixel_size=0.5, **SETTINGS)
    assert {slide.status for slide in again.slides} == {"skipped"}


def test_bad_rows_refuse_the_whole_run_and_are_all_named(tmp_path, tiny_model, command):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(100, 100))
    (tmp_path / "broken.tif").write_bytes(b"no image")
    rows = {
        "path,pixel_size,channel,level": "",
        "a.zarr,0.5,,": "",
        "broken.tif,,,": "",
        "b.zarr,,,": "line 4: .*b.zarr: expected a file, a zarr store or a folder, found nothing",
        'a.zarr,"0,5",,': "line 5: pixel_size: expected µm per px above 0, such as 0.25, found 0,5",
        "./a.zarr,nan,,": "line 6: pixel_size: expected",
        ",0.5,,": "line 7: no path",
        "a.zarr,,,-1": "line 8: level: expected 0",
        "a.zarr,,,0,more": "line 9: more cells than columns",
    }
    (tmp_path / "list.csv").write_text("\n".join(rows))
    with pytest.raises(UsageError) as refused:
        segment(manifest=tmp_path / "list.csv", model=tiny_model, **SETTINGS)
    assert re.search(".*; ".join(filter(None, rows.values())), str(refused.value))
    later = ["path,pixel_size,channel,level", "a.zarr,0.5,,", "broken.tif,,,", "b.zarr,,,", "./a.zarr,,,", "a.zarr,,x,"]
    (tmp_path / "list.csv").write_text("\n".join([*later, "a.zarr,,,7"]))
    code, output = command("run", "--manifest", tmp_path / "list.csv", "--model", tiny_model)
    assert code == 2
    for words in ("line 4: ", "line 5: a.zarr is listed in line 2 already", "line 6: ", "line 7: ", "--level 7"):
        assert words in output
    assert "line 2:" not in output
    assert "line 3:" not in output
    assert not (tmp_path / "a.zarr.cellseg").exists()
    (tmp_path / "list.csv").write_text("\n".join(later[:3]))
    code, output = command(
        "run", "--manifest", tmp_path / "list.csv", "--model", tiny_model, "--backend", "torch", "--no-gate"
    )
    assert (code, "1 done, 1 failed" in output) == (1, True)
    for arguments in ([path, "--manifest", tmp_path / "list.csv"], []):
        code, output = command("run", *arguments)
        assert (code, "leave one out" in output or "or a file that lists them" in output) == (2, True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "found an empty file"),
        ("slide\na.zarr\n", "found slide"),
        ("path;level\na.zarr;0\n", "with commas between them, found path;level"),
        ("path,mpp\na.zarr,0.5\n", "found path,mpp"),
        ("path,path\na.zarr,a.zarr\n", "found path,path"),
        ("path\n", "at least one row"),
        (b"path\n\xff\n", "a CSV file in UTF-8"),
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path, tiny_model, text, words):
    (tmp_path / "list.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=words):
        segment(manifest=tmp_path / "list.csv", model=tiny_model)


@pytest.mark.slow
def test_a_thousand_rows_with_their_own_pixel_sizes(tmp_path, tiny_model):
    rows = ["path,pixel_size"]
    for number in range(1000):
        tifffile.imwrite(tmp_path / f"{number}.tif", blobs(40, 40, 1, seed=number)[0])
        rows.append(f"{number}.tif,{0.2 + number / 1000:.3f}")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    report = segment(manifest=tmp_path / "list.csv", model=tiny_model, output=tmp_path / "out", **SETTINGS)
    assert {slide.status for slide in report.slides} == {"done"}
    assert [slide.pixel_size_um for slide in report.slides] == [round(0.2 + n / 1000, 3) for n in range(1000)]
