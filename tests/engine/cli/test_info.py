"""Images as JSON: every key, what is unknown as null, and indices as names of channels that have none."""

import json

import numpy as np
import tifffile
import zarr

from cellseg_batch.engine.slides.formats import FORMATS
from tests.support.images import blobs, write_ome_zarr

KEYS = ["path", "series", "axes", "shape", "levels", "dtype", "channels", "rgb", "pixel_size_um", "reason", "notes"]


def listed(command, tmp_path, *arguments):
    code, output = command("info", *arguments, "--json", tmp_path / "info.json")
    return code, json.loads((tmp_path / "info.json").read_text())["images"], output


def test_an_image_is_described_with_its_levels(tmp_path, command):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(64, 48), levels=2)
    code, (image,), output = listed(command, tmp_path, path)
    assert code == 0
    assert list(image) == KEYS
    assert image["path"] == str(path)
    assert image["series"] is None
    assert (image["axes"], image["shape"]) == ("cyx", [3, 64, 48])
    assert image["levels"] == [[3, 64, 48], [3, 32, 24]]
    assert image["dtype"] == "uint8"
    assert "64 x 48, 32 x 24" in output


def test_help_names_every_format(command):
    code, said = command("info", "--help")
    named = {word.strip(".,;:()") for word in said.split()}
    titles = {title for image_format in FORMATS for title in image_format.title.split(", ") if title}
    assert (code, {title for title in titles if not {*title.split()} <= named}) == (0, set())


def test_series_of_a_tiff_are_counted(tmp_path, command):
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as file:
        for side in (40, 50):
            file.write(np.zeros((side, side), np.uint8), photometric="minisblack")
    code, images, _ = listed(command, tmp_path, tmp_path / "a.ome.tif")
    assert code == 0
    assert [(image["series"], image["shape"]) for image in images] == [(0, [40, 40]), (1, [50, 50])]
    assert images[0]["channels"] == ["0"]
    assert images[0]["pixel_size_um"] is None


def test_what_cannot_be_used_has_a_reason_in_flags(tmp_path, command):
    zarr.create_array(str(tmp_path / "a.zarr"), shape=(2, 3, 9, 9), dtype="uint8")
    path = write_ome_zarr(tmp_path / "b.zarr", blobs(64, 48), levels=1)
    code, (unusable, usable), output = listed(command, tmp_path, tmp_path / "a.zarr", path, "--level", 3)
    assert code == 1
    assert unusable == {
        **dict.fromkeys(KEYS),
        "path": str(tmp_path / "a.zarr"),
        "reason": unusable["reason"],
        "notes": [],
    }
    assert "--axes czyx" in unusable["reason"]
    assert usable["shape"] == [3, 64, 48]
    assert "found --level 3" in usable["reason"]
    assert "found --level 3" in output
    assert f"broken {tmp_path / 'a.zarr'}" in output
    assert f"refused {path}" in output


def test_a_single_level_is_taken_as_it_is_whatever_its_pixel_size(tmp_path, command):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((40, 50), np.uint8))
    output = command("info", tmp_path / "a.tif", "--pixel-size", 0.1)[1]
    assert "level 0 (the only one, not rescaled to the model's 0.5 µm/px)" in output
    assert "nearest" not in output


def test_notes_on_metadata_are_shown(tmp_path, command):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((9, 9), "uint8"), resolution=(1, 1), resolutionunit="MICROMETER")
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as tiff:
        tiff.pages[0].tags["XResolution"].overwrite((1, 0))
    code, (image,), output = listed(command, tmp_path, tmp_path / "a.tif")
    assert code == 0
    (note,) = image["notes"]
    assert "pixel size along x unknown" in note
    assert note in output


def test_blocks_are_those_of_the_machine(tmp_path, command, monkeypatch):
    path = write_ome_zarr(tmp_path / "a.zarr", np.zeros((1, 8192, 8192), np.uint8), levels=1, chunk=4096)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for models, blocks in ((), 30), (("A GPU",), 6):
        monkeypatch.setattr("cellseg_batch.engine.machine._driver_gpus", lambda models=models: models)
        assert f"{blocks} blocks, 30 tiles" in command("info", path)[1]
