"""What images a path holds, in any depth; what cannot be used is named."""

import os
import socket
from pathlib import Path

import numpy as np
import pytest
import zarr
from PIL import Image

from cellseg_batch.engine.errors import NoImageError
from cellseg_batch.engine.slides.discover import find_images
from tests.support.images import fill_ome_zarr, write_ome_zarr
from tests.support.slides import coordinates, only


def test_a_folder_that_cannot_be_listed_is_reported(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    Image.fromarray(np.zeros((4, 4), "uint8")).save(tmp_path / "a.png")
    listing = Path.iterdir

    def refuse(path):
        if path.name == "locked":
            raise PermissionError(13, "Permission denied")
        return listing(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    slide, locked = find_images(tmp_path)
    assert (slide.name, locked.reason.split(":")[0]) == (f"{tmp_path.name}/a.png", "the folder cannot be listed")


def test_images_in_any_depth_are_found_and_labels_are_not(tmp_path):
    pixels = coordinates("cyx", (1, 16, 16))
    root = zarr.open_group(str(tmp_path / "deep.zarr"), mode="w")
    inner = root.create_group("x").create_group("y")
    fill_ome_zarr(inner, None, pixels)
    labels = inner.create_group("labels")
    labels.attrs["ome"] = {"version": "0.5", "labels": ["nuclei"]}
    nuclei = labels.create_group("nuclei")
    fill_ome_zarr(nuclei, None, pixels[0], "yx")
    nuclei.attrs["ome"] = {**nuclei.attrs["ome"], "image-label": {}}
    root.create_array("plain", shape=(8, 8), dtype="uint8")
    (tmp_path / "sub").mkdir()
    Image.fromarray(np.zeros((4, 4), "uint8")).save(tmp_path / "sub" / "a.png")
    write_ome_zarr(tmp_path / "sub" / "b.cellseg.zarr", pixels)
    (tmp_path / "notes.txt").write_text("not an image")
    names = [slide.name.removeprefix(f"{tmp_path.name}/") for slide in find_images(tmp_path)]
    assert names == ["deep.zarr/plain", "deep.zarr/x/y", "sub/a.png"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [("nothing", "found nothing"), (".", "likely an empty folder"), ("a.txt", "likely a file of another format")],
)
def test_nothing_to_find(tmp_path, path, reason):
    (tmp_path / "a.txt").write_text("not an image")
    with pytest.raises(NoImageError, match=reason):
        find_images(tmp_path / path)


def test_sides_that_no_microscope_makes_are_refused(tmp_path):
    zarr.create_array(str(tmp_path / "a.zarr"), shape=(88, 2**31), dtype="uint8", chunks=(88, 64))
    assert "px along a side of 88 x 2147483648" in only(tmp_path / "a.zarr").reason


def test_empty_and_complex_images_are_refused(tmp_path):
    zarr.create_array(str(tmp_path / "e.zarr"), shape=(0, 5), dtype="uint8")
    zarr.create_array(str(tmp_path / "c.zarr"), shape=(5, 5), dtype="complex64")
    assert "an image with pixels" in only(tmp_path / "e.zarr").reason
    assert "complex64" in only(tmp_path / "c.zarr").reason


@pytest.mark.parametrize(
    "name",
    [
        *(
            "a.czi",
            "a.ND2",
            "a.lif",
            "a.mrxs",
            "a.vsi",
            "a.dcm",
            "a.jp2",
            "a.gif",
            "a.webp",
            "a.h5",
            "a.ims",
            "a.nii.gz",
        ),
        *("a.zarr.zip", "a.ozx", "a.ome.tif.gz", "a.svs.part", "a.tiff.zip.tmp"),
    ],
)
def test_what_is_named_like_an_image_is_named_with_a_hint(tmp_path, name):
    (tmp_path / name).write_bytes(b"pixels")
    unreadable = only(tmp_path)
    assert unreadable.path == str(tmp_path / name)
    assert ";" in unreadable.reason


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.json", "a.xml", "a.db", "a.zip", "a.h5ad", "readme"])
def test_other_files_are_passed_over(tmp_path, name):
    (tmp_path / name).write_bytes(b"no pixels")
    Image.fromarray(np.zeros((4, 4), "uint8")).save(tmp_path / "b.png")
    assert only(tmp_path).name.endswith("/b.png")


def test_a_store_without_metadata_is_named_and_a_folder_of_that_name_with_images_is_a_folder(tmp_path):
    (tmp_path / "lost.zarr" / "c" / "0").mkdir(parents=True)
    (tmp_path / "lost.zarr" / "c" / "0" / "0").write_bytes(b"chunk")
    (tmp_path / "many.zarr").mkdir()
    Image.fromarray(np.zeros((4, 4), "uint8")).save(tmp_path / "many.zarr" / "a.png")
    lost, picture = find_images(tmp_path)
    assert "no zarr metadata" in lost.reason
    assert picture.name.endswith("many.zarr/a.png")


def test_a_zarr_group_is_a_folder_of_other_files_too(tmp_path):
    zarr.open_group(str(tmp_path / "a"), mode="w").create_group("inner")
    pixels = np.zeros((4, 4), "uint8")
    for folder in ("a", "a/inner", "a/folder"):  # of which the last is no node
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / folder / "b.png")
    zarr.create_array(str(tmp_path / "a" / "member"), data=pixels)
    zarr.create_array(str(tmp_path / "a" / "folder" / "c.zarr"), data=pixels)
    (tmp_path / "a" / "d.czi").write_bytes(b"pixels")
    names = ["a/b.png", "a/d.czi", "a/folder/b.png", "a/folder/c.zarr", "a/inner/b.png", "a/member"]
    assert sorted(image.name for image in find_images(tmp_path / "a")) == names


def test_stores_that_link_to_each_other_are_searched_once(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        zarr.open_group(str(tmp_path / name), mode="w").create_array("c", data=np.zeros((4, 4), "uint8"))
        (tmp_path / name / "link").symlink_to(f"../{other}")
    assert [image.name for image in find_images(tmp_path / "a")] == ["a/c", "a/link/c"]


def test_pipes_sockets_and_devices_are_named_and_never_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    for name in ("a.tif", "b.png", "c.czi", "d.txt"):
        os.mkfifo(name)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("e.tif")
    Path("f.tif").symlink_to("/dev/zero")
    (tmp_path / "g.zarr").mkdir()
    os.mkfifo("g.zarr/zarr.json")
    found = [(Path(image.path).name, image.reason) for image in find_images(tmp_path)]
    pipe = "expected a file, found a named pipe; copy the image into a file"
    assert found[:3] == [(name, pipe) for name in ("a.tif", "b.png", "c.czi")]
    assert found[3:5] == [
        ("e.tif", pipe.replace("named pipe", "socket")),
        ("f.tif", pipe.replace("named pipe", "device")),
    ]
    assert [name for name, _ in found[5:]] == ["g.zarr"]
    assert only(tmp_path / "a.tif").reason == pipe
    with pytest.raises(NoImageError, match="found a named pipe"):
        find_images(tmp_path / "d.txt")


def test_links_that_lead_nowhere_are_named(tmp_path):
    targets = {
        "a.tif": "gone.tif",
        "b.zarr": "gone.zarr",
        "c.png": "c.png",
        "folder": "/gone/folder",
        "notes.txt": "gone",
    }
    for name, target in targets.items():
        (tmp_path / name).symlink_to(target)
    found = find_images(tmp_path)
    assert [Path(image.path).name for image in found] == ["a.tif", "b.zarr", "c.png", "folder"]
    assert "a link to gone.tif, where nothing is" in found[0].reason
    assert only(tmp_path / "a.tif").reason == found[0].reason


def test_hierarchies_without_arrays_are_named(tmp_path):
    zarr.open_group(str(tmp_path / "a.zarr"), mode="w").create_group("b").create_group("c")
    labels = zarr.open_group(str(tmp_path / "d.zarr"), mode="w").create_group("labels")
    labels.create_array("0", shape=(8, 9), dtype="uint8")
    Image.fromarray(np.zeros((4, 4), "uint8")).save(tmp_path / "e.png")
    empty, picture = find_images(tmp_path)
    assert (empty.name, picture.name) == (f"{tmp_path.name}/a.zarr", f"{tmp_path.name}/e.png")
    assert "found a hierarchy of empty groups" in empty.reason
