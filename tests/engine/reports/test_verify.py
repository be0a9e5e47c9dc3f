"""A flipped bit, a lost file and a lost record are found, named, and made good by the next run."""

import json
import shutil

import numpy as np
import pytest
import zarr

from cellseg_batch.engine.reports.verify import verify
from tests.support.images import blobs, labels_of, write_ome_zarr


@pytest.fixture
def done(tmp_path, segment):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(300, 260))
    return path, segment(path, probability=True)


def shards(path, level=0):
    return sorted(one for one in (path / "labels" / "cellseg" / str(level) / "c").rglob("*") if one.is_file())


def test_a_whole_output_is_whole(done, command, tmp_path):
    path, report = done
    verdict = verify([path], "cellseg", None, 2)
    assert verdict.damages == []
    assert verdict.checked > report.slides[0].blocks, "the pyramid is checked too"
    code, said = command("verify", path, "--json", tmp_path / "verdict.json")
    assert code == 0
    assert "0 damaged" in said
    assert json.loads((tmp_path / "verdict.json").read_text())["status"] == "whole"


def test_of_many_damaged_blocks_the_first_are_printed(tmp_path, segment, command):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(300, 260))
    segment(path, block=16)
    shutil.rmtree(path / "labels")
    code, said = command("verify", path, "--json", tmp_path / "verdict.json")
    assert code == 1
    damages = json.loads((tmp_path / "verdict.json").read_text())["damages"]
    assert len(damages) > said.count(f"damaged {path}") == 11
    assert f": {len(damages) - 10} more; --json lists them all" in said
    assert f"read back, {len(damages)} damaged" in said


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "zero"])
def test_damage_is_named_and_made_good(tmp_path, segment, command, version, harm):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(300, 260), version=version)
    expected = labels_of(segment(path))
    folder = path / "labels" / "cellseg" / "0"
    victim = sorted(one for one in folder.rglob("*") if one.is_file() and not one.name.startswith((".z", "zarr")))[1]
    content = bytearray(victim.read_bytes())
    if harm == "flip":
        content[len(content) // 3] ^= 16
    if harm == "zero":
        zarr.open_array(str(folder), mode="r+")[10:20, 200:260] ^= 1
    elif harm == "remove":
        victim.unlink()
    else:
        victim.write_bytes(content[: len(content) // 2] if harm == "truncate" else content)
    code, said = command("verify", path)
    assert code == 1
    assert "damaged" in said
    assert "labels/cellseg/0, plane 0" in said
    assert segment(path).status == "skipped", "nothing is forgotten unless asked for"
    command("verify", path, "--forget")
    again = segment(path)
    assert again.status == "done"
    np.testing.assert_array_equal(labels_of(again), expected)
    assert command("verify", path)[0] == 0


def test_damage_in_the_pyramid_and_the_probability(done):
    path, _ = done
    shards(path, 1)[0].write_bytes(b"")
    probability = path.with_name("a.cellseg.zarr") / "cellseg_probability" / "0"
    next(one for one in (probability / "c").rglob("*") if one.is_file()).unlink()
    damages = verify([path], "cellseg", None, 2).damages
    assert {(one.part, one.reason.split("/")[0]) for one in damages} == {
        ("levels/1", "labels"),
        ("blocks", "cellseg_probability"),
    }


def test_a_lost_record_is_missed(done):
    path, _ = done
    next((path.with_name("a.zarr.cellseg")).rglob("blocks/0/1.json")).unlink()
    (damage,) = verify([path], "cellseg", None, 1).damages
    assert (damage.part, damage.number) == ("blocks", 1)


@pytest.mark.usefixtures("done")
def test_a_store_that_was_moved_with_its_journal_is_still_checked(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for one in tmp_path.glob("a.*"):
        one.rename(tmp_path / "elsewhere" / one.name)
    moved = tmp_path / "elsewhere" / "a.zarr"
    assert verify([moved], "cellseg", None, 2).damages == []
    shards(moved)[0].unlink()
    assert len(verify([moved], "cellseg", None, 2).damages) == 1
