"""The bounds that a slide is normalised between."""

import numpy as np
import pytest
import zarr

from cellseg_batch.engine.inference.normalise import settle_bounds
from cellseg_batch.engine.slides.reader import SlideReader
from cellseg_batch.trainer.card import Normalisation
from tests.support.images import write_ome_zarr
from tests.support.slides import only


def bounds_of(slide, rule):
    with SlideReader(slide, 0, (0,)) as reader:
        return settle_bounds(reader, rule)


def test_bounds_come_from_the_whole_slide_and_pass_over_nan(tmp_path):
    pixels = np.full((1, 64, 64), 10, np.float32)
    pixels[0, :32] = 30
    pixels[0, 0, :5] = np.nan
    slide = only(write_ome_zarr(tmp_path / "a.zarr", pixels, levels=1))
    bounds = bounds_of(slide, Normalisation("percentile", (1,), (99,)))
    assert (bounds.low, bounds.high) == ((10,), (30,))
    assert bounds_of(slide, Normalisation("fixed", (5,), (6,))).high == (6,)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
def test_bounds_of_integers_are_those_of_the_floats_that_the_model_sees(tmp_path, dtype):
    pixels = np.random.default_rng(0).integers(0, 251, (1, 61, 67)).astype(dtype) * (1 if dtype == "uint8" else 97)
    slides = [only(write_ome_zarr(tmp_path / f"{kind}.zarr", pixels.astype(kind))) for kind in (dtype, "float32")]
    of_integers, of_floats = (bounds_of(slide, Normalisation()) for slide in slides)
    assert of_integers == of_floats


def test_a_few_bright_pixels_on_a_ground_of_one_value_are_not_lost(tmp_path):
    pixels = np.zeros((1, 512, 512), np.uint16)
    pixels[0, :12, :12] = 9000
    slide = only(write_ome_zarr(tmp_path / "a.zarr", pixels, levels=1))
    assert bounds_of(slide, Normalisation()).high == (9000,)


def test_large_slides_without_a_pyramid_are_sampled_evenly(tmp_path):
    array = zarr.create_array(str(tmp_path / "a.zarr"), shape=(6000, 6000), dtype="uint8", chunks=(1000, 1000))
    array[:3000] = 200
    bounds = bounds_of(only(tmp_path / "a.zarr"), Normalisation("percentile", (10,), (90,)))
    assert (bounds.low, bounds.high) == ((0,), (200,))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("count", [1, 2, 3, 10, 1000])
def test_percentiles_are_those_of_numpy(dtype, count):
    random = np.random.default_rng(count)
    for most in (1, 200, 30_000):
        pixels = (random.random((1, count)) * min(most, np.iinfo(dtype).max if dtype != "float32" else most)).astype(
            dtype
        )
        for percents in ((0.1, 99.9), (0.0, 100.0), tuple(random.uniform((0, 60), (40, 100)))):
            low, high = np.percentile(pixels, percents)
            expected = (low, high) if high > low else (pixels.min(), pixels.max())
            assert Normalisation("percentile", (percents[0],), (percents[1],)).bounds_of(pixels) == expected
