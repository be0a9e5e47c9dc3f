"""A format is one object in the registry: one more of them is found, listed and segmented like those that ship."""

import ast
import pickle
from pathlib import Path

import numpy as np
import pytest

from cellseg_batch import engine
from cellseg_batch.engine.errors import NoImageError, ReadError
from cellseg_batch.engine.slides import formats
from cellseg_batch.engine.slides.discover import find_images, first_slide
from cellseg_batch.engine.slides.formats import FORMATS, format_of
from cellseg_batch.engine.slides.image_format import ImageFormat, name_in_series, optional_library
from cellseg_batch.engine.slides.reader import SlideReader
from cellseg_batch.engine.slides.slide import Level, Slide, UnreadableImage
from tests.support.images import blobs, labels_of, write_ome_zarr
from tests.support.slides import only


class Archive(ImageFormat):
    """RGB images (H, W, 3) in one file, a series each."""

    name, title, suffixes = "archive", "NumPy archive", (".rgb.npz",)

    def find(self, path, name, search):
        with np.load(path) as archive:
            for number, key in enumerate(archive.files):
                image_name, inside = name_in_series(name, number, len(archive.files))
                pixels = archive[key]
                level = Level("0", pixels.shape, pixels.shape, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
                about = {"axes": "yxc", "dtype": pixels.dtype.name, "levels": (level,), "units": (None,) * 3}
                yield Slide(image_name, path, inside, self.name, **about, rgb=True, series=number)

    def open_level(self, slide, level):
        with np.load(slide.store) as archive:
            return archive[archive.files[slide.series]]


class NeedsALibrary(Archive):
    """The same, if a library were there."""

    def find(self, path, name, search):
        return optional_library("no_such_library", "cellseg-batch[archives]").images(path)

    def open_level(self, slide, level):
        return optional_library("no_such_library", "cellseg-batch[archives]").level(slide)


def register(monkeypatch, image_format):
    monkeypatch.setattr(formats, "FORMATS", (*FORMATS, image_format))


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """An archive of two images, and the pixels (C, H, W) of each."""
    register(monkeypatch, Archive())
    images = [blobs(150, 130, seed=seed) for seed in (1, 2)]
    path = tmp_path / "a.rgb.npz"
    np.savez(path, *(np.moveaxis(pixels, 0, -1) for pixels in images))
    return path, images


def test_images_of_one_more_format_are_segmented_like_any_others(archive, tmp_path, segment):
    path, images = archive
    report = segment(path)
    assert report.status == "done"
    assert [Path(slide.path).name for slide in report.slides] == ["0", "1"]
    for number, pixels in enumerate(images):
        same = segment(write_ome_zarr(tmp_path / f"{number}.zarr", pixels, levels=1))
        np.testing.assert_array_equal(labels_of(report, number), labels_of(same))


def test_one_more_format_is_known_to_the_command_line(archive, tmp_path, command, tiny_model):
    path, _ = archive
    code, said = command("info", path, "--model", tiny_model)
    assert (code, "archive" in said) == (0, True)
    code, said = command("convert", path, tmp_path / "b.zarr")
    assert (code, [slide.name for slide in find_images(tmp_path / "b.zarr")]) == (0, ["b.zarr/0", "b.zarr/1"]), said


def test_formats_are_named_where_there_is_no_image(tmp_path, monkeypatch):
    register(monkeypatch, Archive())
    with pytest.raises(NoImageError, match=r"OME-Zarr, zarr array, .*TIFF, SVS, .*PNG, JPEG, BMP, NumPy archive"):
        find_images(tmp_path)


def test_slides_find_their_format_again_after_a_journey(archive):
    slide = pickle.loads(pickle.dumps(first_slide(find_images(archive[0]))))
    assert format_of(slide) is formats.FORMATS[-1]


def test_what_a_format_stumbles_over_costs_neither_the_images_before_nor_the_next_file(archive):
    path, images = archive
    np.savez(path.with_name("b.rgb.npz"), np.moveaxis(images[0], 0, -1), np.array([None]))
    path.with_name("c.rgb.npz").write_text("no archive")
    *slides, second, third = find_images(path.parent)
    assert [slide.name.partition("/")[2] for slide in slides] == ["a.rgb.npz/0", "a.rgb.npz/1", "b.rgb.npz/0"]
    assert all(isinstance(image, UnreadableImage) for image in (second, third))
    with pytest.raises(ReadError, match="cannot be read"):
        first_slide([third])


def test_a_library_that_is_not_installed_is_named_with_its_remedy(archive, monkeypatch):
    path, _ = archive
    slide = find_images(path)[0]
    register(monkeypatch, NeedsALibrary())
    assert "pip install 'cellseg-batch[archives]'" in only(path).reason
    with pytest.raises(ReadError, match=r"no_such_library.*pip install"):
        SlideReader(slide, 0, (0,))


def test_formats_that_no_module_reads_are_named(tmp_path):
    (tmp_path / "a.VSI").write_bytes(b"II")
    assert ".vsi files are not supported" in only(tmp_path / "a.VSI").reason


def test_only_the_registry_looks_at_the_name_of_a_format():
    for path in sorted(Path(engine.__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text())
        called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        read = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "format"]
        # A card's format is that of its weights.
        read = [node for node in read if not ast.unparse(node).endswith("card.format")]
        assert path.name == "formats.py" or all(id(node) in called for node in read), path
