"""Pictures of slides with the outlines of their labels."""

import numpy as np
import pytest
import zarr
from PIL import Image

from cellseg_batch.trainer.outlines import outlined
from tests.support.images import fill_ome_zarr, write_ome_zarr


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


def test_outlines_lie_inside_and_keep_touching_objects_apart():
    labels = np.zeros((30, 40), np.uint16)
    labels[5:25, 5:20], labels[5:25, 20:35] = 1, 2
    drawn = outlined(np.full((30, 40, 3), 60, np.uint8), labels)
    changed = (drawn != 60).any(-1)
    assert not changed[labels == 0].any()
    assert changed[5:25, 19:21].all()
    assert not changed[6:24, 6:19].any()
    bright = outlined(np.full((30, 40, 3), 220, np.uint8), labels)
    assert (bright[changed] != drawn[changed]).all()
    stained = outlined(np.where(labels > 0, 60, 220).astype(np.uint8)[..., None].repeat(3, -1), labels)
    np.testing.assert_array_equal(stained[changed], drawn[changed])


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
