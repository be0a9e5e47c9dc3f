"""What a stranger's file may not do: reach outside itself, run code, or claim more pixels than there can be."""

import ast
import json
import os
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

import cellseg_batch.engine
import cellseg_batch.kernels
import cellseg_batch.trainer
from cellseg_batch.engine.slides import discover
from cellseg_batch.engine.slides.discover import find_images
from cellseg_batch.engine.slides.slide import UnreadableImage
from tests.support.images import blobs, write_ome_zarr

OUTSIDE = ["../secret.zarr", "../../secret.zarr", "a/../../secret.zarr", "..\\secret.zarr", "/secret.zarr", "."]


@pytest.fixture
def secret(tmp_path):
    return write_ome_zarr(tmp_path / "secret.zarr", blobs(64, 64))


def broken(path):
    found = find_images(path)
    assert all(isinstance(one, UnreadableImage) for one in found), found
    return " ".join(one.reason for one in found)


@pytest.mark.parametrize("escape", [*OUTSIDE, "{absolute}"])
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_level_paths_cannot_leave_the_image(tmp_path, secret, escape, version):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(64, 64), version=version)
    group = zarr.open_group(str(path), mode="r+")
    holder = dict(group.attrs)
    (holder["ome"] if version == "0.5" else holder)["multiscales"][0]["datasets"][0]["path"] = escape.format(
        absolute=secret / "0"
    )
    group.attrs.put(holder)
    assert "stay inside" in broken(path)


@pytest.mark.parametrize("escape", [*OUTSIDE, "{absolute}"])
@pytest.mark.parametrize("kind", ["plate", "well"])
def test_plates_and_wells_cannot_list_what_is_not_theirs(tmp_path, secret, escape, kind):
    listed = [{"path": escape.format(absolute=secret)}]
    metadata = {"plate": {"wells": listed}} if kind == "plate" else {"well": {"images": listed}}
    zarr.create_group(str(tmp_path / "p.zarr"), attributes={"ome": {"version": "0.5", **metadata}})
    assert "stay inside" in broken(tmp_path / "p.zarr")


@pytest.mark.parametrize("name", ["../secret.ome.tif", "/etc/secret.ome.tif", "..&#47;secret.ome.tif"])
def test_an_ome_tiff_cannot_open_files_elsewhere(tmp_path, name):
    tifffile.imwrite(tmp_path / "a.ome.tif", np.zeros((40, 40), np.uint8), metadata={"axes": "YX"})
    text = tifffile.tiffcomment(tmp_path / "a.ome.tif")
    tifffile.tiffcomment(
        tmp_path / "a.ome.tif", text.replace("<TiffData", f'<TiffData><UUID FileName="{name}"/></TiffData><TiffData')
    )
    assert "beside it" in broken(tmp_path / "a.ome.tif")


class Harm:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    "codecs",
    [
        {"filters": [{"id": "pickle", "protocol": 5}]},
        {"filters": [{"id": "pickle"}, {"id": "delta", "dtype": "|u1"}]},
        {"compressor": {"id": "pickle", "protocol": 5}},
        {"dtype": "|O", "filters": [{"id": "pickle", "protocol": 5}]},
        {"dtype": "|O", "filters": [{"id": "vlen-utf8"}], "compressor": {"id": "pickle"}},
    ],
)
def test_no_chunk_is_unpickled(tmp_path, codecs, segment):
    usual = {"zarr_format": 2, "shape": [64, 64], "chunks": [64, 64], "dtype": "|u1", "fill_value": 0, "order": "C"}
    folder = tmp_path / "a.zarr"
    folder.mkdir()
    (folder / ".zarray").write_text(json.dumps({**usual, "filters": None, "compressor": None, **codecs}))
    (folder / "0.0").write_bytes(pickle.dumps(Harm(tmp_path / "harm")))
    assert segment(tmp_path / "a.zarr").status == "failed"
    assert not (tmp_path / "harm").exists()


def test_a_level_of_objects_spoils_its_image(tmp_path):
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(64, 64), version="0.4", levels=2)
    about = path / "1" / ".zarray"
    about.write_text(json.dumps({**json.loads(about.read_text()), "dtype": "|O", "filters": [{"id": "vlen-utf8"}]}))
    assert broken(path)


def test_our_own_code_never_unpickles():
    for package in (cellseg_batch.engine, cellseg_batch.kernels, cellseg_batch.trainer):
        for path in Path(package.__file__).parent.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call):
                    continue
                called, flags = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert called not in ("pickle.load", "pickle.loads", "pickle.Unpickler", "eval", "exec"), path
                assert flags.get("allow_pickle") in (None, "False"), path
                if called in ("torch.load", "torch.hub.load_state_dict_from_url"):
                    assert flags.get("weights_only") == "True", f"{path}: {called}"


def test_a_picture_of_ten_thousand_million_pixels_is_refused(tmp_path):
    Image.new("1", (8, 8)).save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[16:24] = (100_000).to_bytes(4, "big") * 2  # width and height, in the header that comes first
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(content)
    assert "10000000000" in broken(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("shape", "chunks", "number"),
    [
        ((10**12, 10**12), (512, 512), f"{10**12} px along a side"),
        ((10**7, 10**7), (512, 512), f"{10**14} px in a plane"),
        ((10**9, 10**5, 10**5), (1, 512, 512), f"{10**19} px in shape"),
        ((100_000, 100_000), (100_000, 100_000), f"{10**10} bytes"),
    ],
)
def test_absurd_shapes_are_refused_with_their_numbers(tmp_path, shape, chunks, number):
    zarr.create_array(str(tmp_path / "a.zarr"), shape=shape, chunks=chunks, dtype="uint8")
    (found,) = find_images(tmp_path / "a.zarr", axes="zyx"[-len(shape) :])
    assert number.split()[0] in found.reason, found
    assert "expected at most" in found.reason


def test_a_tiff_of_one_huge_strip_is_refused(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((300, 400), np.uint8), rowsperstrip=300)
    monkeypatch.setattr(discover, "MOST_CHUNK_BYTES", 100_000)
    assert "120000" in broken(tmp_path / "a.tif")
