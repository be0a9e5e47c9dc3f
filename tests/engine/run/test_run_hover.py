"""A network shaped like HoVer-Net, as a graph of tiles of one size whose edges give nothing, in whole runs."""

import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest
from onnx import TensorProto, helper, numpy_helper

from cellseg_batch.trainer.bundle import Bundle, save_bundle
from cellseg_batch.trainer.card import ONNX, Card, Input, Normalisation, ObjectClass, Output, Size, Tensor
from cellseg_batch.trainer.metrics import instance_overlaps
from tests.support.hover_maps import crowded_nuclei, draw_maps, f1_of
from tests.support.images import labels_of, write_ome_zarr

CROP, TILE = 10, 128


def save_graph(path):
    """Write a graph whose outputs follow from the pixels alone: nucleus (2), maps (2), types (no class and two).

    The first channel is the logit of a nucleus, which is above 6 for one of the types.
    """
    nodes, constants = [], []

    def add(operator, *inputs, gives, **options):
        for number, value in enumerate(inputs):
            if not isinstance(value, str):
                constants.append(numpy_helper.from_array(value, f"{gives}_{number}"))
        names = [value if isinstance(value, str) else f"{gives}_{number}" for number, value in enumerate(inputs)]
        nodes.append(helper.make_node(operator, names, [gives], **options))

    add("Mul", "pixels", np.float32([16]), gives="scaled")
    add("Sub", "scaled", np.float32([8]), gives="maps")
    sides = np.int64([CROP, CROP]), np.int64([TILE - CROP, TILE - CROP]), np.int64([2, 3])
    add("Slice", "maps", *sides, gives="cropped")
    add("Split", "cropped", np.int64([1, 2]), gives="parts", axis=1)
    nodes[-1].output[:] = ["nucleus", "hv"]
    add("Sub", "nucleus", np.float32([6]), gives="kind")
    for name, nothing in (("nucleus", -1), ("kind", 0)):
        add("Mul", name, np.float32([-1]), gives=f"-{name}")
        add("Mul", name, np.float32([nothing]), gives=f"no {name}")
    add("Concat", "no nucleus", "nucleus", gives="np", axis=1)
    add("Concat", "no kind", "kind", "-kind", gives="types", axis=1)
    tensors = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", channels, side, side])
        for name, channels, side in (("pixels", 3, TILE), ("np", 2, None), ("hv", 2, None), ("types", 3, None))
    ]
    graph = helper.make_graph(nodes, "hover", tensors[:1], tensors[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)


@pytest.fixture
def model(tmp_path):
    card = Card(
        name="hover",
        input=Input(("rgb",), Normalisation("fixed", (0.0,), (255.0,)), Size(TILE, 0)),
        output=Output(
            (
                Tensor(("background", "foreground"), "np"),
                Tensor(("horizontal", "vertical"), "hv"),
                Tensor(("no class", "tumour", "stroma"), "types"),
            ),
            crop=CROP,
        ),
        decoder="hover",
        total_stride=1,
        exact_margin=None,
        margin=CROP,
        classes=(ObjectClass("tumour", "#c80000"), ObjectClass("stroma", "#00c800")),
        format=ONNX,
    )
    save_graph(tmp_path / "hover.onnx")
    save_bundle(Bundle(card, graph=tmp_path / "hover.onnx"), tmp_path / "model")
    return str(tmp_path / "model")


def test_nuclei_and_their_types_come_back_from_a_hover_net(tmp_path, segment, model):
    # Drawn maps that are mirrored at the slide's edge are not those that a network would give.
    truth = np.pad(crowded_nuclei(260, 300, 130), 20)
    rng = np.random.default_rng(0)
    kinds = rng.choice([0, 4], truth.max() + 1)
    maps = draw_maps(truth)
    maps[0] += np.where(truth > 0, kinds[truth], 0)
    slide = write_ome_zarr(tmp_path / "a.zarr", np.clip(255 / 16 * (maps + 8) + 0.5, 0, 255).astype(np.uint8))
    reports = [
        segment(slide, name=f"{block}", model=model, backend="onnxruntime", objects=True, block=block, workers=workers)
        for block, workers in ((80, 4), (300, 1))
    ]
    labels, other = map(labels_of, reports)
    np.testing.assert_array_equal(labels, other)
    assert reports[0].margin == CROP + 9, "the decoder looks at no pixel that the network gives nothing for"
    assert f1_of(labels, truth, truth.shape) > 0.98
    table = pq.read_table(reports[0].slides[0].table)
    assert table.equals(pq.read_table(reports[1].slides[0].table))
    drawn = kinds[1 + instance_overlaps(labels, truth).ious.argmax(1)]
    assert table["class"].to_pylist() == np.where(drawn > 0, "tumour", "stroma").tolist()
