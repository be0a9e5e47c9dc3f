"""Any bundle is scored on annotated images: its figures are those of what a run writes."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from skimage.io import imsave

from tests.support.convolutions import CONVOLUTIONS, write_convolution
from tests.support.images import blobs, labels_of


@pytest.fixture
def evaluate(tmp_path, command):
    """Score a model on ``tmp_path / "data"``; returns the figures of all images, and what was said."""

    def call(model, *flags):
        code, said = command("evaluate", model, tmp_path / "data", "--json", tmp_path / "e.json", *flags)
        assert code == 0, said
        return json.loads((tmp_path / "e.json").read_text())[str(model)]["summary"]["all"], said

    return call


@pytest.mark.parametrize("decoder", CONVOLUTIONS)
def test_a_model_of_any_decoder_scores_full_marks_on_what_it_wrote_itself(tmp_path, segment, evaluate, decoder):
    model, data = write_convolution(tmp_path, decoder), tmp_path / "data"
    pixels = blobs(150, 170, 1, seed=3)[0]
    usual = {"model": str(model), "backend": "onnxruntime", "skip_background": "off", "output": tmp_path / "out"}
    parts = {"images": pixels}
    imsave(tmp_path / "a.png", pixels, check_contrast=False)
    objects = segment(tmp_path / "a.png", **usual, objects=True, name="objects")
    assert objects.status == "done", objects.slides[0].reason
    parts["labels"] = labels_of(objects).astype(np.uint16)
    if decoder == "classes":
        parts["classes"] = labels_of(segment(tmp_path / "a.png", **usual, name="classes"))
    for part, values in parts.items():
        (data / part).mkdir(parents=True)
        imsave(data / part / "a.png", values, check_contrast=False)
    (data / "index.csv").write_text("id,split\na,val\n")
    if decoder == "classes":  # in another order, and with one more, than in the model
        turned = np.uint8([0, 2, 1])[parts["classes"]]
        turned[0, 0] = 3
        imsave(data / "classes" / "a.png", turned, check_contrast=False)
        (data / "classes.csv").write_text("value,name\n1,bright\n2,dim\n3,odd\n")
    figures, said = evaluate(model, "--pictures", tmp_path / "pictures")
    assert "Mpx/s, onnxruntime fp32" in said
    assert (tmp_path / "pictures" / f"{decoder}.png").stat().st_size > 10_000
    assert parts["labels"].max() > 10
    assert (figures["f1"], figures["pq"], figures["aji"]) == (1, 1, 1)
    assert figures["mean"]["dice"] > 0.99
    assert set(figures["classes"]) == ({"dim", "bright"} if decoder == "classes" else set())
    for name, of_class in figures["classes"].items():
        assert of_class["f1"] == 1, name
        assert of_class["iou"] > 0.999, name
    assert ("the model has no class odd" in said) == (decoder == "classes")
    if decoder == "classes":
        assert set(pq.read_table(objects.slides[0].table)["class"].to_pylist()) == {"dim", "bright"}


def test_a_model_of_stains_is_scored_on_pictures_if_it_takes_one(tmp_path, command):
    for part, values in (("images", blobs(60, 60, 1)[0]), ("labels", (blobs(60, 60, 1)[0] > 90).astype(np.uint16))):
        (tmp_path / "data" / part).mkdir(parents=True)
        imsave(tmp_path / "data" / part / "a.png", values, check_contrast=False)
    (tmp_path / "data" / "index.csv").write_text("id,split\na,val\n")
    code, said = command("evaluate", write_convolution(tmp_path, "mask", channels=("membrane",)), tmp_path / "data")
    assert code == 0, said
    code, said = command(
        "evaluate", write_convolution(tmp_path / "two", "mask", channels=("nuclei", "membrane")), tmp_path / "data"
    )
    assert code == 2
    assert "expected a model of one channel or of rgb, as annotated images are pictures, found one of nuclei" in said
