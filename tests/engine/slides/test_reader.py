"""Pixels reach the kernels in types that these know; zarrs decodes what it can, and nothing is left behind."""

import ctypes
import shutil
from typing import ClassVar

import numpy as np
import pytest
import zarr
from zarr.core.codec_pipeline import BatchedCodecPipeline

from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.slides.discover import find_images
from cellseg_batch.engine.slides.reader import SlideReader
from cellseg_batch.kernels.gather import gather
from tests.support.images import blobs, write_ome_zarr
from tests.support.slides import coordinates, only, read


@pytest.mark.parametrize("dtype", [">u2", ">f4", "<f2", "int8", "bool"])
def test_unusual_types_of_number_reach_the_kernels(tmp_path, dtype):
    array = zarr.create_array(str(tmp_path / "a.zarr"), shape=(20, 30), dtype=dtype, zarr_format=2)
    array[...] = coordinates("yx", (20, 30)).astype(dtype)
    got = read(only(tmp_path / "a.zarr"), 0, (0,), 0, Box(0, 0, 20, 30))
    assert got.dtype.isnative
    assert got.dtype.itemsize in (1, 2, 4, 8)
    np.testing.assert_array_equal(got[0], coordinates("yx", (20, 30)).astype(dtype))
    gather(got, np.zeros((1, 4), int), np.zeros((1, 4), int), 0.0, 1.0, np.empty((1, 1, 4, 4), np.float32))


@pytest.mark.parametrize("axes", ["tczyx", "zyx", "cyx"])
def test_local_chunks_are_decoded_by_zarrs(tmp_path, axes, monkeypatch):
    shape = [{"t": 2, "c": 3, "z": 2}.get(axis, 150) for axis in axes]
    pixels = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    (slide,) = find_images(write_ome_zarr(tmp_path / "a.zarr", pixels, axes))
    monkeypatch.setattr(BatchedCodecPipeline, "read", None)
    last = {axis: -1 for axis in axes if axis in "tz"}
    expected = pixels[tuple(last.get(axis, slice(None)) for axis in axes)].reshape(-1, 150, 150)[:, 10:140, 5:130]
    with SlideReader(slide, 0, tuple(range(slide.extent("c", 0)))) as reader:
        np.testing.assert_array_equal(reader.read(slide.planes(0) - 1, Box(10, 5, 140, 130)), expected)


def test_arrays_in_the_order_of_columns_are_read_too(tmp_path):
    pixels = blobs(150, 130)
    path = write_ome_zarr(tmp_path / "a.zarr", pixels, version="0.4", levels=1)
    array = zarr.create_array(path / "0", data=pixels, chunks=(1, 64, 64), zarr_format=2, order="F", overwrite=True)
    assert array.order == "F"
    (slide,) = find_images(path)
    with SlideReader(slide, 0, (0, 1, 2)) as reader:
        np.testing.assert_array_equal(reader.read(0, Box(10, 5, 140, 130)), pixels[:, 10:140, 5:130])


def test_a_small_plane_is_decoded_once(tmp_path):
    pixels = blobs(150, 130)
    path = write_ome_zarr(tmp_path / "a.zarr", pixels, levels=1)
    with SlideReader(only(path), 0, (0, 1, 2)) as reader:
        reader.read(0, Box(0, 0, 150, 130))
        shutil.rmtree(path / "0" / "c")  # its pixels would be 0
        for other in (reader, reader.of_channels((0, 1, 2))):
            np.testing.assert_array_equal(other.read(0, Box(10, 5, 140, 130)), pixels[:, 10:140, 5:130])
        assert not reader.of_channels((1,)).read(0, Box(0, 0, 150, 130)).any()


def test_reading_leaves_nothing_behind_for_each_chunk(tmp_path):
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("a C library that does not count what is allocated")
    libc.mallinfo2.restype = _Allocated
    write_ome_zarr(tmp_path / "a.zarr", blobs(256, 256), chunk=8, levels=1)
    with SlideReader(only(tmp_path / "a.zarr"), 0, (0, 1, 2)) as reader:
        reader.read(0, Box(0, 0, 8, 8))
        before = libc.mallinfo2().in_use
        for box in (Box(0, 0, 256, 255), Box(0, 0, 8, 8)):
            reader.read(0, box)
        assert libc.mallinfo2().in_use - before < 64 * 3 * 32**2, "no lock for each of the 3 x 32 x 32 chunks"


class _Allocated(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    _fields_: ClassVar = [(name, ctypes.c_size_t) for name in (*"abcdefg", "in_use", "free", "top")]
