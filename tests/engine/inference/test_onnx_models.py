"""Networks of others run like our own: the same logits as untiled, whatever the layout, the crop or the activation."""

import re
import subprocess
import sys
import warnings
import zipfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import zarr
from monai.networks.nets import BasicUNet, SegResNet
from onnx import helper, numpy_helper
from scipy import ndimage

from cellseg_batch.engine.errors import BackendError, ModelError, UsageError
from cellseg_batch.engine.inference.backends.registry import make_backend
from cellseg_batch.engine.models import load_model
from cellseg_batch.engine.reports.import_model import import_model
from cellseg_batch.engine.storage.cache import Artefacts
from cellseg_batch.trainer.bundle import Bundle, save_bundle
from cellseg_batch.trainer.card import CARD_PROPERTY, Card, ModelClass, Output, Size, Tensor
from cellseg_batch.trainer.footprint import measure_footprint
from cellseg_batch.trainer.receptive_field import Footprint
from tests.support.graphs import randomised, untiled, write_graph, write_network
from tests.support.images import blobs, labels_of, write_ome_zarr, write_plate

NARROW = (4, 4, 8, 8, 8, 4)
NETWORKS = {
    "basic-unet": lambda: BasicUNet(2, 3, 1, features=NARROW, norm="batch"),
    "seg-res-net": lambda: SegResNet(
        spatial_dims=2, init_filters=8, in_channels=3, out_channels=1, norm="batch", blocks_down=(1, 1), blocks_up=(1,)
    ),
    "sees-all": lambda: BasicUNet(2, 3, 1, features=NARROW, norm="instance"),
}
CARD = """
[input]
channels = ["rgb"]
normalisation = {kind = "fixed", low = 0, high = 255}
[output]
decoder = "mask"
"""


@pytest.fixture(scope="module")
def file_of(tmp_path_factory):
    """Write the ONNX file of a network by its name, once."""
    folder = tmp_path_factory.mktemp("files")

    @cache
    def call(name):
        return write_network(randomised(NETWORKS[name]()), folder / f"{name}.onnx")

    return call


@pytest.fixture
def imported(tmp_path):
    """Import a file with a card; returns the bundle's folder."""

    def call(file, card=CARD, name="bundle"):
        (tmp_path / f"{name}.toml").write_text(card)
        import_model(file, tmp_path / name, tmp_path / f"{name}.toml")
        return tmp_path / name

    return call


def logits_of(folder, tiles, backend="onnxruntime", precision="fp32"):
    return make_backend(load_model(str(folder)), backend, precision, 1, Artefacts()).compile(tiles.shape)(tiles)


@pytest.mark.parametrize("name", [pytest.param("basic-unet", marks=pytest.mark.slow), "seg-res-net"])
def test_a_network_of_others_gives_what_it_gives_untiled(file_of, imported, segment, tmp_path, name):
    folder = imported(file_of(name))
    card = load_model(str(folder)).card
    stride, exact = card.total_stride, card.exact_margin
    pixels = blobs(300, 410)
    logits = untiled(file_of(name), pixels / np.float32(255), exact, stride)[0]
    masks = []
    for backend, block in (("onnxruntime", 64), ("onnxruntime", 400), ("openvino", 200)):
        path = write_ome_zarr(tmp_path / f"{backend}_{block}.zarr", pixels)
        report = segment(
            path, model=str(folder), backend=backend, margin="exact", tile=2 * exact + 64, block=block, gate=False
        )
        assert report.slides[0].tiles > 20
        masks.append(labels_of(report))
    assert 0.1 < masks[0].mean() < 0.9
    np.testing.assert_array_equal(masks[0], masks[1])
    for mask in masks:
        differ = mask != (logits > 0)
        assert np.abs(logits[differ]).max(initial=0) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["basic-unet", "seg-res-net"])
def test_stride_and_exact_margin_are_those_that_nan_finds_in_torch(file_of, imported, name):
    card = load_model(str(imported(file_of(name)))).card
    assert measure_footprint(NETWORKS[name]()) == Footprint(card.total_stride, card.exact_margin)


@pytest.mark.slow
def test_a_network_that_sees_the_whole_tile_is_named_and_runs(file_of, imported, segment, tmp_path):
    folder = imported(file_of("sees-all"))
    card = load_model(str(folder)).card
    assert (card.exact_margin, card.margin) == (None, 64)
    masks = []
    for block in (100, 300):
        path = write_ome_zarr(tmp_path / f"{block}.zarr", blobs(300, 300))
        masks.append(labels_of(segment(path, model=str(folder), backend="onnxruntime", tile=224, block=block)))
    np.testing.assert_array_equal(*masks)
    with pytest.raises(UsageError, match="sees the whole tile"):
        segment(path, model=str(folder), backend="onnxruntime", tile=224, margin="exact", overwrite=True)


class Valid(torch.nn.Module):
    """Two convolutions without padding, so that 6 px on each side are missing; K outputs."""

    def __init__(self, outputs, end):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second, self.end = torch.nn.Conv2d(3, 4, 7), torch.nn.Conv2d(4, outputs, 7), end

    def forward(self, pixels):
        return self.end(3 * self.second(self.first(pixels).relu()))


