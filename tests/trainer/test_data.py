"""The published layouts of annotated images, good and bad."""

import csv
import json
import shutil

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image
from skimage.io import imsave

from cellseg_batch.trainer.card import Normalisation
from cellseg_batch.trainer.data.dataset import load_dataset
from cellseg_batch.trainer.data.dsb2018 import decode_runs, merge_masks

TRUTH = np.zeros((20, 30), np.int32)
TRUTH[2:8, 3:9], TRUTH[10:18, 12:28] = 2, 1


def image(path, shape=TRUTH.shape):
    path.parent.mkdir(parents=True, exist_ok=True)
    imsave(path, np.full(shape, 7, np.uint8), check_contrast=False)


def mask(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    imsave(path, array.astype(np.uint8) * 255, check_contrast=False)


def read(folder):
    return load_dataset(folder, Normalisation(), only=("train",))


def same_instances(labels, truth):
    pairs = set(zip(labels.ravel().tolist(), truth.ravel().tolist(), strict=True))
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


@pytest.fixture
def bowl(tmp_path, monkeypatch):
    """One good image in the Data Science Bowl's layout."""
    monkeypatch.setattr("cellseg_batch.trainer.data.dataset._hashed_split", lambda _: "train")
    image(tmp_path / "good" / "images" / "good.png")
    for number in (1, 2):
        mask(tmp_path / "good" / "masks" / f"{number}.png", number == TRUTH)
    return tmp_path


def test_mask_files_become_an_instance_map(bowl):
    (sample,) = read(bowl).splits["train"]
    assert sample.name == "good"
    assert same_instances(sample.labels, TRUTH)


def test_bad_mask_files_are_reported_and_skipped(bowl):
    cases = {
        "empty": ([np.zeros(TRUTH.shape)], "a mask is empty"),
        "size": ([np.ones((5, 5))], "a mask is (5, 5) px"),
        "hidden": ([TRUTH == 1, TRUTH == 1], "overlapping masks"),
    }
    for name, (masks, _) in cases.items():
        image(bowl / name / "images" / f"{name}.png")
        for number, one in enumerate(masks):
            mask(bowl / name / "masks" / f"{number}.png", one)
    image(bowl / "torn" / "images" / "torn.png")
    (bowl / "torn" / "masks").mkdir()
    (bowl / "torn" / "masks" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (bowl / "lost" / "images").mkdir(parents=True)
    (bowl / "lost" / "masks").mkdir()
    dataset = read(bowl)
    assert [sample.name for sample in dataset.splits["train"]] == ["good"]
    problems = {problem.file: problem.reason for problem in dataset.problems}
    assert set(problems) == {*cases, "torn", "lost"}
    for name, (_, reason) in cases.items():
        assert reason in problems[name]
    assert all(problems.values())


def test_run_lengths_by_hand():
    # Column-major from 1: the second and third pixel of the first column, the first of the second.
    np.testing.assert_array_equal(decode_runs("2 2 4 1", 3, 2), [[0, 1], [1, 0], [1, 0]])
    for runs in ("2 2 4", "5 3", "0 1"):
        with pytest.raises(ValueError, match=r"pairs|outside"):
            decode_runs(runs, 3, 2)


def test_the_run_length_file_replaces_mask_files(bowl):
    image(bowl / "coded" / "images" / "coded.png")
    with open(bowl / "solution.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["ImageId", "EncodedPixels", "Height", "Width"])
        for number in (1, 2):
            flat = np.flatnonzero((number == TRUTH).T.ravel())
            writer.writerow(["coded", " ".join(f"{position + 1} 1" for position in flat), 20, 30])
    coded, good = read(bowl).splits["train"]
    assert coded.name == "coded"
    assert same_instances(coded.labels, good.labels)


def test_the_smaller_of_two_overlapping_masks_is_on_top():
    large, small = np.zeros((2, 4, 4), bool)
    large[:3], small[2:, :2] = True, True
    labels = merge_masks([small, large], (4, 4))
    assert (labels[2:, :2] == labels[3, 0]).all()
    assert labels[2, 3] == labels[0, 0] != labels[3, 0]


def polygon(*corners):
    return [[float(value) for corner in corners for value in corner]]


def coco(folder, annotations, names=("a_1.png",)):
    for name in names:
        image(folder / "images" / name)
    content = {
        "images": [{"id": number, "file_name": name} for number, name in enumerate(names)],
        "annotations": annotations,
    }
    (folder / "livecell_coco_train.json").write_text(json.dumps(content))


def test_polygons_become_masks(tmp_path):
    rectangle = polygon((3, 2), (9, 2), (9, 8), (3, 8))
    coco(tmp_path, {"1": {"image_id": 0, "segmentation": rectangle}})
    (sample,) = read(tmp_path).splits["train"]
    np.testing.assert_array_equal(sample.labels, TRUTH == 2)
    assert sample.kind == "a"


def test_bad_polygons_and_files_are_reported_and_skipped(tmp_path):
    inside, outside = polygon((3, 2), (9, 2), (9, 8)), polygon((300, 2), (309, 2), (309, 8))
    segments = [inside, outside, polygon((1, 1), (2, 2)), {"counts": [1, 2], "size": [20, 30]}, inside]
    annotations = [{"image_id": number, "segmentation": one} for number, one in enumerate(segments)]
    names = [f"{kind}_1.png" for kind in ("good", "outside", "line", "rle", "gone")]
    coco(tmp_path, annotations, names)
    (tmp_path / "images" / "gone_1.png").unlink()
    dataset = read(tmp_path)
    assert [sample.name for sample in dataset.splits["train"]] == ["good_1"]
    assert {problem.file for problem in dataset.problems} == {"outside_1", "line_1", "rle_1", "gone_1"}


def test_a_damaged_coco_file_is_named(tmp_path):
    coco(tmp_path, [])
    (tmp_path / "livecell_coco_train.json").write_text("{")
    with pytest.raises(ValueError, match="livecell_coco_train"):
        read(tmp_path)


def test_folder_pairs_may_hold_binary_masks(tmp_path):
    image(tmp_path / "images" / "a.png")
    mask(tmp_path / "masks" / "a.png", TRUTH > 0)
    image(tmp_path / "images" / "b.png", (9, 9))
    mask(tmp_path / "masks" / "b.png", TRUTH > 0)
    (tmp_path / "index.csv").write_text("id,split\na,train\nb,train\n")
    dataset = read(tmp_path)
    assert same_instances(dataset.splits["train"][0].labels, TRUTH)
    assert [problem.file for problem in dataset.problems] == ["b"]


def test_ids_in_masks_are_kept(tmp_path):
    touching = TRUTH.copy()
    touching[10:18, 4:12] = 3
    image(tmp_path / "images" / "a.png")
    (tmp_path / "masks").mkdir()
    imsave(tmp_path / "masks" / "a.png", touching.astype(np.uint16), check_contrast=False)
    (tmp_path / "index.csv").write_text("id,split\na,train\n")
    (sample,) = read(tmp_path).splits["train"]
    np.testing.assert_array_equal(sample.labels, touching)


def test_masks_with_soft_edges_are_refused(tmp_path):
    soft = np.where(TRUTH > 0, 255, 0)
    soft[2, 3:9] = 120
    for name in ("soft", "hard"):
        image(tmp_path / "images" / f"{name}.png")
    mask(tmp_path / "masks" / "hard.png", TRUTH > 0)
    imsave(tmp_path / "masks" / "soft.png", soft.astype(np.uint8), check_contrast=False)
    (tmp_path / "index.csv").write_text("id,split\nsoft,train\nhard,train\n")
    dataset = read(tmp_path)
    assert [sample.name for sample in dataset.splits["train"]] == ["hard"]
    assert "masks/soft.png is a mask with soft edges" in dataset.problems[0].reason


def test_splits_without_an_index_are_the_same_every_time(tmp_path):
    for number in range(30):
        image(tmp_path / "images" / f"{number}.png")
        mask(tmp_path / "masks" / f"{number}.png", TRUTH > 0)
    first, second = (load_dataset(tmp_path, Normalisation()).names for _ in range(2))
    assert first == second
    assert len(first["train"]) + len(first["val"]) == 30
    assert 0 < len(first["val"]) < 15


def test_what_is_no_data_set_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="expected images"):
            read(folder)
    image(tmp_path / "images" / "a.png")
    mask(tmp_path / "masks" / "a.png", TRUTH > 0)
    (tmp_path / "index.csv").write_text("id,split\na,val\n")
    with pytest.raises(ValueError, match="no usable image in train among 1; add images"):
        read(tmp_path)
    (tmp_path / "index.csv").write_text("id,split\na,train\n")
    mask(tmp_path / "masks" / "a.png", TRUTH[1:] > 0)
    with pytest.raises(ValueError, match="train among 1; 1 could not be used, the first, a, as the image is"):
        read(tmp_path)


def test_a_folder_of_folder_pairs_is_all_of_them(tmp_path):
    for part, kind in (("one", "fluo"), ("two", "")):
        for name in "ab":
            image(tmp_path / part / "images" / f"{name}.png")
            path = tmp_path / part / "labels" / f"{name}.png"
            path.parent.mkdir(exist_ok=True)
            imsave(path, TRUTH.astype(np.uint16), check_contrast=False)
        (tmp_path / part / "index.csv").write_text(f"id,split,group\na,train,{kind}\nb,val,{kind}\n")
    (tmp_path / "two" / "images" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    dataset = load_dataset(tmp_path, Normalisation())
    assert dataset.names == {"train": ["one/a"], "val": ["one/b", "two/b"]}
    assert [sample.kind for sample in dataset.splits["val"]] == ["fluo", "two"]
    assert [problem.file for problem in dataset.problems] == ["two/a"]
    assert load_dataset(tmp_path / "one", Normalisation()).names == {"train": ["a"], "val": ["b"]}


def test_several_objects_in_one_mask_file_are_refused(bowl):
    image(bowl / "several" / "images" / "several.png")
    (bowl / "several" / "masks").mkdir()
    imsave(bowl / "several" / "masks" / "all.png", TRUTH.astype(np.uint8), check_contrast=False)
    dataset = read(bowl)
    assert [sample.name for sample in dataset.splits["train"]] == ["good"]
    assert "masks/all.png has 2 values" in dataset.problems[0].reason


def test_masks_of_any_kind_of_file_and_with_an_opacity_are_read(bowl):
    shutil.rmtree(bowl / "good" / "masks")
    for number, suffix in ((1, "tif"), (2, "png")):
        plane = number == TRUTH
        pixels = plane if suffix == "tif" else np.stack([plane, plane, plane, np.ones_like(plane)], -1)
        mask(bowl / "good" / "masks" / f"{number}.{suffix}", pixels)
    (sample,) = read(bowl).splits["train"]
    assert same_instances(sample.labels, TRUTH)


def pair(folder, name, pixels, labels, suffix="png"):
    for kind, array in (("images", pixels), ("labels", labels)):
        (folder / kind).mkdir(exist_ok=True)
        imsave(folder / kind / f"{name}.{suffix if kind == 'images' else 'tif'}", array, check_contrast=False)


def test_what_a_folder_pair_holds_is_taken_or_named(tmp_path, monkeypatch):
    monkeypatch.setattr("cellseg_batch.trainer.data.dataset._hashed_split", lambda _: "train")
    grey, ids = np.full(TRUTH.shape, 7, np.uint8), TRUTH.astype(np.uint16)
    for name, suffix in (("twice", "png"), ("twice", "tif"), ("bmp", "bmp"), ("no_labels", "png")):
        pair(tmp_path, name, grey, ids, suffix)
    (tmp_path / "labels" / "no_labels.tif").rename(tmp_path / "labels" / "no_image.tif")
    pair(tmp_path, "channels", np.full((*TRUTH.shape, 5), 7, np.uint8), ids, "tif")
    pair(tmp_path, "shares", grey, (TRUTH / 4).astype(np.float32))
    pair(tmp_path, "negative", grey, -TRUTH.astype(np.int16))
    pair(tmp_path, "large", grey, TRUTH.astype(np.uint32) * 2_000_000_000)
    dataset = read(tmp_path)
    taken = {sample.name: sample for sample in dataset.splits["train"]}
    assert sorted(taken) == ["bmp", "large"]
    assert same_instances(taken["large"].labels, TRUTH)
    assert taken["large"].labels.max() == 2
    reasons = {problem.file: problem.reason for problem in dataset.problems}
    words = {
        "twice": "twice.png, twice.tif",
        "no_labels": "no annotation named no_labels",
        "no_image": "no image named no_image",
        "channels": "5 channels",
        "shares": "labels/shares.tif is no instance map",
        "negative": "holds -2",
    }
    assert sorted(reasons) == sorted(words)
    assert all(words[name] in reason for name, reason in reasons.items())


def test_pngs_of_16_bits_keep_their_colours(tmp_path, monkeypatch):
    monkeypatch.setattr("cellseg_batch.trainer.data.dataset._hashed_split", lambda _: "train")
    pixels = np.random.default_rng(0).integers(0, 4096, (*TRUTH.shape, 3), np.uint16)
    pair(tmp_path, "a", pixels[..., 0], TRUTH.astype(np.uint16))
    (tmp_path / "images" / "a.png").write_bytes(imagecodecs.png_encode(pixels))
    (sample,) = read(tmp_path).splits["train"]
    np.testing.assert_array_equal(sample.image, pixels)


def test_folder_pairs_with_labels_and_with_masks_may_lie_beside_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr("cellseg_batch.trainer.data.dataset._hashed_split", lambda _: "train")
    (tmp_path / "one").mkdir()
    pair(tmp_path / "one", "a", np.full(TRUTH.shape, 7, np.uint8), TRUTH.astype(np.uint16))
    image(tmp_path / "two" / "images" / "b.png")
    mask(tmp_path / "two" / "masks" / "b.png", TRUTH > 0)
    assert read(tmp_path).names == {"train": ["one/a", "two/b"]}


def test_boxes_of_ground_show_no_nucleus_and_are_trained_on(tmp_path):
    pixels = np.arange(20 * 30, dtype=np.uint16).reshape(20, 30)
    (tmp_path / "ground" / "slides").mkdir(parents=True)
    tifffile.imwrite(tmp_path / "ground" / "slides" / "a.svs", pixels)
    rows = ["image,y0,x0,y1,x1,kind", "slides/a.svs,2,3,12,23,skin", "slides/a.svs,10,3,25,23", "slides/b.svs,0,0,5,5,"]
    rows.append("slides/a.svs,0,0,9,9,")
    (tmp_path / "ground" / "ground.csv").write_text("\n".join(rows))
    image(tmp_path / "pair" / "images" / "b.png")
    image(tmp_path / "pair" / "labels" / "b.png")
    (tmp_path / "pair" / "index.csv").write_text("id,split\nb,train\n")
    found = read(tmp_path)
    ground, other, pair = found.splits["train"]
    assert (ground.kind, other.kind, pair.name) == ("skin", "ground", "pair/b")
    np.testing.assert_array_equal(ground.image[..., 0], pixels[2:12, 3:23])
    assert not ground.labels.any()
    reasons = [problem.reason for problem in found.problems]
    assert "beyond the image of 20 x 30 px" in reasons[0]
    assert "b.svs" in reasons[1]
    (tmp_path / "ground" / "ground.csv").write_text("image,y0,x0,y1,x1\na.svs,2,3,x,23\n")
    with pytest.raises(ValueError, match="row 1: expected image, y0, x0, y1, x1"):
        read(tmp_path)


def test_class_maps_and_their_names_are_read(tmp_path):
    (tmp_path / "classes").mkdir()
    kinds = np.uint8([0, 2, 1])[TRUTH]  # of objects 1 and 2
    for name, values in (("alone", kinds), ("large", 2 * kinds), ("small", kinds[1:])):
        image(tmp_path / "images" / f"{name}.png")
        imsave(tmp_path / "classes" / f"{name}.png", values, check_contrast=False)
    (tmp_path / "index.csv").write_text("id,split\nalone,train\nlarge,train\nsmall,train\n")
    (tmp_path / "classes.csv").write_text("value,name,colour\n2,stroma,#00FF00\n1,tumour,\n")
    dataset = read(tmp_path)
    assert [(one.name, one.colour) for one in dataset.classes] == [("tumour", "#ff4040"), ("stroma", "#00ff00")]
    (alone,) = dataset.splits["train"]
    np.testing.assert_array_equal(alone.classes, kinds)
    assert same_instances(alone.labels, TRUTH)
    assert not alone.has_objects
    reasons = {problem.file: problem.reason for problem in dataset.problems}
    assert reasons["large"] == "its class map holds the value 4, and classes.csv names those from 1 to 2"
    assert "its labels (19, 30)" in reasons["small"]
    shown_in_colours = Image.fromarray(kinds, mode="P")
    shown_in_colours.putpalette([0, 0, 0, 250, 0, 0, 0, 250, 0])
    shown_in_colours.save(tmp_path / "classes" / "alone.png")
    np.testing.assert_array_equal(read(tmp_path).splits["train"][0].classes, kinds)
    (tmp_path / "labels").mkdir()
    for name in ("alone", "unknown"):
        image(tmp_path / "images" / f"{name}.png")
        imsave(tmp_path / "labels" / f"{name}.png", TRUTH.astype(np.uint16), check_contrast=False)
    (tmp_path / "index.csv").write_text("id,split\nalone,train\nunknown,train\n")
    alone, unknown = read(tmp_path).splits["train"]
    assert alone.has_objects
    assert (alone.labels.max(), alone.classes.max(), unknown.classes) == (2, 2, None)
    (needed,) = load_dataset(tmp_path, Normalisation(), only=("train",), needs_classes=True).problems
    assert needed.reason == "no class map in classes/"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("value,name\n1,tumour\n3,stroma\n", "with the values 1, 2, 3"),
        ("value,name\n1,tumour\n1,stroma\n", "with the values 1, 2, 3"),
        ("name\ntumour\n", "the columns value and name"),
        ("value,name\n1,tumour\n2,tumour\n", "names of their own, other than background, found tumour, tumour"),
        ("value,name\n", "found none"),
        ("value,name\n1,background\n", "other than background, found background"),
        ("value,name,colour\n1,tumour,red\n", "not 'red'"),
        (None, "and classes.csv with their names"),
    ],
)
def test_names_of_classes_that_cannot_be_are_refused(tmp_path, command, text, words):
    image(tmp_path / "images" / "a.png")
    mask(tmp_path / "classes" / "a.png", TRUTH > 0)
    if text is not None:
        (tmp_path / "classes.csv").write_text(text)
    code, said = command("train", tmp_path, "--out", tmp_path / "out", "--preset", "classes")
    assert code == 2
    assert words in said


def test_parts_of_a_data_set_have_the_same_classes(tmp_path):
    for part, name in (("one", "tumour"), ("two", "stroma")):
        image(tmp_path / part / "images" / "a.png")
        mask(tmp_path / part / "classes" / "a.png", TRUTH > 0)
        (tmp_path / part / "classes.csv").write_text(f"value,name\n1,{name}\n")
    with pytest.raises(ValueError, match="expected the same classes in all of them"):
        read(tmp_path)
