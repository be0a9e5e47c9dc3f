"""Backends agree with the reference, the gate refuses those that do not, and nothing leaves the machine."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from cellseg_batch.engine.backends import choose
from cellseg_batch.engine.backends.choose import available_precisions, choose_backend, make_backend
from cellseg_batch.engine.backends.parity import gate_tiles, measure_parity
from cellseg_batch.engine.errors import BackendError, ModelError
from cellseg_batch.engine.models import build_torch_network, load_model, shipped_models
from cellseg_batch.trainer.bundle import save_bundle

EVERY = [(name, precision) for name in ("torch", "openvino") for precision in available_precisions(name)]


@pytest.mark.parametrize(("name", "precision"), EVERY)
def test_backends_agree_with_the_plain_network(tiny_bundle, name, precision):
    import torch

    batch = np.random.default_rng(0).random((2, 3, 64, 96), np.float32)
    logits = make_backend(tiny_bundle, name, precision, threads=2).compile(batch.shape)(batch)
    with torch.inference_mode():
        expected = build_torch_network(tiny_bundle)(torch.from_numpy(batch)).numpy()
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits, expected, atol=scale * (2e-5 if precision == "fp32" else 3e-2))


@pytest.mark.parametrize(("name", "precision"), EVERY)
def test_a_tiles_result_does_not_depend_on_its_batch(tiny_bundle, name, precision):
    tiles = np.random.default_rng(0).random((4, 3, 64, 64), np.float32)
    backend = make_backend(tiny_bundle, name, precision, threads=2)
    together = backend.compile(tiles.shape)(tiles).copy()
    single = backend.compile((1, *tiles.shape[1:]))
    for tile, expected in zip(tiles, together, strict=True):
        np.testing.assert_allclose(single(tile[None])[0], expected, atol=1e-5)


@pytest.mark.parametrize(("name", "precision"), EVERY)
def test_the_shipped_model_passes_the_gate(name, precision):
    bundle = load_model("nuclei")
    reference = make_backend(bundle, "torch", "fp32", threads=2)
    parity = measure_parity(make_backend(bundle, name, precision, 2), reference, gate_tiles(bundle), 0.5)
    assert parity.passed, parity


class Wrong:
    """A backend that is wrong in a chosen way."""

    name, precision, version = "wrong", "bf16", "0"

    def __init__(self, inner, spoil):
        self._inner, self._spoil = inner, spoil

    def compile(self, shape):
        model = self._inner.compile(shape)
        return lambda batch: self._spoil(model, batch)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda model, batch: model(batch[:, ::-1].copy()),
        lambda model, batch: model(batch) * np.float32(np.nan),
        lambda model, batch: np.roll(model(batch), 2, axis=3),
    ],
    ids=["channels swapped", "overflow", "shifted"],
)
def test_the_gate_refuses_wrong_results(spoil):
    bundle = load_model("nuclei")
    reference = make_backend(bundle, "torch", "fp32", threads=2)
    assert not measure_parity(Wrong(reference, spoil), reference, gate_tiles(bundle), 0.5).passed


def test_auto_falls_back_when_a_backend_is_missing_or_fails_the_gate(tiny_bundle, monkeypatch):
    offered = {"tensorrt": (), "openvino": (), "torch": ("fp32", "bf16")}
    monkeypatch.setattr(choose, "available_precisions", offered.__getitem__)
    monkeypatch.setattr(choose, "FLIPPED_LIMIT", -1.0)
    monkeypatch.setattr("cellseg_batch.engine.backends.parity.FLIPPED_LIMIT", -1.0)
    chosen = choose_backend(tiny_bundle, "auto", "auto", threads=2)
    assert (chosen.name, chosen.precision) == ("torch", "fp32")
    with pytest.raises(BackendError, match="bf16 flips"):
        choose_backend(tiny_bundle, "torch", "bf16", threads=2)


def test_a_backend_that_is_not_there_is_refused(tiny_bundle):
    with pytest.raises(BackendError, match="tensorrt"):
        choose_backend(tiny_bundle, "tensorrt", "auto", threads=2)


def test_unknown_models_and_wrong_weights_are_refused(tiny_bundle, tmp_path):
    with pytest.raises(ModelError, match=", ".join(shipped_models())):
        load_model("no-such-model")
    other = replace(tiny_bundle.card, architecture={**tiny_bundle.card.architecture, "width": 8})
    with pytest.raises(ModelError, match="another architecture"):
        build_torch_network(replace(tiny_bundle, card=other))
    unknown = replace(tiny_bundle.card, architecture={"name": "transformer"})
    with pytest.raises(ModelError, match="newer version"):
        build_torch_network(replace(tiny_bundle, card=unknown))
    save_bundle(tiny_bundle, tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"\x10")
    with pytest.raises(ModelError, match="damaged"):
        load_model(str(tmp_path))
    (tmp_path / "card.json").write_text('{"name": "x"}')
    with pytest.raises(ModelError, match="card"):
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
import cellseg_batch.engine.backends.openvino_backend as backend
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
