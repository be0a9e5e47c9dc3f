"""Every preset trains on real images, and what it makes segments a real slide."""

import csv

import pytest

from cellseg_batch.trainer.bundle import load_bundle
from cellseg_batch.trainer.recipe import list_presets, load_preset

pytestmark = pytest.mark.slow

TRAIN, VAL = 6, 2


@pytest.fixture(scope="module")
def few_images(data_folder, tmp_path_factory):
    """Folder pairs of a few images: ``few_images(preset)`` gives those that the preset is meant for."""

    def few(preset):
        source = data_folder / ("livecell" if "livecell" in preset else "dsb2018")
        folder = tmp_path_factory.mktemp(preset)
        for part in ("images", "labels"):
            (folder / part).symlink_to(source / part)
        with open(source / "index.csv", newline="") as stream:
            rows = sorted(csv.DictReader(stream), key=lambda row: int(row["height"]) * int(row["width"]))
        with open(folder / "index.csv", "w", newline="") as stream:
            writer = csv.DictWriter(stream, ["id", "split"])
            writer.writeheader()
            for number, row in enumerate(rows[: TRAIN + VAL]):
                writer.writerow({"id": row["id"], "split": "train" if number < TRAIN else "val"})
        return folder

    return few


# Classes are trained in test_classes.
@pytest.mark.parametrize("preset", sorted({*list_presets()} - {"classes"}))
def test_a_preset_trains_and_its_bundle_runs(preset, few_images, data_folder, tmp_path, command, segment):
    arguments = ["--preset", preset, "--encoder-weights", "none", "--max-steps", 2, "--batch", 2, "--size", 256]
    code, output = command("train", few_images(preset), *arguments, "--out", tmp_path / "b")
    assert code == 0, output
    card = load_bundle(tmp_path / "b").card
    assert card.architecture == load_preset(preset).architecture
    slide = data_folder / "slides" / "fluo" / "neubias_xy_8bit__nuclei_PLK1_control.tif"
    report = segment(slide, model=str(tmp_path / "b"), tile=512, output=tmp_path / "out")
    assert report.status == "done", report.slides[0].reason
