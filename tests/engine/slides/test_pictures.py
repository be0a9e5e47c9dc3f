"""PNG, JPEG and BMP files."""

import imagecodecs
import numpy as np
import pytest
import tifffile
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


COLOURS = 8 * np.stack([*np.mgrid[:20, :30], np.full((20, 30), 9)], -1).astype("uint8")
GREY, ALPHA = COLOURS[..., 0], COLOURS[..., 1]


@pytest.mark.parametrize("suffix", ["png", "bmp"])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("1", (GREY > 99) * np.uint8(255)),
        ("P", COLOURS // 64 * 64),
        ("RGBA", COLOURS),
    ],
)
def test_bilevel_indexed_and_transparent_pictures_have_the_pixels_that_one_sees(tmp_path, suffix, kind, expected):
    if kind == "RGBA":
        picture = Image.fromarray(np.dstack([COLOURS, ALPHA]))
    else:
        picture = Image.fromarray(expected).convert(kind, palette=Image.Palette.ADAPTIVE)
    picture.save(tmp_path / f"a.{suffix}")
    check(tmp_path / f"a.{suffix}", expected)


def check(path, expected, tolerance=0):
    """Hold the channels that are segmented by default, grey or red, green, blue, against ``expected``."""
    slide = only(path)
    assert slide.rgb == (expected.ndim == 3)
    got = read(slide, 0, choose_channels(slide, None).indices, 0, Box(0, 0, 20, 30))
    planes = np.moveaxis(expected, -1, 0) if expected.ndim == 3 else expected[None]
    np.testing.assert_allclose(got.astype(int), planes.astype(int), atol=tolerance)


@pytest.mark.parametrize(("mode", "colour"), [("L", 16), ("RGB", (16, 16, 72)), ("P", 3), ("P", b"\0\x80")])
def test_a_transparent_colour_changes_no_pixel(tmp_path, mode, colour):
    expected = GREY if mode == "L" else COLOURS // 64 * 64
    picture = Image.fromarray(expected)
    picture = picture.convert("P", palette=Image.Palette.ADAPTIVE) if mode == "P" else picture
    picture.save(tmp_path / "a.png", transparency=colour)
    check(tmp_path / "a.png", expected)


def test_grey_with_alpha_is_grey(tmp_path):
    Image.fromarray(np.dstack([GREY, ALPHA])).save(tmp_path / "a.png")
    check(tmp_path / "a.png", GREY)


def test_cmyk_jpegs_become_rgb(tmp_path):
    smooth = COLOURS // 16 * 16
    Image.fromarray(smooth).convert("CMYK").save(tmp_path / "a.jpg", quality=100, subsampling=0)
    check(tmp_path / "a.jpg", smooth, tolerance=16)


@pytest.mark.parametrize("name", ["tiff", "gif", "webp"])
def test_other_formats_under_the_name_of_a_picture_are_named(tmp_path, name):
    pixels = COLOURS.astype("uint16") * 300 if name == "tiff" else COLOURS
    if name == "tiff":
        tifffile.imwrite(tmp_path / "a.png", pixels, photometric="rgb")
    else:
        Image.fromarray(pixels).save(tmp_path / "a.png", format=name)
    assert f"expected PNG, JPEG or BMP, as its name says, found image/{name};" in only(tmp_path / "a.png").reason


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
