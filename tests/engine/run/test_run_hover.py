"""A network shaped like HoVer-Net, as a graph of tiles of one size whose edges give nothing, in whole runs."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from onnx import helper

from cellseg_batch.engine.reports.import_model import import_model
from cellseg_batch.trainer.metrics import instance_overlaps
from tests.support.graphs import write_graph
from tests.support.hover_maps import crowded_nuclei, draw_maps, f1_of
from tests.support.images import labels_of, write_ome_zarr

CROP, TILE = 10, 128
# The outputs follow from the pixels alone; the first channel is the logit of a nucleus, above 6 for one of the types.
GRAPH = (
    ("Mul", "x 16", "scaled"),
    ("Sub", "scaled 8", "maps"),
    ("Slice", "maps start stop sides", "cropped"),
    ("Split", "cropped channels", "nucleus hv"),
    ("Neg", "nucleus", "ground"),
    ("Sub", "nucleus 6", "tumour"),
    ("Neg", "tumour", "stroma"),
    ("Sub", "tumour tumour", "none"),
    ("Concat", "ground nucleus", "np"),
    ("Concat", "none tumour stroma", "types"),
)
WEIGHTS = {number: np.float32([int(number)]) for number in ("16", "8", "6")} | {
    "start": np.int64([CROP, CROP]),
    "stop": np.int64([TILE - CROP, TILE - CROP]),
    "sides": np.int64([2, 3]),
    "channels": np.int64([1, 2]),
}
CARD = f"""
[input]
channels = ["rgb"]
normalisation = {{kind = "fixed", low = 0, high = 255}}
[output]
decoder = "hover"
margin = {CROP}
classes = ["tumour", "stroma"]
tensors = [
    {{name = "np", channels = ["background", "foreground"]}},
    {{name = "hv", channels = ["horizontal", "vertical"]}},
    {{name = "types", channels = ["no class", "tumour", "stroma"]}},
]
"""


@pytest.fixture
def model(tmp_path):
    nodes = [
        helper.make_node(
            operator, inputs.split(), outputs.split(), **({"axis": 1} if operator in ("Concat", "Split") else {})
        )
        for operator, inputs, outputs in GRAPH
    ]
    shape, any_shape = ("n", 3, TILE, TILE), (None,) * 4
    write_graph(tmp_path / "hover.onnx", nodes, shape, any_shape, WEIGHTS, outputs=("np", "hv", "types"))
    (tmp_path / "card.toml").write_text(CARD)
    import_model(tmp_path / "hover.onnx", tmp_path / "model", tmp_path / "card.toml")
    return str(tmp_path / "model")


def test_nuclei_and_their_types_come_back_from_a_hover_net(tmp_path, segment, model):
    # Drawn maps that are mirrored at the slide's edge are not those that a network would give.
    truth = np.pad(crowded_nuclei(260, 300, 130), 20)
    kinds = np.random.default_rng(0).choice([0, 4], truth.max() + 1)
    maps = draw_maps(truth)
    maps[0] += np.where(truth > 0, kinds[truth], 0)
    slide = write_ome_zarr(tmp_path / "a.zarr", np.clip(255 / 16 * (maps + 8) + 0.5, 0, 255).astype(np.uint8))
    usual = {"model": model, "backend": "onnxruntime", "tile": None, "objects": True}
    reports = [
        segment(slide, name=f"{block}", block=block, workers=workers, **usual) for block, workers in ((80, 4), (300, 1))
    ]
    labels, other = map(labels_of, reports)
    np.testing.assert_array_equal(labels, other)
    assert reports[0].margin == CROP + 9, "the decoder looks at no pixel that the network gives nothing for"
    assert f1_of(labels, truth, truth.shape) > 0.98
    table = pq.read_table(reports[0].slides[0].table)
    assert table.equals(pq.read_table(reports[1].slides[0].table))
    drawn = kinds[1 + instance_overlaps(labels, truth).ious.argmax(1)]
    assert table["class"].to_pylist() == np.where(drawn > 0, "tumour", "stroma").tolist()