def test_a_cropped_output_of_tiles_of_one_size(imported, segment, tmp_path):
    file = write_network(Valid(1, torch.nn.Identity()), tmp_path / "valid.onnx", dynamic=False, side=48)
    folder = imported(file)
    card = load_model(str(folder)).card
    assert (card.output.crop, card.margin, card.input.size.fixed, card.exact_margin) == (6, 12, 48, None)
    pixels = blobs(150, 170)
    path = write_ome_zarr(tmp_path / "a.zarr", pixels)
    report = segment(path, model=str(folder), backend="onnxruntime", margin=6, block=100)
    assert report.slides[0].tiles == 5 * 5
    whole = np.pad(pixels, ((0, 0), (6, 6), (6, 6)), mode="reflect") / np.float32(255)
    with torch.no_grad():
        logits = Valid(1, torch.nn.Identity())(torch.from_numpy(whole)[None])[0, 0].numpy()
    differ = labels_of(report) != (logits > 0)
    assert np.abs(logits[differ]).max(initial=0) < 1e-4
    with pytest.raises(UsageError, match="at least 6 px"):
        segment(path, model=str(folder), backend="onnxruntime", margin=5, overwrite=True)
    with pytest.raises(UsageError, match="only batch"):
        segment(path, model=str(folder), backend="onnxruntime", batch=2, overwrite=True)


@pytest.mark.parametrize(
    ("outputs", "end", "channels"),
    [
        (1, torch.nn.Sigmoid(), ["foreground"]),
        (2, torch.nn.Softmax(dim=1), ["background", "foreground"]),
        (3, torch.nn.Softmax(dim=1), ["foreground", "background", "rim"]),
        (2, torch.nn.Identity(), ["background", "foreground"]),
    ],
)
def test_an_activation_in_the_graph_is_undone(imported, tmp_path, outputs, end, channels):
    folder = imported(
        write_network(Valid(outputs, end), tmp_path / "a.onnx"), f"{CARD}channels = {channels}".replace("'", '"')
    )
    tiles = np.random.default_rng(0).random((2, 3, 64, 96), np.float32)
    number = channels.index("foreground")
    with torch.no_grad():
        values = Valid(outputs, torch.nn.Identity())(torch.from_numpy(tiles)).double()
    others = values[:, [other for other in range(outputs) if other != number]]
    expected = values[:, number] - (others.logsumexp(1) if outputs > 1 else 0)
    for backend in ("onnxruntime", "openvino"):
        logits = logits_of(folder, tiles, backend)
        assert logits.shape == (2, 1, 64, 96)
        np.testing.assert_allclose(logits[:, 0, 6:-6, 6:-6], expected, atol=1e-3)


class Ended(Valid):
    """Without what is missing at the edges, and with what does not end in its activation."""

    def forward(self, pixels):
        return super().forward(torch.nn.functional.pad(pixels, (6,) * 4)) * 1.0


@pytest.mark.parametrize(
    ("outputs", "end", "said", "words"),
    [
        (1, torch.nn.Sigmoid(), "", 'add to [output] of --card: activation = "sigmoid"'),
        (2, torch.nn.Softmax(dim=1), "", 'add to [output] of --card: activation = "sigmoid"'),
        (2, torch.nn.Sigmoid(), "softmax", "add up to 1 over the channels, those of y do not"),
        (2, torch.nn.Identity(), "softmax", "softmax gives values from 0 to 1, y has some from -"),
    ],
)
def test_probabilities_are_no_logits_and_logits_no_probabilities(imported, tmp_path, outputs, end, said, words):
    file = write_network(Ended(outputs, end), tmp_path / "a.onnx")
    card = CARD + ('channels = ["background", "foreground"]\n' if outputs == 2 else "")
    with pytest.raises(ModelError, match=re.escape(words)):
        imported(file, card + (f'activation = "{said}"' if said else ""))
    assert load_model(str(imported(file, card + 'activation = "sigmoid"'))) if not said else True


def test_a_graph_that_gives_nan_for_real_tiles_is_refused(imported, tmp_path):
    weights = {"w": np.full((1, 3, 1, 1), -1, np.float32)}
    nodes = [helper.make_node("Conv", ["x", "w"], ["z"]), helper.make_node("Log", ["z"], ["y"])]
    file = write_graph(tmp_path / "a.onnx", nodes, ("n", 3, "h", "w"), ("n", 1, "h", "w"), weights)
    with pytest.raises(ModelError, match="y: NaN for 3 of 3 real tiles"):
        imported(file)


class Coarse(torch.nn.Module):
    """A network whose output is coarser than its input, cropped, or both, by convolutions without padding."""

    def __init__(self, first, stride, second):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = torch.nn.Conv2d(3, 4, first, stride), torch.nn.Conv2d(4, 1, second)

    def forward(self, pixels):
        return self.second(self.first(pixels).relu())


@pytest.mark.parametrize(
    ("first", "stride", "second", "crop"),
    [(17, 1, 17, 16), (2, 2, 1, 0), (7, 2, 3, 5), (4, 4, 1, 0), (2, 2, 17, 16)],
)
def test_a_smaller_output_is_coarser_or_cropped_or_both(imported, tmp_path, first, stride, second, crop):
    """An output of half the side may be either, and nothing but the network's answers tells which."""
    network = Coarse(first, stride, second)
    file = write_network(network, tmp_path / "a.onnx", dynamic=False, side=64)
    folder = imported(file)
    card = load_model(str(folder)).card
    assert (card.output.stride, card.output.crop, card.total_stride) == (stride, crop, stride)
    tiles = blobs(64, 64)[None] / np.float32(255)
    with torch.no_grad():
        expected = network(torch.from_numpy(tiles)).numpy().repeat(stride, 2).repeat(stride, 3)
    inner = slice(crop, 64 - crop)
    np.testing.assert_allclose(logits_of(folder, tiles)[..., inner, inner], expected, atol=1e-4)


