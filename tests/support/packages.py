"""Packages as the BioImage Model Zoo has them, made to the specification by hand, and ways to break them."""

import hashlib
import io
import json
import zipfile

import numpy as np
import onnxruntime
from onnx import helper

from tests.support.graphs import write_graph
from tests.support.images import blobs

CHANNELS, SIDE = 3, 64


def write_weights(path, side=None, opset=17, channels=CHANNELS, weights=None):
    """Write a network of two convolutions that sees 2 px; returns the path."""
    rng = np.random.default_rng(0)
    arrays = {
        "w1": rng.normal(0, 0.3, (4, channels, 3, 3)).astype(np.float32),
        "w2": rng.normal(0, 0.6, (1, 4, 3, 3)).astype(np.float32),
        "b2": np.float32([-0.4]),
    } | (weights or {})
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("Conv", ["r", "w2", "b2"], ["y"], pads=[1] * 4),
    ]
    sides = [side, side] if side else ["h", "w"]
    batch = 1 if side else "n"
    return write_graph(path, nodes, (batch, channels, *sides), (batch, 1, *sides), arrays, opset=opset)


def normalised(pixels, version):
    """Pixels (C, H, W) as the package's preprocessing makes them: 0.5 asks the image, 0.4 has values of its own."""
    pixels = pixels.astype(np.float32)
    if version == "0.5":
        return (pixels - pixels.mean()) / pixels.std()
    return (pixels - np.float32([100, 110, 120]).reshape(3, 1, 1)) / np.float32([50, 60, 70]).reshape(3, 1, 1)


def sha256_of(content):
    return hashlib.sha256(content).hexdigest()


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def good_package(folder, version):
    """The files of a package: name -> content, and its description; 0.4 is of one size, 0.5 of many."""
    path = write_weights(folder / "weights.onnx", SIDE if version == "0.4" else None)
    tile = blobs(SIDE, SIDE).astype(np.float32)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"x": normalised(tile, version)[None].astype(np.float32)})
    files = {
        "weights.onnx": path.read_bytes(),
        "test_input.npy": npy(tile[None]),
        "test_output.npy": npy((1 / (1 + np.exp(-logits))).astype(np.float32)),
        "README.md": b"# Validation\n",
    }
    return files, (description_0_4 if version == "0.4" else description_0_5)(files)


def description_0_4(files):
    return {
        **about("0.4.10"),
        "inputs": [
            {
                "name": "raw",
                "axes": "bcyx",
                "data_type": "float32",
                "shape": [1, CHANNELS, SIDE, SIDE],
                "preprocessing": [
                    {
                        "name": "zero_mean_unit_variance",
                        "kwargs": {"mode": "fixed", "axes": "yx", "mean": [100, 110, 120], "std": [50, 60, 70]},
                    }
                ],
            }
        ],
        "outputs": [
            {
                "name": "cells",
                "axes": "bcyx",
                "data_type": "float32",
                "shape": [1, 1, SIDE, SIDE],
                "halo": [0, 0, 8, 8],
                "postprocessing": [{"name": "sigmoid"}],
            }
        ],
        "test_inputs": ["test_input.npy"],
        "test_outputs": ["test_output.npy"],
        "weights": {
            "onnx": {"source": "weights.onnx", "sha256": sha256_of(files["weights.onnx"]), "opset_version": 17}
        },
    }


def description_0_5(files):
    def tensor(name):
        return {"source": name, "sha256": sha256_of(files[name])}

    def space(size, **other):
        return [
            {"type": "space", "id": axis, "unit": "nanometer", "scale": 250, **size(axis), **other} for axis in "yx"
        ]

    return {
        **about("0.5.4"),
        "inputs": [
            {
                "id": "raw",
                "axes": [
                    {"type": "batch"},
                    {"type": "channel", "channel_names": ["Red", "Green", "Blue"]},
                    *space(lambda axis: {"size": {"min": 32, "step": 8}}),
                ],
                "data": {"type": "float32"},
                "test_tensor": tensor("test_input.npy"),
                "preprocessing": [{"id": "zero_mean_unit_variance", "kwargs": {"axes": ["channel", "y", "x"]}}],
            }
        ],
        "outputs": [
            {
                "id": "cells",
                "axes": [
                    {"type": "batch"},
                    {"type": "channel", "channel_names": ["foreground"]},
                    *space(lambda axis: {"size": {"tensor_id": "raw", "axis_id": axis}}, halo=8),
                ],
                "data": {"type": "float32"},
                "test_tensor": tensor("test_output.npy"),
                "postprocessing": [{"id": "sigmoid"}],
            }
        ],
        "weights": {"onnx": {**tensor("weights.onnx"), "opset_version": 17}},
    }


def about(version):
    return {
        "type": "model",
        "format_version": version,
        "name": "Cells of a test",
        "description": "It finds bright blobs.",
        "authors": [{"name": "Ada Author"}, {"name": "Bo Author"}],
        "cite": [{"text": "A paper", "doi": "10.1234/cells"}],
        "license": "CC-BY-4.0",
        "documentation": "README.md",
        "timestamp": "2024-05-01T00:00:00",
        "tags": ["nuclei"],
    }


def write_package(path, files, description):
    """Write a package as a zip archive or a folder, by the name of ``path``; returns it."""
    files = {"rdf.yaml": json.dumps(description).encode(), **files}
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        path.mkdir()
        for name, content in files.items():
            (path / name).write_bytes(content)
    return path
