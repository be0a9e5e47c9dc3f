"""Graphs in float16 give what they give in float32, up to rounding, and are in float16 where it matters."""

import warnings

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from cellseg_batch.engine.inference.backends.onnx_graph import LOGITS, PIXELS, plain_graph
from cellseg_batch.engine.inference.backends.onnxruntime_cpu import run_graph
from cellseg_batch.engine.models import load_model
from cellseg_batch.engine.reports.import_model import import_model
from tests.support.graphs import randomised, write_graph, write_network
from tests.support.images import blobs

CARD = """
[input]
channels = ["rgb"]
normalisation = {kind = "fixed", low = 0, high = 255}
LAYOUT
[output]
decoder = "mask"
CHANNELS
"""


class Skip(torch.nn.Module):
    """A network that enlarges to the size of a skip connection, and by a scale that float16 has not."""

    def __init__(self, end):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.end = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(16, 3, 3, padding=1), end
        self.norm = torch.nn.BatchNorm2d(8)

    def forward(self, pixels):
        skip = self.norm(self.first(pixels)).relu()
        deep = torch.nn.functional.interpolate(
            torch.nn.functional.max_pool2d(skip, 2), scale_factor=1.1, mode="bilinear"
        )
        deep = torch.nn.functional.interpolate(deep, size=skip.shape[2:], mode="nearest")
        return self.end(self.last(torch.cat([skip, deep.clamp(0, 6)], 1)))


ENDS = {
    "logits": (torch.nn.Identity(), 'channels = ["foreground", "border", "distance"]'),
    "probabilities": (torch.nn.Sigmoid(), 'channels = ["foreground", "border", "distance"]'),
    "softmax": (torch.nn.Softmax(dim=1), 'channels = ["rim", "background", "foreground"]'),
}


@pytest.fixture
def bundle_of(tmp_path):
    def call(file, channels="", layout=""):
        (tmp_path / "card.toml").write_text(CARD.replace("CHANNELS", channels).replace("LAYOUT", layout))
        import_model(file, tmp_path / "bundle", tmp_path / "card.toml")
        return load_model(str(tmp_path / "bundle"))

    return call


def halved(bundle, tiles):
    """The graph of a bundle in float16, and its logits and those in float32."""
    graph = plain_graph(bundle, half=tiles.shape)
    onnx.checker.check_model(onnx.load_from_string(graph), full_check=True)
    (expected,), (logits,) = (run_graph(each, tiles, 1).values() for each in (plain_graph(bundle), graph))
    assert logits.dtype == np.float16
    model = onnx.load_from_string(graph)
    for value, name in ((model.graph.input[0], PIXELS), (model.graph.output[0], LOGITS)):
        assert (value.name, value.type.tensor_type.elem_type) == (name, TensorProto.FLOAT16)
    return model, logits.astype(np.float32), expected


@pytest.mark.parametrize(("end", "downscale"), [*((end, 1) for end in ENDS), ("logits", 2)])
def test_a_network_of_others_in_half(bundle_of, tmp_path, end, downscale):
    last, channels = ENDS[end]
    network = randomised(Skip(torch.nn.Identity()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's own
        file = write_network(torch.nn.Sequential(network, last), tmp_path / "skip.onnx")
    tiles = np.stack([blobs(64, 128, seed=seed) / np.float32(255) for seed in (0, 1)])
    model, logits, expected = halved(bundle_of(file, channels).downscaled(downscale), tiles)
    np.testing.assert_allclose(logits, expected, atol=np.abs(expected).max() * 1e-2)
    weights = {value.name: value.data_type for value in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert {weights[name] for node in convolutions for name in node.input[1:]} == {TensorProto.FLOAT16}
    assert not {"Shape", "ConstantOfShape"} & {node.op_type for node in model.graph.node}


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_whatever_a_card_says_holds_in_half(bundle_of, tmp_path, dtype):
    """Channels last, a coarser output, casts, and an enlargement by a number that float16 has not."""
    kind = np.float16 if dtype == TensorProto.FLOAT16 else np.float32
    weights = {
        "w": np.full((1, 3, 2, 2), 1 / 4, kind),
        "b": np.array([-2], kind),
        "roi": np.zeros(0, kind),
        "larger": np.array([1, 1, 4 / 3, 4 / 3], np.float32),
        "smaller": np.array([1, 1, 3 / 4, 3 / 4], np.float32),
    }
    nodes = [
        helper.make_node("Transpose", ["x"], ["first"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["first"], ["exact"], to=TensorProto.FLOAT),
        helper.make_node("Sigmoid", ["exact"], ["bounded"]),
        helper.make_node("Cast", ["bounded"], ["taken"], to=dtype),
        helper.make_node("Conv", ["taken", "w", "b"], ["z"], strides=[2, 2]),
        helper.make_node("Resize", ["z", "roi", "larger"], ["l"], mode="linear"),
        helper.make_node("Resize", ["l", "roi", "smaller"], ["s"], mode="linear"),
        helper.make_node("Transpose", ["s"], ["y"], perm=[0, 2, 3, 1]),
    ]
    bundle = bundle_of(write_graph(tmp_path / "a.onnx", nodes, (1, 48, 48, 3), (1, 24, 24, 1), weights, dtype=dtype))
    assert (bundle.card.input.layout, bundle.card.output.stride) == ("NHWC", 2)
    _, logits, expected = halved(bundle, blobs(48, 48)[None] / np.float32(255))
    assert logits.shape == (1, 1, 48, 48)
    assert expected.std() > 0.02
    np.testing.assert_allclose(logits, expected, atol=5e-3)
