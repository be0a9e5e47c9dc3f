"""Jobs that take a part of the images each, by --shard, take every image once between them."""

import json

import pytest
from PIL import Image

from cellseg_batch.engine.errors import UsageError
from cellseg_batch.engine.reports.status import read_status
from tests.support.images import blobs, write_plate
from tests.support.processes import launch


def write_pictures(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.fromarray(blobs(40, 40, 1)[0]).save(folder / f"{name}.png")


def taken(report, folder):
    return {slide.path.removeprefix(f"{folder}/") for slide in report.slides}


def test_a_growing_folder_shifts_nothing_wherever_it_lies(tmp_path, segment):
    first, second = tmp_path / "a", tmp_path / "elsewhere" / "b"
    write_pictures(first / "day 1", range(12))
    parts = [taken(segment(first, shard=f"{number}/3", output=tmp_path / "out"), first) for number in range(3)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 12
    assert all(parts)
    write_pictures(second / "day 1", range(20))
    for number, part in enumerate(parts):
        assert part <= taken(segment(second, shard=f"{number}/3", output=tmp_path / "other"), second)


def test_a_part_without_images_is_done(tmp_path, command, tiny_model):
    write_pictures(tmp_path / "a", ["one"])
    model = ["--model", tiny_model, "--backend", "torch"]
    counts = []
    for number in range(3):
        report = tmp_path / f"{number}.json"
        assert command("run", tmp_path / "a", *model, "--shard", f"{number}/3", "--json", report)[0] == 0
        counts.append(len(json.loads(report.read_text())["slides"]))
    assert sorted(counts) == [0, 0, 1]


@pytest.mark.parametrize("shard", ["4/4", "1", "-1/4", "0/0", "a/b", ""])
def test_what_names_no_part_is_refused(tmp_path, segment, shard):
    write_pictures(tmp_path / "a", ["one"])
    with pytest.raises(UsageError, match="such as 0/4 to 3/4"):
        segment(tmp_path / "a", shard=shard)


def test_the_last_part_of_a_plate_summarises_all_of_it(tmp_path, segment):
    plate = write_plate(tmp_path / "plate.zarr", ["A/1", "A/2", "B/1"], "01", side=60)
    counts = [len(segment(plate, shard=f"{number}/2", objects=True).slides) for number in range(2)]
    assert sum(counts) == 6
    assert all(counts)
    (summary,) = segment(plate, shard="0/2", objects=True).plates
    assert (summary.wells, summary.fields, summary.failed) == (3, 6, 0)


@pytest.mark.slow
def test_four_jobs_at_once_segment_200_images_once_each(tmp_path, tiny_model):
    write_pictures(tmp_path / "a", range(200))
    jobs = [
        launch(
            tmp_path / "a", tiny_model, "--shard", f"{number}/4", "-o", str(tmp_path / "out"),
            "--json", str(tmp_path / f"{number}.json"),
        )
        for number in range(4)
    ]  # fmt: skip
    for job in jobs:
        output = job.communicate()[0]
        assert job.returncode == 0, output
    slides = [slide for number in range(4) for slide in json.loads((tmp_path / f"{number}.json").read_text())["slides"]]
    assert {slide["status"] for slide in slides} == {"done"}
    assert len(slides) == len({slide["path"] for slide in slides}) == 200
    assert read_status([tmp_path / "a"], "cellseg", tmp_path / "out").counts["done"] == 200
