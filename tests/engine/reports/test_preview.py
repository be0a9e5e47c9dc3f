"""Pictures of slides with the outlines of their labels."""

import shutil

import numpy as np
import pytest
import zarr
from PIL import Image

from cellseg_batch.trainer.outlines import outlined
from tests.support.convolutions import write_convolution
from tests.support.images import blobs, fill_ome_zarr, labels_of, write_ome_zarr


def discs(height, width, step=50, radius=18):
    """Labels of a grid of discs, each ``step`` px from the next."""
    y, x = np.mgrid[:height, :width]
    inside = (y % step - step // 2) ** 2 + (x % step - step // 2) ** 2 < radius**2
    return (inside * (1 + y // step * 1000 + x // step)).astype(np.uint32)


def slide(path, labels, levels, channels=1):
    """An image in which objects are bright, with its labels in place."""
    pixels = np.where(labels > 0, 150, 30).astype(np.uint8)[None].repeat(channels, 0)
    write_ome_zarr(path, pixels, levels=levels)
    group = zarr.open_group(str(path), mode="r+").require_group("labels/cellseg")
    fill_ome_zarr(group, path, labels, axes="yx", levels=levels)
    return path


@pytest.mark.parametrize("ground", [0, 60, 128, 220, 255])
def test_outlines_stand_out_from_any_ground_and_keep_touching_objects_apart(ground):
    labels = np.zeros((40, 60), np.uint16)
    labels[8:32, 8:28], labels[8:32, 28:50] = 1, 2
    picture = np.full((40, 60, 3), ground, np.uint8)
    drawn = outlined(picture, labels).astype(int)
    row = drawn[20]
    line = (row == (255, 230, 0)).all(-1)
    assert np.flatnonzero(line).tolist() == [7, 8, 27, 28, 49, 50]  # two px on each border
    assert (row[[6, 51]] == 0).all()  # and a dark edge around
    assert (row[~line & (np.arange(60) != 6) & (np.arange(60) != 51)] == ground).all()
    assert max(np.ptp([row[7], row[5]], axis=0).max(), np.ptp([row[6], row[5]], axis=0).max()) >= 128


def test_a_part_at_full_resolution_is_shown_beside_an_overview_that_has_no_room_for_outlines(tmp_path, command):
    labels = np.zeros((1000, 3300), np.uint32)
    labels[300:900, 2000:2600] = discs(600, 600, step=20, radius=6)
    labels[100:250, 100:250] = 90_000  # one large object is not many
    path = slide(tmp_path / "a.zarr", labels, 1)
    code, printed = command("preview", path, "--out", tmp_path / "x.png")
    assert code == 0, printed
    picture = np.asarray(Image.open(tmp_path / "x.png")).astype(int)
    y0, x0, y1, x1 = map(int, printed.rsplit(": ", 1)[1].split(","))
    assert (y1 - y0, x1 - x0) == (800, 800)
    assert y0 <= 303
    assert y1 >= 890
    assert x0 <= 2003
    assert x1 >= 2590
    overview, detail = picture[:333, :1100], picture[:, -1600:]
    assert (overview[round(y0 / 3) + 1 : round(y1 / 3) - 1, round(x0 / 3) + 1] == 255).mean() > 0.9  # the frame
    assert (detail == (255, 230, 0)).all(-1).any()
    assert not (overview == (255, 230, 0)).all(-1).any()  # tinted only


@pytest.mark.parametrize(
    ("shape", "levels", "box", "expected", "zoom"),
    [
        ((400, 600), 1, None, (800, 1200), 2),  # a small image is enlarged
        ((2000, 3000), 3, None, (1000, 1500), 0.5),  # a large one is shown at a lower level
        ((2000, 3300), 1, None, (666, 1100), 1 / 3),  # or thinned where it has none
        ((2000, 3000), 2, (100, 200, 140, 280), (800, 1600), 20),  # a box
    ],
)
def test_a_picture_is_about_as_wide_as_a_screen(tmp_path, command, shape, levels, box, expected, zoom):
    path = slide(tmp_path / "a.zarr", discs(*shape), levels)
    place = ["--box", ",".join(map(str, box))] if box else []
    code, printed = command("preview", path, "--out", tmp_path / "x.png", *place)
    assert code == 0, printed
    picture = np.asarray(Image.open(tmp_path / "x.png")).astype(int)
    assert picture.shape == (*expected, 3)
    y0, x0 = box[:2] if box else (0, 0)
    centres = [(y, x) for y in range(25, shape[0], 50) for x in range(25, shape[1], 50)]
    places = [(round((y - y0 + 0.5) * zoom), round((x - x0 + 0.5) * zoom)) for y, x in centres]
    seen = [picture[place] for place in places if 0 <= place[0] < expected[0] and 0 <= place[1] < expected[1]]
    assert len(seen) >= 1
    assert np.ptp(seen, axis=0).max() == 0  # every centre shows the inside of an object
    yellow = (picture[..., 0] > picture[..., 2] + 50).mean()
    assert 0.002 < yellow < 0.3


def test_infinite_pixels_do_not_hide_the_others(tmp_path, command):
    pixels = np.tile(np.linspace(100, 200, 64, dtype=np.float32), (1, 64, 1))
    write_ome_zarr(tmp_path / "a.zarr", pixels, levels=1)
    fill_ome_zarr(
        zarr.open_group(str(tmp_path / "a.zarr"), mode="r+").require_group("labels/cellseg"),
        tmp_path / "a.zarr",
        np.zeros((64, 64), np.uint8),
        axes="yx",
        levels=1,
    )
    array = zarr.open_array(str(tmp_path / "a.zarr" / "0"), mode="r+")
    array[0, 3], array[0, 7], array[0, 11] = np.inf, -np.inf, np.nan
    code, printed = command("preview", tmp_path / "a.zarr", "--out", tmp_path / "x.png")
    assert code == 0, printed
    picture = np.asarray(Image.open(tmp_path / "x.png"))[..., 0]
    row = picture[picture.shape[0] // 2]
    assert row[0] < 5
    assert row[-1] > 250
    assert len(np.unique(row)) == 64


def test_preview_refuses_what_it_cannot_show(tmp_path, command):
    path = slide(tmp_path / "a.zarr", discs(100, 100), 1)
    for arguments, message in (
        (("--box", "1,2,3"), "four numbers"),
        (("--box", "5,5,5,9"), "empty or sticks out"),
        (("--box", "0,0,100,101"), "empty or sticks out"),
        (("--name", "other"), "expected an image that cellseg-batch has written"),
    ):
        code, printed = command("preview", path, "--out", tmp_path / "x.png", *arguments)
        assert code
        assert message in printed
    assert not (tmp_path / "x.png").exists()
    code, printed = command("preview", path, "--out", tmp_path / "nowhere" / "x.png")
    assert code == 2
    assert "no such folder" in printed
    assert command("preview", path, "--out", tmp_path / "x.png")[1].startswith(f"{tmp_path / 'x.png'}: {path}, ")


def test_labels_without_their_finest_level_are_not_drawn_as_if_they_were_whole(tmp_path, command):
    path = slide(tmp_path / "a.zarr", discs(100, 100), 2)
    shutil.rmtree(path / "labels" / "cellseg" / "0")
    code, printed = command("preview", path, "--out", tmp_path / "x.png")
    assert code == 1
    assert "found one without its level 0" in printed


def test_classes_are_tinted_in_their_colours(tmp_path, segment, command):
    model = write_convolution(tmp_path, "classes")
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(120, 100, 1), levels=1)
    labels = labels_of(segment(path, model=str(model), backend="onnxruntime", margin=16))
    code, said = command("preview", path, "--out", tmp_path / "p.png")
    assert code == 0, said
    picture = np.asarray(Image.open(tmp_path / "p.png")).astype(int)
    enlarged = picture.shape[0] // 120
    red, _, blue = np.moveaxis(picture[enlarged // 2 :: enlarged, enlarged // 2 :: enlarged], -1, 0)
    for value, is_more_red in ((0, 0), (1, 1), (2, -1)):
        assert (np.sign(red - blue)[labels == value] == is_more_red).all(), value


def test_a_preview_of_several_images_says_which_it_shows(tmp_path, command):
    for name in ("a", "b"):
        slide(tmp_path / "slides" / f"{name}.zarr", discs(60, 60), 1)
    code, printed = command("preview", tmp_path / "slides", "--out", tmp_path / "x.png")
    assert code == 0, printed
    assert f"{tmp_path}/slides/a.zarr (the first of 2 images), " in printed
