"""PNG, JPEG and BMP files."""

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.slides.discover import find_images
from cellseg_batch.engine.slides.level_and_channels import choose_channels
from tests.support.slides import coordinates, only, read


@pytest.mark.parametrize(("mode", "axes", "rgb"), [("L", "yx", False), ("RGB", "yxc", True), ("RGBA", "yxc", True)])
def test_pictures(tmp_path, mode, axes, rgb):
    pixels = coordinates("yxc", (20, 30, len(mode)), "uint8")
    Image.fromarray(pixels if len(mode) > 1 else pixels[..., 0]).save(tmp_path / "a.png")
    slide = only(tmp_path / "a.png")
    assert (slide.axes, slide.rgb) == (axes, rgb)
    channels = choose_channels(slide, None).indices
    np.testing.assert_array_equal(
        read(slide, 0, channels, 0, Box(2, 3, 9, 9)), np.moveaxis(pixels, -1, 0)[: len(channels), 2:9, 3:9]
    )


@pytest.mark.parametrize(("channels", "axes"), [(1, "yx"), (2, "yx"), (3, "yxc"), (4, "yxc")])
def test_pngs_of_16_bits_keep_them(tmp_path, channels, axes):
    pixels = 300 * coordinates("yxc", (20, 30, channels), "uint16") % 60_000
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(pixels.squeeze()))
    slide = only(tmp_path / "a.png")
    assert (slide.axes, slide.dtype, slide.rgb, slide.alpha) == (axes, "uint16", channels > 2, channels == 4)
    kept = slide.extent("c", 0)
    got = read(slide, 0, tuple(range(kept)), 0, Box(2, 3, 9, 9))
    np.testing.assert_array_equal(got, np.moveaxis(pixels, -1, 0)[:kept, 2:9, 3:9])


@pytest.mark.parametrize(("mode", "rgb"), [("1", False), ("LA", False), ("P", True), ("CMYK", True)])
def test_pictures_of_other_kinds_become_grey_or_rgb(tmp_path, mode, rgb):
    picture = Image.fromarray(coordinates("yxc", (20, 30, 3), "uint8")).convert(mode)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    picture.save(path)
    assert (only(path).rgb, only(path).axes) == (rgb, "yxc" if rgb else "yx")


def test_bitmaps_are_read(tmp_path):
    pixels = coordinates("yx", (20, 30), "uint8")
    Image.fromarray(pixels).save(tmp_path / "a.bmp")
    np.testing.assert_array_equal(read(only(tmp_path / "a.bmp"), 0, (0,), 0, Box(0, 0, 20, 30))[0], pixels)


def test_other_frames_of_an_animation_are_named(tmp_path):
    frames = [Image.fromarray(np.full((8, 9), value, "uint8")) for value in (1, 2, 3)]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    first, others = find_images(tmp_path / "a.png")
    assert read(first, 0, (0,), 0, Box(0, 0, 1, 1)).item() == 1
    assert "2 more pictures" in others.reason


def test_pictures_have_the_axes_that_they_have(tmp_path):
    Image.fromarray(np.zeros((8, 9), "uint8")).save(tmp_path / "a.png")
    assert "`axes=cyx` was not applied" in only(tmp_path / "a.png", axes="cyx").notes[0]
    assert only(tmp_path / "a.png", axes="yx").axes == "yx"
