"""What is written is valid OME-Zarr, lies where it should, and is whole."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import ome_zarr.io
import ome_zarr.reader
import ome_zarr_models
import pytest
import zarr

from cellseg_batch.engine.errors import OutputError
from cellseg_batch.engine.geometry import Box, fit_lattice, lay_blocks
from cellseg_batch.engine.slides.discover import find_images
from cellseg_batch.engine.slides.label_layout import lay_out
from cellseg_batch.engine.slides.pixel_meaning import MASK
from cellseg_batch.engine.slides.writer import ImageWriter, list_label
from tests.support.images import blobs, write_ome_zarr


def writer_for(path, version="0.5", axes="cyx", shape=(1, 150, 90), levels=3, tile=48, block=80):
    write_ome_zarr(path, np.zeros(shape, np.uint8), axes, version, levels=levels)
    (slide,) = find_images(path)
    grid = lay_blocks(fit_lattice(slide.plane_shape(0), tile, 0, 16), block, slide.planes(0))
    return slide, grid, ImageWriter(path, "labels/mask", lay_out(slide, 0, grid, 3 if version == "0.5" else 2))


def fill(slide, grid, writer, truth):
    writer.create(MASK, "../../", {})
    for block in grid:
        writer.write(0, block.plane, block.box, truth[(block.plane, *block.box.slices())])
    for level in range(1, len(writer.layout.shapes)):
        for number in range(writer.layout.shard_count(level)):
            writer.build_level(level, *writer.layout.shard_box(level, number))


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize(("axes", "shape"), [("cyx", (2, 150, 90)), ("tczyx", (2, 1, 3, 40, 70)), ("yx", (33, 17))])
def test_labels_are_valid_and_hold_what_was_written(tmp_path, caplog, version, axes, shape):
    slide, grid, writer = writer_for(tmp_path / "a.zarr", version, axes, shape)
    truth = np.random.default_rng(0).integers(0, 2, (slide.planes(0), *shape[-2:]), dtype=np.uint8)
    fill(slide, grid, writer, truth)
    list_label(writer.store, "labels", "mask", writer.layout.zarr_format)
    array = zarr.open_array(str(writer.folder / "0"), mode="r")
    expected = tuple(length for axis, length in zip(axes, shape, strict=True) if axis != "c")
    assert array.shape == expected
    np.testing.assert_array_equal(array[...].reshape(truth.shape), truth)
    model = ome_zarr_models.open_ome_zarr(zarr.open_group(str(writer.folder), mode="r"))
    assert "Label" in type(model).__name__
    location = ome_zarr.io.parse_url(writer.folder)
    opened = [[level.shape for level in node.data] for node in ome_zarr.reader.Reader(location)()]
    assert [*writer.layout.shapes] in opened
    assert "invalid" not in caplog.text


def test_every_level_is_the_nearest_pixel_of_the_one_above(tmp_path):
    slide, grid, writer = writer_for(tmp_path / "a.zarr", shape=(1, 151, 93), levels=3)
    truth = np.random.default_rng(0).integers(0, 2, (1, 151, 93), dtype=np.uint8)
    fill(slide, grid, writer, truth)
    above = truth[0]
    for level, shape in list(enumerate(writer.layout.shapes))[1:]:
        rows = ((np.arange(shape[0]) + 0.5) * above.shape[0] / shape[0]).astype(int)
        columns = ((np.arange(shape[1]) + 0.5) * above.shape[1] / shape[1]).astype(int)
        above = above[np.ix_(rows, columns)]
        np.testing.assert_array_equal(zarr.open_array(str(writer.folder / str(level)), mode="r")[...], above)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_no_two_blocks_share_a_file(tmp_path, version):
    _, grid, writer = writer_for(tmp_path / "a.zarr", version, tile=64, block=130, shape=(1, 300, 280))
    writer.create(MASK, None, {})
    files = [[*writer._files(0, block.plane, block.box)] for block in grid]
    every = [file for one in files for file in one]
    assert len(every) == len(set(every))
    for level in range(1, len(writer.layout.shapes)):
        shards = [writer.layout.shard_box(level, number) for number in range(writer.layout.shard_count(level))]
        every = [file for plane, box in shards for file in writer._files(level, plane, box)]
        assert len(every) == len(set(every))
    writer.write(0, 0, grid[0].box, np.ones(grid[0].box.shape, np.uint8))
    assert all((writer.folder / "0" / file).exists() for file in files[0])


def test_the_list_of_labels_is_kept(tmp_path):
    _, _, writer = writer_for(tmp_path / "a.zarr")
    writer.create(MASK, None, {})
    labels = zarr.open_group(str(tmp_path / "a.zarr"), path="labels", mode="r+")
    labels.attrs["ome"] = {"version": "0.5", "labels": ["nuclei"], "more": 1}
    for _ in range(2):
        list_label(tmp_path / "a.zarr", "labels", "mask", 3)
    assert zarr.open_group(str(tmp_path / "a.zarr"), path="labels", mode="r").attrs["ome"] == {
        "version": "0.5",
        "labels": ["nuclei", "mask"],
        "more": 1,
    }


def test_labels_that_are_listed_at_the_same_moment_are_all_listed(tmp_path):
    group = zarr.open_group(str(tmp_path / "a.zarr"), path="labels", mode="w", zarr_format=3)
    group.attrs.update({"history": list(range(20_000)), "ome": {"version": "0.5", "labels": ["nuclei"]}})
    names = ["a", "b", "c", "d"]
    together = Barrier(len(names))

    def add(name):
        together.wait()
        list_label(tmp_path / "a.zarr", "labels", name, 3)

    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(add, names))
    attributes = zarr.open_group(str(tmp_path / "a.zarr"), path="labels", mode="r").attrs
    assert sorted(attributes["ome"]["labels"]) == [*names, "nuclei"]
    assert len(attributes["history"]) == 20_000
    assert not list((tmp_path / "a.zarr.cellseg").iterdir()), "the lock is given back"


def test_a_damaged_shard_is_noticed(tmp_path):
    slide, grid, writer = writer_for(tmp_path / "a.zarr")
    fill(slide, grid, writer, blobs(150, 90, 1))
    shard = next(path for path in (writer.folder / "0" / "c").rglob("*") if path.is_file())
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(Exception, match=r"crc|[Cc]hecksum"):
        zarr.open_array(str(writer.folder / "0"), mode="r")[...]


def test_a_store_that_cannot_be_written_is_named(tmp_path):
    _, grid, writer = writer_for(tmp_path / "a.zarr")
    writer.create(MASK, None, {})
    (writer.folder / "0" / "c").write_text("a file where the folder of chunks should be")
    with pytest.raises(OutputError, match=r"a\.zarr/labels/mask"):
        writer.write(0, 0, Box(0, 0, *grid.block_shape), np.ones(grid.block_shape, np.uint8))
