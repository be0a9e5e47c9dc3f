"""PNG and JPEG files."""

import numpy as np
import pytest
from PIL import Image

from cellseg_batch.engine.geometry import Box
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