def test_margins_and_tiles_of_one_size_fit_the_stride(imported, segment, tmp_path):
    folder = imported(write_network(Coarse(2, 2, 1), tmp_path / "a.onnx", dynamic=False, side=64))
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(100, 130))
    with pytest.raises(UsageError, match="a multiple of the network's total stride, 2 px, found 15"):
        segment(path, model=str(folder), backend="onnxruntime", margin=15)
    with pytest.raises(UsageError, match="at least 64 px, as the model takes tiles of 64 px alone, found 48"):
        segment(path, model=str(folder), backend="onnxruntime", tile=48)


class Pooled(torch.nn.Module):
    """A network that halves or thirds its input and joins both, so that other sides do not run."""

    def __init__(self, by):
        super().__init__()
        torch.manual_seed(0)
        self.by, self.first = by, torch.nn.Conv2d(3, 4, 3, padding=1)
        self.last = torch.nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, pixels):
        features = self.first(pixels).relu()
        coarse = torch.nn.functional.max_pool2d(features, self.by)
        return self.last(torch.cat([features, torch.nn.functional.interpolate(coarse, scale_factor=self.by)], 1))


def test_sides_are_those_that_the_network_runs_at(imported, tmp_path):
    thirds = write_network(Pooled(3), tmp_path / "thirds.onnx", side=48)
    sized = CARD.replace("[output]", "size = {min = 48, step = 3}\n[output]")
    card = load_model(str(imported(thirds, sized))).card
    assert (card.total_stride, card.exact_margin) == (3, 6)
    with pytest.raises(ModelError, match=r"runs at none of \[256, 512, 1024\] px"):
        imported(thirds, name="unsaid")
    wide = write_network(Pooled(128), tmp_path / "wide.onnx", side=128)
    with pytest.raises(ModelError, match="does not run on tiles of 160 px; say size ="):
        imported(wide, name="wide")


def test_channels_last_and_half_precision_and_a_coarser_output(imported, tmp_path):
    weights = {"w": np.full((1, 3, 2, 2), 1 / 12, np.float16), "b": np.array([-0.5], np.float16)}
    nodes = [
        helper.make_node("Transpose", ["x"], ["first"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["first", "w", "b"], ["z"], strides=[2, 2]),
        helper.make_node("Transpose", ["z"], ["y"], perm=[0, 2, 3, 1]),
    ]
    shape, gives = ("n", "h", "w", 3), ("n", "h2", "w2", 1)
    folder = imported(write_graph(tmp_path / "a.onnx", nodes, shape, gives, weights, dtype=10))
    card = load_model(str(folder)).card
    assert (card.input.layout, card.output.stride, card.total_stride) == ("NHWC", 2, 2)
    tiles = np.random.default_rng(0).random((1, 3, 32, 64), np.float32)
    expected = tiles.reshape(3, 16, 2, 32, 2).mean((0, 2, 4)) - 0.5
    for backend in ("onnxruntime", "openvino"):
        logits = logits_of(folder, tiles, backend)[0, 0]
        np.testing.assert_allclose(logits, expected.repeat(2, 0).repeat(2, 1), atol=2e-3)


@pytest.mark.parametrize("unknown", [-1, 0])
def test_axes_without_a_length_are_open_however_they_are_written(imported, tmp_path, unknown):
    weights = {"w": np.ones((1, 3, 3, 3), np.float32)}
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4)]
    shapes = ((unknown, channels, unknown, unknown) for channels in (3, 1))
    card = load_model(str(imported(write_graph(tmp_path / "a.onnx", nodes, *shapes, weights)))).card
    assert (card.input.batch, card.input.size.fixed, card.exact_margin) == (None, None, 1)


def test_backends_of_torch_say_that_they_run_no_graphs(file_of, imported):
    bundle = load_model(str(imported(file_of("seg-res-net"))))
    with pytest.raises(BackendError, match=r"runs onnx models .*\(openvino, onnxruntime"):
        make_backend(bundle, "torch", "fp32", 1, Artefacts())
    with pytest.raises(BackendError, match="one that runs onnx"):
        make_backend(load_model("nuclei"), "onnxruntime", "fp32", 1, Artefacts())


