"""One image, one place: whatever name leads to an image, it has one output; no two images share one."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import zarr
from PIL import Image

from cellseg_batch.engine.reports.export_objects import export_objects
from cellseg_batch.engine.reports.preview import write_preview
from cellseg_batch.engine.reports.status import read_status
from cellseg_batch.engine.reports.verify import verify
from cellseg_batch.engine.run.places import Place, claim, place_below
from tests.support.images import blobs, fill_ome_zarr, labels_of, write_ome_zarr, write_plate


def picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(blobs(40, 40, 1, seed)[0]).save(path)
    return path


def states(report):
    return [slide.status for slide in report.slides]


@pytest.mark.parametrize("output", [False, True])
def test_two_images_of_one_stem_have_a_place_each_and_find_it_alone(tmp_path, segment, output):
    changes = {"output": tmp_path / "out"} if output else {}
    names = ["a.bmp", "a.png", "a.tif"]
    for seed, name in enumerate(names):
        picture(tmp_path / "in" / name, seed)
    write_ome_zarr(tmp_path / "in" / "a.zarr", blobs(40, 40), levels=1)
    together = segment(tmp_path / "in", probability=True, **changes)
    assert states(together) == ["done"] * 4
    assert len({path for slide in together.slides for path in slide.outputs.values()}) == 8
    for number, name in reversed(list(enumerate(names))):
        alone = segment(tmp_path / "in" / name, probability=True, **changes)
        assert (states(alone), alone.slides[0].labels) == (["skipped"], together.slides[number].labels)
        assert [
            status.path for status in read_status([tmp_path / "in" / name], "cellseg", changes.get("output")).slides
        ]


@pytest.mark.parametrize("output", [None, "out"])
def test_names_may_be_as_long_as_a_folder_takes(tmp_path, segment, output):
    output = output and tmp_path / output
    folder = tmp_path / "in"
    for seed, stem in enumerate(("a" * 250 + "x", "a" * 250 + "y", "細" * 83)):
        picture(folder / f"{stem}.png", seed)
    write_ome_zarr(folder / ("z" * 250 + ".zarr"), blobs(64, 64, 1), levels=1)
    report = segment(folder, output=output)
    assert states(report) == ["done"] * 4
    assert len({slide.labels for slide in report.slides}) == 4
    assert states(segment(folder, output=output)) == ["skipped"] * 4
    assert read_status([folder], "cellseg", output).counts == {"done": 4}
    assert verify([folder], "cellseg", output, 1).is_whole


def test_an_image_is_one_image_whichever_link_leads_to_it(tmp_path, segment):
    folder, links = tmp_path / "data", tmp_path / "links"
    picture(folder / "sub" / "a.png")
    write_ome_zarr(folder / "s.zarr", blobs(40, 40), levels=1)
    (folder / "sub" / "back").symlink_to("../../data")
    (folder / "sub" / "up").symlink_to("../..")
    links.mkdir()
    (links / "b.png").symlink_to("../data/sub/a.png")
    (links / "s.zarr").symlink_to("../data/s.zarr")
    first = segment(folder)
    assert (states(first), [slide.notes for slide in first.slides]) == (["done", "done"], [(), ()])
    for inputs in ([links], [links / "s.zarr", links / "b.png"], [folder / "s.zarr", folder]):
        assert states(segment(*inputs)) == ["skipped", "skipped"], inputs
    assert not list(links.glob("*.cellseg*")), "labels and journals lie beside the images themselves"
    again = segment(folder, links, folder / "sub")
    assert states(again) == ["skipped", "skipped"]
    assert "also named as links/b.png; it is taken once" in again.slides[1].notes
    (tmp_path / "twice").mkdir()
    for name in "ab":
        (tmp_path / "twice" / name).symlink_to("../data")
    twice = segment(tmp_path / "twice")
    assert [slide.notes for slide in twice.slides] == [("also below twice/b; it is taken once",)] * 2


def test_a_linked_file_keeps_the_suffix_of_its_name(tmp_path, segment):
    picture(tmp_path / "a.png").rename(tmp_path / "0123abcd")
    (tmp_path / "a.png").symlink_to("0123abcd")
    assert states(segment(tmp_path / "a.png")) == ["done"]
    assert states(segment(tmp_path)) == ["skipped"]


def test_a_well_that_is_listed_twice_is_taken_once(tmp_path, segment):
    plate = write_plate(tmp_path / "p.zarr", ["A/1", "A/2"], ["0"], side=32)
    group = zarr.open_group(str(plate), mode="r+")
    wells = group.attrs["ome"]["plate"]["wells"]
    group.attrs["ome"] = {**group.attrs["ome"], "plate": {**group.attrs["ome"]["plate"], "wells": [*wells, wells[0]]}}
    report = segment(plate, plate / "A" / "1")
    assert states(report) == ["done", "done"]
    assert any("taken once" in note for note in report.slides[0].notes)


def test_a_field_that_lies_in_another_store_has_one_journal(tmp_path, segment):
    write_plate(tmp_path / "p.zarr", ["A/1", "A/2"], ["0"], side=32)
    shutil.move(tmp_path / "p.zarr" / "A" / "2" / "0", tmp_path / "field.zarr")
    (tmp_path / "p.zarr" / "A" / "2" / "0").symlink_to("../../../field.zarr")
    assert states(segment(tmp_path / "p.zarr")) == ["done", "done"]
    assert states(segment(tmp_path / "field.zarr")) == ["skipped"]
    assert (tmp_path / "field.zarr.cellseg" / "labels" / "cellseg" / "finished.json").exists()


def test_below_output_every_command_meets_the_image_however_it_is_named(tmp_path, segment):
    folder, out = tmp_path / "in", tmp_path / "out"
    picture(folder / "sub" / "a.png")
    (folder / "sub" / "b.png").write_text("no picture")
    group = zarr.open_group(str(folder / "s.zarr"), mode="w", zarr_format=3)
    fill_ome_zarr(group.create_group("A/1"), None, blobs(32, 32), levels=1)
    report = segment(folder, output=out, objects=True)
    assert states(report) == ["done", "done", "failed"]
    for path in (folder / "sub" / "a.png", folder / "s.zarr" / "A", folder / "s.zarr" / "A" / "1"):
        assert states(segment(path, output=out, objects=True)) == ["skipped"]
        write_preview(path, tmp_path / "p.png", None, "cellseg", out, None, None)
        assert read_status([path], "cellseg", out).counts == {"done": 1}
        assert verify([path], "cellseg", out, 1).checked > 0
        assert export_objects([path], "csv", tmp_path / "o.csv", "cellseg", out, None).images == 1
    assert read_status([folder / "sub"], "cellseg", out).counts == {"done": 1, "failed": 1}
    picture(folder / "sub" / "b.png", seed=1)
    assert states(segment(folder / "sub" / "b.png", output=out, objects=True, retry_failed=True)) == ["done"]
    assert read_status([folder], "cellseg", out).counts == {"done": 3}
    assert sorted(path.name for path in out.iterdir()) == [".cellseg", "b.png", "b.png.cellseg", "in"]


def test_inputs_of_one_name_have_a_place_each_below_output(tmp_path, segment):
    first, second = picture(tmp_path / "x" / "a.png", 1), picture(tmp_path / "y" / "a.png", 2)
    together = segment(first, second, output=tmp_path / "out")
    assert states(together) == ["done", "done"]
    assert not np.array_equal(labels_of(together, 0), labels_of(together, 1))
    for number, path in ((1, second), (0, first)):
        alone = segment(path, output=tmp_path / "out")
        assert (states(alone), alone.slides[0].labels) == (["skipped"], together.slides[number].labels)


@pytest.mark.parametrize("moved", [("in", "out"), ("out",), ("in",)], ids="+".join)
def test_what_was_moved_is_still_finished(tmp_path, segment, moved):
    picture(tmp_path / "here" / "in" / "a.png")
    before = segment(tmp_path / "here" / "in", output=tmp_path / "here" / "out")
    for name in moved:
        (tmp_path / "there").mkdir(exist_ok=True)
        shutil.move(tmp_path / "here" / name, tmp_path / "there" / name)
    place = {name: tmp_path / ("there" if name in moved else "here") / name for name in ("in", "out")}
    after = segment(place["in"], output=place["out"])
    if moved == ("in",):  # an image of the same name at another place: nothing tells it from another image
        assert (states(after), after.slides[0].labels != before.slides[0].labels) == (["done"], True)
    else:
        assert states(after) == ["skipped"]
    assert states(segment(place["in"], output=place["out"])) == ["skipped"]


def test_of_runs_that_meet_an_image_for_the_first_time_one_gives_it_its_place(tmp_path):
    image = str(picture(tmp_path / "in" / "a.png"))
    names = ["in/a.png", "a.png", "a", "b"]
    together = Barrier(len(names))

    def settle(name):
        together.wait()
        while not claim(place := place_below(tmp_path / "out", image, name)):
            pass
        return place.store

    with ThreadPoolExecutor(len(names)) as pool:
        stores = set(pool.map(settle, names))
    assert len(stores) == 1
    owners = [json.loads(file.read_text()) for file in (tmp_path / "out").rglob("owner.json")]
    assert owners == [{"relative": "../in/a.png", "absolute": image}]
    (store,) = stores
    assert not claim(Place(store, str(tmp_path / "in" / "other.png"), tmp_path / "out", is_mirrored=True))


def test_parts_of_an_image_that_are_named_one_by_one_are_one_image(tmp_path, segment):
    group = zarr.open_group(str(tmp_path / "in" / "s.zarr"), mode="w", zarr_format=3)
    for name in ("0", "1"):
        fill_ome_zarr(group.create_group(name), None, blobs(32, 32), levels=1)
    (tmp_path / "in" / "s.zarr" / "2").symlink_to(".")
    inputs = [tmp_path / "in" / "s.zarr" / name for name in ("0", "1")]
    assert states(segment(*inputs, tmp_path / "in")) == ["done", "done"]
    (slide,) = segment(inputs[0]).slides
    assert (slide.notes, Path(slide.labels).is_relative_to(inputs[0])) == ((), True)
