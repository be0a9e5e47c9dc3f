"""Backends agree with the reference, the gate refuses those that do not, and nothing leaves the machine."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
import torch

from cellseg_batch.engine.errors import BackendError, ModelError
from cellseg_batch.engine.inference.backends import openvino_cpu, registry
from cellseg_batch.engine.inference.backends.gate import count_matches, limits_of, logits_of, measure_parity, real_tiles
from cellseg_batch.engine.inference.backends.registry import candidates, make_backend, why_not
from cellseg_batch.engine.inference.decoders import DECODERS
from cellseg_batch.engine.inference.normalise import Bounds
from cellseg_batch.engine.inference.race import worst_parity
from cellseg_batch.engine.inference.race_result import Candidate, RaceResult, Request
from cellseg_batch.engine.models import build_torch_network, load_model, shipped_models
from cellseg_batch.engine.storage.cache import Artefacts
from cellseg_batch.trainer.bundle import Bundle, save_bundle
from cellseg_batch.trainer.card import ModelClass, plain_output
from cellseg_batch.trainer.unet import build_network
from tests.support.networks import trained

EVERY = [name for name in candidates("safetensors", "auto", "auto") if not why_not(*name)]
STRICT = limits_of("fp32")
MODEL = DECODERS["seeds"]
FLOATS = [name for name in EVERY if name[1] in ("fp32", "bf16")]


def make(bundle, name, precision):
    return make_backend(bundle, name, precision, 2, Artefacts())


@pytest.mark.parametrize(("name", "precision"), FLOATS)
def test_backends_agree_with_the_plain_network(tiny_bundle, name, precision):
    batch = np.random.default_rng(0).random((2, 3, 64, 96), np.float32)
    logits = make(tiny_bundle, name, precision).compile(batch.shape)(batch)
    with torch.inference_mode():
        expected = build_torch_network(tiny_bundle)(torch.from_numpy(batch)).numpy()
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits, expected, atol=scale * (2e-5 if precision == "fp32" else 3e-2))


@pytest.mark.skipif(("openvino", "bf16") not in EVERY, reason="the processor has no bf16")
def test_filters_of_edges_at_the_start_are_computed_in_floats(tiny_bundle, tmp_path, monkeypatch):
    network = trained(build_network({"name": "unet-efficientnet-lite0", "outputs": 3, "width": 12, "depth": 2}))
    edges = torch.tensor([[-1.0, -1, -1], [-1, 8, -1], [-1, -1, -1]]) * 10.1
    network.encoder._blocks[0]._depthwise_conv.weight.data[:] = edges
    weights = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    card = replace(
        tiny_bundle.card,
        architecture={"name": "unet-efficientnet-lite0", "outputs": 3, "width": 12, "depth": 2},
        total_stride=4,
    )
    bundle = Bundle(card, weights)
    pixels = np.random.default_rng(0).uniform(0.5, 0.6, (1, 3, 64, 96)).astype(np.float32)
    with torch.inference_mode():
        expected = network(torch.from_numpy(pixels)).numpy()

    def error():
        backend = make_backend(bundle, "openvino", "bf16", 2, Artefacts())
        return np.abs(backend.compile(pixels.shape)(pixels) - expected).mean()

    kept = error()
    monkeypatch.setenv("CELLSEG_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(openvino_cpu, "_edge_filters", lambda model: [])
    assert kept < error() / 2


@pytest.mark.parametrize(("name", "precision"), EVERY)
def test_the_foreground_is_the_same_without_the_other_outputs(tiny_bundle, name, precision):
    batch = np.random.default_rng(0).random((1, 3, 64, 96), np.float32)
    bundles = (DECODERS["seeds"].network(tiny_bundle, instances=instances) for instances in (True, False))
    everything, alone = (make(bundle, name, precision).compile(batch.shape)(batch) for bundle in bundles)
    assert (everything.shape[1], alone.shape[1]) == (3, 1)
    if name == "openvino" and precision != "int8":
        np.testing.assert_array_equal(alone, everything[:, :1])
    else:  # another kernel for another number of outputs rounds differently
        atol = np.abs(everything).max() * (1e-6 if precision == "fp32" else 3e-2)
        np.testing.assert_allclose(alone, everything[:, :1], atol=atol)


@pytest.mark.parametrize(("name", "precision"), EVERY)
def test_a_tiles_result_does_not_depend_on_its_batch(tiny_bundle, name, precision):
    tiles = np.random.default_rng(0).random((4, 3, 64, 64), np.float32)
    backend = make(tiny_bundle, name, precision)
    together = backend.compile(tiles.shape)(tiles).copy()
    single = backend.compile((1, *tiles.shape[1:]))
    for tile, expected in zip(tiles, together, strict=True):
        np.testing.assert_allclose(single(tile[None])[0], expected, atol=1e-5)


# Bytes that are 0 and 1 in the gate tiles.
BYTES = Bounds((0.0,) * 3, (255.0,) * 3)


@pytest.fixture(scope="module")
def shipped():
    """The shipped model, its gate tiles and their logits in torch fp32."""
    bundle = load_model("nuclei")
    tiles = real_tiles("gate", bundle.card.input.count)
    return bundle, tiles, gate_logits(make(bundle, "torch", "fp32"), tiles)


def gate_logits(backend, tiles):
    return logits_of(backend.compile((1, *tiles.shape[1:])), tiles)


@pytest.mark.parametrize("precision", [precision for name, precision in FLOATS if name == "openvino"])
def test_the_shipped_model_passes_the_gate(shipped, precision):
    bundle, tiles, expected = shipped
    bounds = Bounds((0.0,), (255.0,), True)
    parity = worst_parity(make(bundle, "openvino", precision), tiles, expected, 0.5, MODEL, bounds)
    assert parity.within(limits_of(precision)), parity
    assert parity.objects >= 2000, "the gate must hold enough objects to mean something"


def first_convolution(network):
    return next(module for module in network.modules() if isinstance(module, torch.nn.Conv2d))


def shift_features(network):
    """Move the features by a pixel, as padding at the other side does in another library."""
    first_convolution(network).register_forward_hook(
        lambda convolution, pixels, features: torch.roll(features, 1, dims=3)
    )


def overflow(network):
    """What fp16 makes of hidden values beyond 65504, were the largest twice that: infinity, and NaN further on."""
    network.encoder._blocks[0].register_forward_hook(  # no clamp follows it
        lambda block, pixels, features: torch.where(features > features.max() / 2, torch.inf, features)
    )


def swap_channels(network):
    """Take red for blue."""
    with torch.no_grad():
        weight = first_convolution(network).weight
        weight[:] = weight[:, [2, 1, 0]]


@pytest.mark.parametrize("spoil", [shift_features, overflow, swap_channels])
def test_the_gate_refuses_a_broken_backend_and_names_its_figures(shipped, spoil):
    bundle, tiles, expected = shipped
    broken = make(bundle, "torch", "fp32")
    spoil(broken._network)
    parity = measure_parity(gate_logits(broken, tiles), expected, 0.5, MODEL)
    request = Request("nuclei", "auto", "auto", (512, 512), 1, 2)
    row = Candidate("torch", "fp32", "", 1.0, 1.0, 1.0, parity)
    race_result = RaceResult(request, bundle.sha256, (1, 3, 512, 512), "", (), {}, "", (row,))
    with pytest.raises(BackendError) as refusal:
        race_result.pick("auto", "auto")
    flips, objects = f"flips {parity.flipped:.1e} of the pixels", f"objects match with F1 {parity.object_f1:.4f}"
    assert f"torch fp32 {flips} (limit 5e-04), {objects} (limit 0.995)" in str(refusal.value)
    assert ("NaN among its logits" in str(refusal.value)) == (spoil is overflow)


def test_a_single_nan_is_refused_and_named():
    expected = np.full((1, 1, 512, 512), -5.0, np.float32)
    logits = expected.copy()
    logits[0, 0, 0, 0] = np.nan
    parity = measure_parity(logits, expected, 0.5, MODEL)
    assert parity.flipped == 0
    assert not parity.within(STRICT)
    assert "NaN among its logits" in parity.text(STRICT)
    assert "NaN" not in replace(parity, max_dp=0.0).text(STRICT)


def test_the_gate_looks_at_both_ways_into_a_network(shipped):
    bundle, tiles, expected = shipped
    backend = make(bundle, "openvino", "fp32")
    assert worst_parity(backend, tiles[:2], expected[:2], 0.5, MODEL, BYTES).within(STRICT)
    right = backend.compile_bytes((1, *tiles.shape[1:]))
    backend.compile_bytes = lambda shape: lambda batch, low, scale: right(255 - batch, low, scale)
    assert not worst_parity(backend, tiles[:2], expected[:2], 0.5, MODEL, BYTES).within(STRICT)


def test_the_gate_notices_lost_objects_that_hardly_cost_a_pixel():
    expected = np.full((1, 1, 512, 512), -5.0, np.float32)
    for number in range(100):
        y, x = divmod(number, 10)
        expected[0, 0, 50 * y : 50 * y + 6, 50 * x : 50 * x + 6] = 5
    logits = expected.copy()
    logits[0, 0, :6, :6] = logits[0, 0, 50:56, 50:56] = -5
    parity = measure_parity(logits, expected, 0.5, MODEL)
    assert parity.flipped < 5e-4
    assert parity.object_f1 == pytest.approx(2 * 98 / 198)
    assert parity.object_f1 < STRICT.object_f1
    assert parity.object_change == pytest.approx(-0.02)
    assert not parity.within(STRICT)


def test_objects_are_matched_at_iou_one_half():
    labels, reference = np.array([[1, 1, 0, 2, 2, 2, 2]]), np.array([[3, 3, 0, 0, 0, 4, 4]])
    assert count_matches(labels, reference) == 1
    assert count_matches(np.zeros((2, 2), int), np.zeros((2, 2), int)) == 0


def test_gate_and_calibration_share_no_image():
    folder = files("cellseg_batch.engine") / "assets"
    images = [json.loads((folder / part / "about.json").read_text())["images"] for part in ("gate", "calibration")]
    gate, calibration = ({name for ids in part.values() for name in ids} for part in images)
    assert len(gate) >= 40
    assert not gate & calibration


def test_a_backend_that_is_not_there_says_why(tiny_bundle, monkeypatch):
    with pytest.raises(BackendError, match="no such backend"):
        make(tiny_bundle, "tvm", "fp16")
    with pytest.raises(BackendError, match="NVIDIA GPU"):
        make(tiny_bundle, "tensorrt", "fp16")
    with pytest.raises(BackendError, match="offers fp32, bf16"):
        make(tiny_bundle, "torch", "int8")
    monkeypatch.setattr(registry, "package_version", lambda name: "1.0")
    assert why_not("openvino", "int8") == ""
    monkeypatch.setattr(registry, "package_version", lambda name: None)
    assert why_not("openvino", "int8") == "needs nncf; pip install 'cellseg-batch[int8]'"
    monkeypatch.setitem(sys.modules, "cellseg_batch.engine.inference.backends.openvino_cpu", None)
    assert why_not("openvino", "fp32").endswith("pip install openvino")


def test_unknown_models_and_wrong_weights_are_refused(tiny_bundle, tmp_path):
    with pytest.raises(ModelError, match=", ".join(shipped_models())):
        load_model("no-such-model")
    other = replace(tiny_bundle.card, architecture={**tiny_bundle.card.architecture, "width": 8})
    with pytest.raises(ModelError, match="another architecture"):
        build_torch_network(replace(tiny_bundle, card=other))
    unknown = replace(tiny_bundle.card, architecture={"name": "transformer"})
    with pytest.raises(ModelError, match="newer version"):
        build_torch_network(replace(tiny_bundle, card=unknown))
    for changes, words in (
        ({"decoder": "rays"}, "one of mask, seeds, classes, hover, stardist, found 'rays'"),
        ({"decoder": "mask"}, "foreground for the decoder mask, found foreground, border, distance"),
        ({"output": plain_output("background", "tumour", "stroma")}, "found background, tumour, stroma"),
        ({"version": 1}, "a card of version 1 where this version reads 2"),
        ({"classes": (ModelClass("a", "#00c800"),)}, "border, distance, a for the decoder seeds, found foreground"),
        ({"classes": (ModelClass("border", "#00c800"),)}, "names of their own, found border"),
        ({"classes": ({"name": "a", "colour": "red"},)}, "such as #c80000, not 'red'"),
    ):
        save_bundle(replace(tiny_bundle, card=replace(tiny_bundle.card, **changes)), tmp_path)
        with pytest.raises(ModelError, match=words):
            load_model(str(tmp_path))
    save_bundle(tiny_bundle, tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"\x10")
    with pytest.raises(ModelError, match="damaged"):
        load_model(str(tmp_path))
    for text, words in (
        ('{"name": "x"}', "a card of version 1"),
        ('{"version": 2}', "not a model card"),
        ("[]", "card"),
    ):
        (tmp_path / "card.json").write_text(text)
        with pytest.raises(ModelError, match=words):
            load_model(str(tmp_path))
    card = tiny_bundle.card.to_json()
    (tmp_path / "card.json").write_text(card.replace('"crop": 0', '"crop": 0, "colour": 1'))
    with pytest.raises(ModelError, match="unknown field colour of output"):
        load_model(str(tmp_path))


def test_one_changed_weight_changes_the_hash(tiny_bundle):
    weights = {name: array.copy() for name, array in tiny_bundle.weights.items()}
    weights["head.bias"][0] += 1
    assert replace(tiny_bundle, weights=weights).sha256 != tiny_bundle.sha256
    assert replace(tiny_bundle).sha256 == tiny_bundle.sha256


def test_openvino_never_looks_up_a_host(tmp_path):
    """Its telemetry would, at import, unless CI is set: so run it without, with every way out blocked."""
    code = """
import socket, sys
def refuse(*arguments, **keywords):
    print("NETWORK", arguments, flush=True)
    raise OSError("no network in this test")
socket.socket.connect = socket.getaddrinfo = socket.gethostbyname = refuse
import cellseg_batch.engine.inference.backends.openvino_cpu as backend
backend.supported_precisions()
import time; time.sleep(0.5)
print("done")
"""
    environment = {key: value for key, value in os.environ.items() if key != "CI"} | {"HOME": str(tmp_path)}
    output = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert output.split() == ["done"]
    assert not [path for path in tmp_path.rglob("*") if "intel" in path.name.lower()]
