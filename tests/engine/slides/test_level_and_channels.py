"""Which level and channels are processed."""

import pytest

from cellseg_batch.engine.errors import SlideError
from cellseg_batch.engine.slides.level_and_channels import choose_channels, choose_level
from tests.support.images import write_ome_zarr
from tests.support.slides import coordinates, only


@pytest.mark.parametrize(
    ("labels", "asked", "expected"),
    [
        (["actin", "DAPI"], None, (1,)),
        (["GFP", "Hoechst 33342"], None, (1,)),
        (["a", "b"], None, (0,)),
        (["a", "b"], "B", (1,)),
        (["a", "b"], "1", (1,)),
        (["a", "b"], 1, (1,)),
        (["R", "G", "B"], None, (0, 1, 2)),
        (["R", "G", "B"], "g", (1,)),
        (["561", "405"], "405", (1,)),
        (["0", "1", "2"], "1", (1,)),
        (["1", "2", "3"], "3", (2,)),
        (["1", "2", "3"], "0", (0,)),
        (["1", "2", "3"], "01", (1,)),
        (["1", "2", "3"], 1, (1,)),
        (["dna", "DNA"], "DNA", (1,)),
    ],
)
def test_channel_rule(tmp_path, labels, asked, expected):
    pixels = coordinates("cyx", (len(labels), 16, 16))
    path = write_ome_zarr(tmp_path / "a.zarr", pixels, channels=[{"label": label} for label in labels])
    assert choose_channels(only(path), asked).indices == expected


@pytest.mark.parametrize(
    ("labels", "asked", "meanings", "remedy"),
    [
        (["1", "2", "3"], "1", "index 0 (1) and index 1 (2)", "00"),
        (["1", "", ""], "1", "index 0 (1) and index 1 ()", "00"),
        (["DAPI", "GFP", "DAPI"], "DAPI", "index 0 (DAPI) and index 2 (DAPI)", "00"),
        (["a", "Dapi", "dapi"], "DAPI", "index 1 (Dapi) and index 2 (dapi)", "01"),
    ],
)
def test_what_means_several_channels_is_refused_with_all(tmp_path, labels, asked, meanings, remedy):
    pixels = coordinates("cyx", (len(labels), 16, 16))
    slide = only(write_ome_zarr(tmp_path / "a.zarr", pixels, channels=[{"label": label} for label in labels]))
    with pytest.raises(SlideError) as error:
        choose_channels(slide, asked)
    assert f"`channel={asked}`, which means {meanings}; " in str(error.value)
    assert f"`channel={remedy}`" in str(error.value)


def test_unknown_channels_and_levels_are_refused(tmp_path):
    slide = only(write_ome_zarr(tmp_path / "a.zarr", coordinates("cyx", (2, 16, 16))))
    with pytest.raises(SlideError, match="`channel=7`"):
        choose_channels(slide, "7")
    with pytest.raises(SlideError, match="`level=5`"):
        choose_level(slide, 5, None, None)


def test_level_nearest_the_models_pixel_size(tmp_path):
    slide = only(write_ome_zarr(tmp_path / "a.zarr", coordinates("cyx", (1, 64, 64)), levels=4, um=0.1))
    assert choose_level(slide, None, None, 0.5).level == 2
    assert choose_level(slide, None, 0.5, 0.5).level == 0
    assert choose_level(slide, 3, None, 0.5).level == 3
    assert choose_level(slide, None, None, None).level == 0