@pytest.mark.slow
def test_importing_and_running_a_graph_imports_no_torch(file_of, tmp_path):
    """In a process of its own, as this one has torch."""
    (tmp_path / "card.toml").write_text(CARD)
    write_ome_zarr(tmp_path / "a.zarr", blobs(100, 120))
    script = f"""
import sys
import warnings
import zipfile
from functools import cache
from pathlib import Path
from cellseg_batch import Settings, segment
from cellseg_batch.engine.reports.import_model import import_model
folder = Path({str(tmp_path)!r})
import_model(Path({str(file_of("seg-res-net"))!r}), folder / "bundle", folder / "card.toml")
for backend in ("onnxruntime", "openvino"):
    report = segment(folder / "a.zarr", model=str(folder / "bundle"), backend=backend, precision="fp32", gate=False,
                     name=backend)
    assert report.slides[0].status == "done", report
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[3])


def test_what_a_card_lacks_is_asked_for_with_an_example(file_of, tmp_path, refusal):
    sayings = {
        "": 'add to [input] of --card: channels = ["rgb"]',
        '[input]\nchannels = ["rgb"]': "normalisation = {kind =",
        CARD.replace('decoder = "mask"', ""): 'decoder = "mask"',
        CARD.replace('"rgb"', '"nuclei", "membrane"'): "the card names 2",
        CARD.replace('"mask"', '"seeds"'): "add to [output]",
        CARD.replace('"mask"', '"magic"'): "one of mask, seeds",
        CARD.replace("low = 0, ", ""): "needs low and high",
        CARD.replace('"fixed", low = 0, high = 255', '"zscore", clip = true'): "clip = false",
        CARD.replace("fixed", "zscore"): 'kind = "linear", low = the mean',
        CARD.replace("255", "inf"): "finite numbers",
        CARD.replace("[output]", "pixel_size_um = 0\n[output]"): "above 0, found 0.0",
        CARD.replace("[output]", "size = 0\n[output]"): "a smallest side of 1 px or more",
        CARD.replace("[output]", 'layout = "nchw"\n[output]'): "one of NCHW, NHWC, found 'nchw'",
        CARD + "threshold = 50": "above 0 and below 1, found 50",
        CARD + "margin = -5": "0 px or more",
        CARD + 'activation = "sigmoid"': "values from 0 to 1, y has some from",
        CARD + "[stardist]\noverlap = 0.3": "stardist: its numbers are those of stardist, not of mask",
        CARD + "[instances]\ngrowth = -1": "instances.growth lies from 0 to 256",
        CARD + 'activation = "sigmoid"\ntensors = [{name = "y", channels = ["foreground"]}]': "those of each tensor",
        CARD + "colour = 1": "unknown field colour of output, whose fields are decoder, channels",
        CARD.replace("[output]", "size = {min = 101, step = 1}\n[output]"): "whole strides",
        CARD.replace("[output]", "size = {min = 101, step = 2}\n[output]"): "runs at none of [257, 513, 1025] px",
        "[[": "TOML",
        "[input]\nchannels = 'rgb'": "input.channels: Expected array, got str; correct it, such as channels = [",
    }
    for text, words in sayings.items():
        (tmp_path / "card.toml").write_text(text)
        line = refusal(
            "import-model", file_of("seg-res-net"), "--out", tmp_path / "b", "--card", tmp_path / "card.toml"
        )
        assert words in line, text
        assert not (tmp_path / "b").exists()


def test_a_card_in_a_file_that_does_not_go_with_its_graph_is_refused(two_stains, imported, refusal, tmp_path):
    card = load_model(str(imported(two_stains, STAINS.replace("KIND", "zscore")))).card
    idle = Output((Tensor(("background", "no class", "a"), "y"),))
    changes = {
        "background for pixels of no class": {
            "decoder": "classes",
            "classes": (ModelClass("a", "#c80000"),),
            "output": idle,
        },
        "it names tiles of at least 65536 px": {"input": replace(card.input, size=Size(1 << 16, 1))},
        "it names 1 channels": {"input": replace(card.input, channels=("grey",))},
        "expected px from 1 and from 0 on": {"total_stride": 0},
        "it names other": {"output": Output((Tensor(("foreground",), "other"),))},
    }
    for words, change in changes.items():
        model = onnx.load(two_stains)
        helper.set_model_props(model, {CARD_PROPERTY: replace(card, **change).to_json()})
        onnx.save(model, tmp_path / "own.onnx")
        assert words in refusal("import-model", tmp_path / "own.onnx", "--out", tmp_path / "b")


def write_zip(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


SAME = ("n", 3, "h", "w")
BODY = helper.make_graph(
    [helper.make_node("Identity", ["a"], ["b"])],
    "body",
    [helper.make_tensor_value_info("a", 1, None)],
    [helper.make_tensor_value_info("b", 1, None)],
)
HOLDERS = {
    "If": {"then_branch": BODY, "else_branch": BODY},
    "Loop": {"body": BODY},
    "Scan": {"body": BODY, "num_scan_inputs": 1},
    "SequenceMap": {"body": BODY},
}


def write_functions(path, *bodies):
    """Write a graph that calls the last of its own functions f0, f1, ..., of which each is a chain of operators."""
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    functions = [
        helper.make_function(
            "own", f"f{number}", ["t0"], [f"t{len(body)}"],
            [
                helper.make_node(operator, [f"t{i}"], [f"t{i + 1}"], domain="own" * operator.startswith("f"), **options)
                for i, (operator, options) in enumerate(body)
            ],
            imports,
        )
        for number, body in enumerate(bodies)
    ]  # fmt: skip
    write_graph(path, [helper.make_node(f"f{len(bodies) - 1}", ["x"], ["y"], domain="own")], SAME, SAME)
    model = onnx.load(path)
    model.functions.extend(functions)
    model.opset_import.append(imports[1])
    path.write_bytes(model.SerializeToString())


def write_weights_beside(path, place, count=1, values=2000):
    """Write a graph each of whose ``count`` weights are all the values of a file beside it, and call the file so."""
    names = [f"w{number}" for number in range(count)]
    write_graph(path, [helper.make_node("Sum", ["x", *names], ["y"])], SAME, SAME)
    model = onnx.load(path)
    for name in names:
        tensor = onnx.TensorProto(name=name, data_type=1, dims=[values], data_location=onnx.TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=place)
        model.graph.initializer.append(tensor)
    path.write_bytes(model.SerializeToString())


def broken(folder, name):
    """Write a file that must be refused; returns it."""
    path = folder / f"{name.replace(' ', '_')}.onnx"
    if name == "a pickle":
        torch.save({"a": torch.zeros(1)}, path, _use_new_zipfile_serialization=False)
    elif name == "state dict":
        torch.save({"a": torch.zeros(1)}, path)
    elif name == "TorchScript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.jit.script(torch.nn.Conv2d(3, 1, 3)).save(path)
    elif name == "pt2":
        program = torch.export.export(torch.nn.Conv2d(3, 1, 3), (torch.zeros(1, 3, 8, 8),))
        with open(path, "wb") as stream:
            torch.export.save(program, stream)
    elif name == "package":
        write_zip(path, {"rdf.yaml": b"", "weights.onnx": b""})
    elif name == "damaged archive":
        path.write_bytes(b"PK\x03\x04" + bytes(100))
    elif name == "damaged list of an archive":
        write_zip(path, {"rdf.yaml": b"", "weights.onnx": b""})
        path.write_bytes(path.read_bytes().replace(b"PK\x01\x02", b"PK\x01\x00"))
    elif name == "folder":
        path.mkdir()
    elif name == "noise":
        path.write_bytes(bytes(range(256)))
    elif name == "custom operator":
        write_graph(path, [helper.make_node("Magic", ["x"], ["y"], domain="com.lab")], SAME, SAME)
    elif name == "custom operator in a function":
        write_functions(path, [("Relu", {})], [("f0", {}), ("fMagic", {})])
    elif name in HOLDERS:
        write_graph(path, [helper.make_node(name, ["x"], ["y"], **HOLDERS[name])], SAME, SAME)
    elif name == "Loop in a function":
        write_functions(path, [("Loop", HOLDERS["Loop"])])
    elif name == "functions that multiply":
        write_functions(path, [("Relu", {})], *([(f"f{level}", {})] * 10 for level in range(9)))
    elif name == "function that calls itself":
        write_functions(path, [("f0", {})])
    elif name == "NaN":
        nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
        write_graph(path, nodes, SAME, SAME, {"w": np.array([np.nan], np.float32)})
    elif name == "NaN in a constant":
        value = numpy_helper.from_array(np.array([np.nan], np.float32))
        nodes = [helper.make_node("Constant", [], ["w"], value=value), helper.make_node("Add", ["x", "w"], ["y"])]
        write_graph(path, nodes, SAME, SAME)
    elif name == "opset":
        write_graph(path, [helper.make_node("Relu", ["x"], ["y"])], SAME, SAME, opset=9)
    elif name == "bytes":
        write_graph(path, [helper.make_node("Identity", ["x"], ["y"])], SAME, SAME, dtype=2)
    elif name == "enlarged":
        options = {"mode": "nearest"}
        nodes = [helper.make_node("Resize", ["x", "", "s"], ["y"], **options)]
        write_graph(path, nodes, ("n", 1, "h", "w"), ("n", 1, "h2", "w2"), {"s": np.float32([1, 1, 2, 2])})
    elif name == "mixed axes":
        nodes = [helper.make_node("Transpose", ["x"], ["y"], perm=[0, 2, 3, 1])]
        write_graph(path, nodes, ("n", 1, "h", "w"), ("n", "h", "w", 1))
    elif name == "integers":
        write_graph(path, [helper.make_node("Identity", ["x"], ["y"])], SAME, SAME, dtype=6)
    elif name == "outside":
        write_weights_beside(path, "../w.bin")
        (folder.parent / "w.bin").write_bytes(bytes(8000))
    elif name == "linked":
        write_weights_beside(path, "w.bin")
        (folder.parent / "w.bin").write_bytes(bytes(8000))
        (folder / "w.bin").symlink_to(folder.parent / "w.bin")
    elif name == "weights that multiply":
        write_weights_beside(path, "w.bin", count=40, values=8 << 20)
        with open(folder / "w.bin", "wb") as stream:
            stream.truncate(32 << 20)
    return path


@pytest.mark.parametrize(
    ("name", "words", "way_out"),
    [
        ("a pickle", "a pickle, which runs code", "convert it: torch.onnx.export"),
        ("state dict", "an archive of pickles by torch.save, which runs code", "convert it: torch.onnx.export"),
        ("TorchScript", "a TorchScript archive, which runs code", "convert it: torch.onnx.export"),
        ("pt2", "a .pt2 program of torch.export, which runs code", "convert it: torch.onnx.export"),
        ("package", "expected type: model in rdf.yaml, found NoneType", "name the package of a model"),
        ("damaged archive", "an archive that is damaged", "name the .onnx file in it"),
        ("damaged list of an archive", "an archive that is damaged", "name the .onnx file in it"),
        ("folder", "found a folder", "name the .onnx file in it"),
        ("noise", "expected an ONNX file", "write one: torch.onnx.export"),
        ("custom operator", "found com.lab.Magic", "export it without custom operators"),
        ("custom operator in a function", "found own.fMagic", "export it without custom operators"),
        ("If", "found If", "export it by tracing one image"),
        ("Loop", "found Loop", "export it by tracing one image"),
        ("Scan", "found Scan", "export it by tracing one image"),
        ("SequenceMap", "found SequenceMap", "export it by tracing one image"),
        ("Loop in a function", "found Loop", "export it by tracing one image"),
        ("functions that multiply", "at most 100000 operators, found 1000000000", "export it again"),
        ("function that calls itself", "found RecursionError", "write one: torch.onnx.export"),
        ("NaN", "NaN in w", "an earlier checkpoint"),
        ("NaN in a constant", "NaN in a constant", "an earlier checkpoint"),
        ("opset", "opset 9", "export it again with an opset from 11"),
        ("integers", "for the input, found x: int32 with 4 axes", "the card says how pixels become these"),
        ("bytes", "for the input, found x: uint8 with 4 axes", "the card says how pixels become these"),
        ("enlarged", "512 px for a tile of 256 px", "or export the model again"),
        ("mixed axes", "256 x 1 values for a tile of 256 px, if its layout is NCHW too", "or export the model again"),
        ("outside", "found weights in '../w.bin'", "save it in one file"),
        ("linked", "found weights in 'w.bin'", "save it in one file"),
        ("weights that multiply", "at most 1024 MiB with its weights, found 1280 MiB", "in float16"),
    ],
)
def test_what_could_run_code_or_cannot_run_is_refused_in_one_line_with_the_way_out(
    tmp_path, refusal, name, words, way_out
):
    (tmp_path / "card.toml").write_text(CARD.replace("rgb", "grey") if name in ("enlarged", "mixed axes") else CARD)
    file = broken(tmp_path, name)
    line = refusal("import-model", file, "--out", tmp_path / "b", "--card", tmp_path / "card.toml")
    assert words in line
    assert way_out in line.rpartition("; ")[2]
    assert not (tmp_path / "b").exists()


def test_functions_of_a_graph_are_its_operators(imported, tmp_path):
    write_functions(tmp_path / "a.onnx", [("Neg", {})], [("f0", {}), ("Relu", {})], [("f0", {}), ("f1", {})])
    card = CARD + 'channels = ["foreground", "a", "b"]'
    tiles = np.random.default_rng(0).normal(size=(1, 3, 32, 32)).astype(np.float32)
    logits = logits_of(imported(tmp_path / "a.onnx", card), tiles)
    np.testing.assert_array_equal(logits[:, 0], np.maximum(tiles[:, 0], 0))


def test_a_graph_that_changed_after_its_import_is_refused(file_of, imported):
    folder = imported(file_of("seg-res-net"))
    with open(folder / "model.onnx", "ab") as stream:
        stream.write(b"\0")
    with pytest.raises(ModelError, match="damaged, or of another model"):
        load_model(str(folder))


def test_a_bundle_whose_weights_lie_elsewhere_is_refused(two_stains, imported, refusal, monkeypatch, tmp_path):
    folder = imported(two_stains, STAINS.replace("KIND", "zscore"))
    model = onnx.load(folder / "model.onnx")
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    save_bundle(Bundle(Card.from_json((folder / "card.json").read_text()), graph=folder / "model.onnx"), folder)
    monkeypatch.chdir(folder)
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(80, 80, 2))
    flags = ["--model", folder, "--channel", "nuclei=0,membrane=1", "--backend", "onnxruntime"]
    for arguments in (("check-model", folder), ("run", path, *flags)):
        line = refusal(*arguments)
        assert "found weights in another file" in line
        assert line.endswith("import-model, which takes them in")


STAINS = """
[input]
channels = ["nuclei", "membrane"]
normalisation = {kind = "KIND", joint = false}
[output]
decoder = "mask"
"""


@pytest.fixture
def two_stains(tmp_path):
    """A file whose logit is the first channel less the second."""
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"])]
    weights = {"w": np.array([1, -1], np.float32).reshape(1, 2, 1, 1)}
    return write_graph(tmp_path / "stains.onnx", nodes, ("n", 2, "h", "w"), ("n", 1, "h", "w"), weights)


@pytest.mark.parametrize(
    ("dtype", "backend", "kind"),
    [("uint8", "openvino", "zscore"), ("uint16", "onnxruntime", "zscore"), ("uint8", "openvino", "percentile")],
)
def test_stains_are_chosen_by_role_and_normalised_each_for_itself(
    two_stains, imported, segment, tmp_path, dtype, backend, kind
):
    folder = imported(two_stains, STAINS.replace("KIND", kind))
    pixels = (blobs(180, 200, 5) * np.array([1, 0.2, 1, 0.7, 1])[:, None, None]).astype(dtype)
    pixels[1] += 40
    names = [{"label": name} for name in ("a", "membrane", "b", "DAPI", "c")]
    path = write_ome_zarr(tmp_path / "a.zarr", pixels, channels=names)
    report = segment(path, model=str(folder), backend=backend, tile=64, gate=False)
    assert report.slides[0].channels == ("DAPI", "membrane"), report.slides[0].reason
    chosen = pixels[[3, 1]].astype(np.float32)
    if kind == "zscore":
        low, span = chosen.mean((1, 2)), chosen.std((1, 2))
        normalised = (chosen - low[:, None, None]) / span[:, None, None]
    else:
        low, high = np.percentile(chosen, (0.1, 99.9), axis=(1, 2))
        normalised = np.clip((chosen - low[:, None, None]) / (high - low)[:, None, None], 0, 1)
    logits = normalised[0] - normalised[1]
    differ = labels_of(report) != (logits > 0)
    assert np.abs(logits[differ]).max(initial=0) < 1e-5
    named = segment(path, model=str(folder), backend=backend, tile=64, gate=False, name="b", channel="membrane=1")
    np.testing.assert_array_equal(labels_of(named), labels_of(report))
    swapped = segment(path, model=str(folder), backend=backend, tile=64, name="c", channel="nuclei=1,membrane=DAPI")
    assert swapped.slides[0].channels == ("membrane", "DAPI")


def test_a_model_of_two_stains_on_a_plate_of_five_channels_gives_what_onnx_runtime_gives(imported, command, tmp_path):
    network = SegResNet(2, 8, in_channels=2, out_channels=1, norm="batch", blocks_down=(1, 1), blocks_up=(1,))
    file = write_network(randomised(network, 2), tmp_path / "stains.onnx", channels=2)
    folder = imported(file, STAINS.replace("KIND", "percentile"))
    card = load_model(str(folder)).card
    fields = [blobs(230, 250, 5, seed) * np.uint16(100 + 50 * seed) for seed in range(4)]
    names = [{"label": name} for name in ("actin", "cells", "ER", "Hoechst", "RNA")]
    plate = write_plate(tmp_path / "plate.zarr", ["A/1", "B/2"], ["0", "1"], images=fields, channels=names)
    flags = ["--channel", "membrane=cells", "--backend", "onnxruntime", "--margin", "exact", "--tile", 192]
    code, output = command("run", plate, "--model", folder, *flags, "--output", tmp_path / "out")
    assert code == 0, output
    for place, field in zip(("A/1/0", "A/1/1", "B/2/0", "B/2/1"), fields, strict=True):
        stains = field[[3, 1]].astype(np.float32)
        low, high = (values[:, None, None] for values in np.percentile(stains, (0.1, 99.9), axis=(1, 2)))
        normalised = np.clip((stains - low) / (high - low), 0, 1)
        logits = untiled(file, normalised, card.exact_margin, card.total_stride)[0]
        mask = zarr.open_array(f"{tmp_path}/out/plate.zarr/{place}/labels/cellseg/0", mode="r")[...]
        assert 0.1 < mask.mean() < 0.9
        differ = mask != (logits > 0)
        assert np.abs(logits[differ]).max(initial=0) < 1e-4


@pytest.mark.parametrize("asked", ["DAPI", "nuclei=0", "nuclei=0,cells=1", "nuclei=0,nuclei=1", None])
def test_a_stain_that_nobody_names_is_asked_for(two_stains, imported, segment, tmp_path, asked):
    folder = imported(two_stains, STAINS.replace("KIND", "percentile"))
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(80, 80, 2), channels=[{"label": "DAPI"}, {"label": "actin"}])
    report = segment(path, model=str(folder), backend="onnxruntime", tile=64, channel=asked)
    assert report.slides[0].status == "failed"
    assert "`channel=nuclei=0,membrane=1`" in report.slides[0].reason


def test_values_of_the_card_are_neither_sampled_nor_clipped(two_stains, imported, segment, tmp_path):
    card = STAINS.replace('kind = "KIND"', 'kind = "linear", low = [10, 20], high = [30, 70], per_tile = true')
    folder = imported(two_stains, card)
    pixels = blobs(100, 130, 2)
    path = write_ome_zarr(tmp_path / "a.zarr", pixels)
    report = segment(path, model=str(folder), backend="onnxruntime", tile=64, channel="nuclei=0,membrane=1")
    logits = (pixels[0] - np.float32(10)) / 20 - (pixels[1] - np.float32(20)) / 50
    differ = labels_of(report) != (logits > 0)
    assert np.abs(logits[differ]).max(initial=0) < 1e-5
    assert any("normalised each for itself" in note for note in report.slides[0].notes)


CLASSES = """
[input]
channels = ["grey"]
normalisation = {kind = "linear", low = 0, high = 255}
[output]
decoder = "classes"
classes = ["dim", "bright"]
margin = 0
"""


def classes_of(folder, end):
    """Write a graph of two classes: dim pixels from 0.3 on, bright ones from 0.6 on; with or without background."""
    names = {"Softmax": ("background", "dim", "bright"), "Sigmoid": ("dim", "bright")}[end]
    weights = {"background": (0, 0), "dim": (10, -3), "bright": (20, -9)}
    w, b = (np.array([weights[name][part] for name in names], np.float32) for part in (0, 1))
    options = {"axis": 1} if end == "Softmax" else {}
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["z"]), helper.make_node(end, ["z"], ["y"], **options)]
    shape, gives = ("n", 1, "h", "w"), ("n", len(names), "h", "w")
    return write_graph(folder / f"{end}.onnx", nodes, shape, gives, {"w": w.reshape(-1, 1, 1, 1), "b": b})


@pytest.mark.parametrize(("end", "backend"), [("Softmax", "onnxruntime"), ("Sigmoid", "openvino")])
def test_classes_are_numbered_named_and_counted(imported, segment, tmp_path, end, backend):
    folder = imported(classes_of(tmp_path, end), CLASSES)
    pixels = blobs(150, 170, 1)
    path = write_ome_zarr(tmp_path / "a.zarr", pixels)
    values = pixels[0] / np.float32(255)
    dim, bright = 10 * values - 3, 20 * values - 9
    expected = np.where(np.maximum(dim, bright) > 0, np.where(bright > dim, 2, 1), 0)
    for block in (60, 300):
        report = segment(
            path, model=str(folder), backend=backend, tile=64, block=block, gate=False, name=f"b{block}",
            skip_background="off", probability=True,
        )  # fmt: skip
        slide = report.slides[0]
        labels = labels_of(report)
        close = np.minimum(np.abs(np.maximum(dim, bright)), np.abs(bright - dim)) < 1e-4
        np.testing.assert_array_equal(labels[~close], expected[~close])
        assert slide.tiles > 5
        assert slide.classes == {"dim": np.mean(labels == 1), "bright": np.mean(labels == 2)}
        assert slide.foreground_fraction == pytest.approx(np.mean(labels > 0))
    about = zarr.open_group(slide.labels, mode="r").attrs["ome"]["image-label"]
    assert about["properties"] == [{"label-value": 1, "class": "dim"}, {"label-value": 2, "class": "bright"}]
    assert [entry["label-value"] for entry in about["colors"]] == [1, 2]
    probability = zarr.open_array(f"{slide.outputs['probability']}/0", mode="r")[...]
    sure = 1 / (1 + np.exp(-np.maximum(dim, bright).astype(np.float64)))
    assert np.abs(probability - 255 * sure).max() < 2
    ids = [
        labels_of(segment(path, model=str(folder), backend=backend, tile=64, gate=False, name=f"ids{block}",
                          skip_background="off", instances=True, block=block, workers=workers))
        for block, workers in ((60, 4), (300, 1))
    ]  # fmt: skip
    np.testing.assert_array_equal(*ids)
    whole = ndimage.label(labels)[0]
    kept = np.bincount(whole.ravel())[whole] >= load_model(str(folder)).card.instances.smallest_seed
    expected_ids = np.where(kept, whole, 0)
    pairs = np.unique(np.stack([ids[0], expected_ids]).reshape(2, -1), axis=1).T
    assert len(pairs) == ids[0].max() + 1 == len(np.unique(expected_ids)) > 4, "objects are the components"
    blended = segment(path, model=str(folder), backend=backend, tile=64, stitch="blend", margin=8, name="blend")
    assert f"the classes of {folder.name}" in blended.slides[0].reason


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_classes_of_a_softmax_without_background_leave_none(imported, segment, tmp_path, backend):
    weights = {"w": np.float32([10, 20]).reshape(2, 1, 1, 1), "b": np.float32([-30, -36])}  # all logits are below 0
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["z"]), helper.make_node("Softmax", ["z"], ["y"], axis=1)]
    file = write_graph(tmp_path / "a.onnx", nodes, ("n", 1, "h", "w"), ("n", 2, "h", "w"), weights)
    pixels = blobs(100, 130, 1)
    path = write_ome_zarr(tmp_path / "a.zarr", pixels)
    report = segment(path, model=str(imported(file, CLASSES)), backend=backend, tile=64, gate=False)
    away = np.abs(pixels[0] / 255 - 0.6) > 0.01
    np.testing.assert_array_equal(labels_of(report)[away], np.where(pixels[0] / 255 > 0.6, 2, 1)[away])


def test_outputs_that_could_be_either_are_refused(imported, tmp_path):
    weights = {"w": np.random.default_rng(0).normal(size=(3, 1, 4, 4)).astype(np.float32)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER"),
        helper.make_node("Conv", ["x", "w"], ["z"], strides=[4, 4]),
    ]
    shapes = ("n", 1, "h", "w"), ("n", 3, "h2", "w2")
    file = write_graph(tmp_path / "a.onnx", nodes, *shapes, weights, outputs=("y", "z"))
    hover = CARD.replace("rgb", "grey").replace("mask", "hover")
    sayings = {
        CLASSES + 'tensors = [{name = "y", channels = ["dim", "bright", "glass"]}]': "or classes of all, found glass",
        CLASSES + 'tensors = [{name = "y", channels = ["dim", "bright", "dim"]}]': "one of dim, found several",
        hover
        + """tensors = [
            {name = "y", channels = ["foreground", "horizontal", "a"]}, {name = "z", channels = ["vertical", "b", "c"]}
        ]""": "y of 256 x 256, z of 64 x 64 values for a tile of 256 px",
    }
    for number, (card, words) in enumerate(sayings.items()):
        with pytest.raises(ModelError, match=words):
            imported(file, card, name=f"b{number}")


@pytest.mark.slow
def test_an_exported_network_of_ours_comes_back_with_its_card(tiny_model, tiny_bundle, command, segment, tmp_path):
    file, folder = tmp_path / "tiny.onnx", tmp_path / "back"
    assert command("export", tiny_model, "--format", "onnx", "--tile", 64, "--out", file)[0] == 0
    card = import_model(file, folder).card
    ours = tiny_bundle.card
    same = ("name", "input", "decoder", "total_stride", "exact_margin", "margin", "instances", "threshold")
    assert [getattr(card, name) for name in same] == [getattr(ours, name) for name in same]
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(200, 230))
    labels = []
    for model in (tiny_model, folder):
        backend = "torch" if model == tiny_model else "onnxruntime"
        report = segment(path, model=str(model), backend=backend, name=backend, instances=True, downscale=2)
        assert report.slides[0].objects > 3
        labels.append(labels_of(report))
    assert np.mean((labels[0] > 0) != (labels[1] > 0)) < 1e-4
    code, output = command("export", folder, "--format", "onnx", "--out", tmp_path / "again.onnx")
    assert code == 2
    assert "is a graph already" in output
