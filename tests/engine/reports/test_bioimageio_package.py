"""Packages of the BioImage Model Zoo: the good ones run as their authors' network does, the broken ones are refused."""

import json
import pickle
import socket
import sys
import zipfile

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from cellseg_batch.engine.models import load_model
from cellseg_batch.engine.reports import bioimageio_package
from cellseg_batch.engine.reports.expected_output import read_expected_output
from cellseg_batch.engine.reports.import_model import import_model
from tests.support.graphs import untiled, write_graph
from tests.support.images import blobs, labels_of, write_ome_zarr
from tests.support.packages import (
    SIDE,
    good_package,
    normalised,
    npy,
    sha256_of,
    write_package,
    write_weights,
)

CARD = """
[input]
channels = ["rgb"]
[output]
decoder = "mask"
"""
# Of the same cells, as either version says it.
VERSIONS = {"0.4": "package", "0.5": "package.zip"}


@pytest.fixture
def card(tmp_path):
    (tmp_path / "card.toml").write_text(CARD)
    return tmp_path / "card.toml"


def arranged(tmp_path, version, change=None):
    """Write a package after ``change(files, description)``; returns its path."""
    files, description = good_package(tmp_path, version)
    if change is not None:
        change(files, description)
    return write_package(tmp_path / VERSIONS[version], files, description)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_package_is_imported_and_runs_as_onnx_runtime_does(tmp_path, card, segment, monkeypatch, version):
    def refuse(*_):
        raise AssertionError("the network was asked")

    package = arranged(tmp_path, version)
    with monkeypatch.context() as patched:
        patched.setattr(socket.socket, "connect", refuse)
        patched.setattr(socket, "getaddrinfo", refuse)
        imported = import_model(package, tmp_path / "bundle", card)
    found = imported.card
    assert (found.name, found.licence) == ("Cells of a test", "CC-BY-4.0")
    assert found.citation == "A paper (https://doi.org/10.1234/cells)"
    assert found.training == {"authors": "Ada Author, Bo Author", "documentation": "README.md"}
    assert (found.margin, found.input.size.fixed) == (8, SIDE if version == "0.4" else None)
    assert found.input.pixel_size_um == (None if version == "0.4" else pytest.approx(0.25))
    assert ("normalised each for itself" in " ".join(found.notes)) == (version == "0.5")
    assert only_agreement(tmp_path / "bundle").agrees
    pixels = blobs(150, 170)
    # The weights of 0.4 are those of tiles of one size; the same for any give the untiled result.
    logits = untiled(write_weights(tmp_path / "any.onnx"), normalised(pixels, version), 8, 8)[0]
    path = write_ome_zarr(tmp_path / "a.zarr", pixels)
    for block in (64, 300):
        name = f"b{block}"
        report = segment(path, model=str(tmp_path / "bundle"), backend="onnxruntime", tile=SIDE, block=block, name=name)
        differ = labels_of(report) != (logits > 0)
        assert 0.05 < labels_of(report).mean() < 0.95
        assert np.abs(logits[differ]).max(initial=0) < 1e-4


def test_weights_in_a_file_of_their_own_are_taken_and_bounded_together(tmp_path, card, refusal, monkeypatch):
    def parted(files, description):
        files["weights.onnx.data"] = graph_with_weights_in("weights.onnx.data", files, description, tmp_path / "o.onnx")
        data = {"source": "weights.onnx.data", "sha256": sha256_of(files["weights.onnx.data"])}
        description["weights"]["onnx"]["external_data"] = data

    package = arranged(tmp_path, "0.5", parted)
    import_model(package, tmp_path / "bundle", card)
    assert only_agreement(tmp_path / "bundle").agrees
    with zipfile.ZipFile(package) as archive:
        sizes = [archive.getinfo(f"weights.onnx{suffix}").file_size for suffix in ("", ".data")]
    monkeypatch.setattr(bioimageio_package, "LARGEST", sum(sizes) - 1)
    line = refusal("import-model", package, "--out", tmp_path / "b", "--card", card)
    assert "expected a weights.onnx of at most" in line


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_the_commands_say_whether_the_test_tensors_agree(tmp_path, card, command, version):
    package, figures = arranged(tmp_path, version), tmp_path / "check.json"
    code, output = command("import-model", package, "--out", tmp_path / "bundle", "--card", card)
    assert code == 0, output
    assert "test tensors: y is as expected" in output
    card.write_text(CARD.replace("[output]", 'normalisation = {kind = "linear", low = 0, high = 1}\n[output]'))
    code, output = command("import-model", package, "--out", tmp_path / "other", "--card", card, "--name", "mine")
    assert code == 0, output
    assert "mine: rgb in tiles" in output
    assert "its normalisation may be another one" in output
    own = tmp_path / "other" / "card.json"
    own.write_text(json.dumps(json.loads(own.read_text()) | {"margin": 0, "exact_margin": 0}))
    code, output = command("check-model", tmp_path / "other", "--json", figures)
    assert code == 0, output
    for note in ("it sees 2 px, more than its card says: 0", "margin 0 px is below the exact margin of 2 px"):
        assert (note in output) == (version == "0.5"), "tiles of a single size are not measured"
    (test,) = json.loads(figures.read_text())["tests"]
    assert test["differing"] > 0.1
    assert not test["agrees"]


def another_graph(files, description, path, **changes):
    """Put other weights into a package, under their own hash."""
    side = SIDE if description["format_version"].startswith("0.4") else None
    files["weights.onnx"] = write_weights(path, side, **changes).read_bytes()
    description["weights"]["onnx"]["sha256"] = sha256_of(files["weights.onnx"])


def graph_with_weights_in(name, files, description, path):
    """Put the weights of a package's graph into a file that the graph names; returns the file's content."""
    onnx.save(onnx.load(write_weights(path)), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = name if entry.key == "location" else entry.value
    files["weights.onnx"] = model.SerializeToString()
    description["weights"]["onnx"]["sha256"] = sha256_of(files["weights.onnx"])
    return (path.parent / "w.bin").read_bytes()


def break_package(name, files, description, tmp_path):
    path, onnx_entry = tmp_path / "other.onnx", description["weights"]["onnx"]
    if name == "wrong sha256":
        files["weights.onnx"] += b"\0"
    elif name == "path out of the package":
        onnx_entry["source"] = "../weights.onnx"
    elif name == "member out of the archive":
        files["../evil.txt"] = b"evil"
    elif name == "missing axes":
        del description["inputs"][0]["axes"]
    elif name == "custom step":
        code = {"id": "custom", "callable": "watershed", "source": "steps.py"}
        old = description["format_version"].startswith("0.4")
        description["outputs"][0]["postprocessing"] = [{"name": "custom"} if old else code]
    elif name == "external data outside":
        graph_with_weights_in("../w.bin", files, description, path)
    elif name == "unknown opset":
        another_graph(files, description, path, opset=99)
    elif name == "a pickle":
        files["weights.onnx"] = pickle.dumps({"a": 1})
        onnx_entry["sha256"] = sha256_of(files["weights.onnx"])
    elif name == "zip bomb":
        files["README.md"] = bytes(90 << 20)
    elif name == "NaN weights":
        another_graph(files, description, path, weights={"b2": np.float32([np.nan])})
    elif name == "wrong channel count":
        another_graph(files, description, path, channels=4)


BROKEN = {
    "wrong sha256": "expected weights.onnx with the sha256",
    "path out of the package": "found '../weights.onnx', which leads out of it",
    "member out of the archive": "found '../evil.txt', which leads out of it",
    "missing axes": "inputs.0.axes: Field required",
    "custom step": "custom",
    "external data outside": "found weights in '../w.bin'",
    "unknown opset": "found opset 99",
    "a pickle": "a pickle, which runs code",
    "zip bomb": "as a zip bomb",
    "NaN weights": "NaN in b2",
    "wrong channel count": "a graph with the 3 channels that the package says, found 4 in x",
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_package_is_refused_in_one_line(tmp_path, card, refusal, version, name):
    files, description = good_package(tmp_path, version)
    break_package(name, files, description, tmp_path)
    only_zip = name in ("member out of the archive", "zip bomb")
    package = write_package(tmp_path / ("package.zip" if only_zip else VERSIONS[version]), files, description)
    assert BROKEN[name] in refusal("import-model", package, "--out", tmp_path / "bundle", "--card", card)
    assert not (tmp_path / "bundle").exists()


def test_links_and_addresses_are_not_followed(tmp_path, card, command):
    files, description = good_package(tmp_path, "0.4")
    package = write_package(tmp_path / "package", files, description)
    (package / "weights.onnx").unlink()
    (package / "weights.onnx").symlink_to(tmp_path / "weights.onnx")
    code, output = command("import-model", package, "--out", tmp_path / "bundle", "--card", card)
    assert (code, "leads out of the package" in output) == (2, True), output
    description["weights"]["onnx"]["source"] = "https://example.org/weights.onnx"
    (package / "rdf.yaml").write_text(json.dumps(description))
    code, output = command("import-model", package, "--out", tmp_path / "bundle", "--card", card)
    assert (code, "found the address https://example.org" in output) == (2, True), output


def pre(*steps):
    return lambda files, description: description["inputs"][0].update(preprocessing=list(steps))


def post(*steps):
    return lambda files, description: description["outputs"][0].update(postprocessing=list(steps))


def step(name, **kwargs):
    return {"id": name, **({"kwargs": kwargs} if kwargs else {})}


def only_torch(files, description):
    description["weights"] = {"torchscript": {"source": "w.pt", "sha256": "0" * 64, "pytorch_version": "2.0"}}


def of_a_volume(files, description):
    axes = description["inputs"][0]["axes"]
    axes.insert(2, {"type": "space", "id": "z", "size": 1})


def of_huge_tiles(files, description):
    for axis in description["inputs"][0]["axes"][2:]:
        axis["size"] = {"min": 1 << 20, "step": 1 << 20}


def of_nested_aliases(files, description):
    """In text, as JSON has no aliases."""
    levels = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    files["bioimageio.yaml"] = f"type: model\nformat_version: 0.5.4\na0: &a0 [x]\n{levels}".encode()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (of_huge_tiles, "found size: tiles of at least 1048576 px"),
        (of_nested_aliases, "expected at most 100000 values in bioimageio.yaml"),
        (only_torch, "found torchscript; export the model to ONNX"),
        (of_a_volume, "found b, c, z, y, x; export the network of one 2-D image"),
        (pre(step("clip", min=0, max=3)), "found the step clip to other values"),
        (pre(step("scale_linear", gain=2), step("zero_mean_unit_variance")), "zero_mean_unit_variance after scale_lin"),
        (pre(step("scale_range", axes=["channel"])), "found the step scale_range over c"),
        (
            pre(step("scale_linear", gain=2), step("ensure_dtype", dtype="uint8")),
            "found the step ensure_dtype to uint8",
        ),
        (pre(step("binarize", threshold=3)), "found the step binarize; take the .onnx file out"),
        (post(step("binarize", threshold=0.5), step("sigmoid")), "found the step sigmoid after binarize"),
        (post(step("sigmoid"), step("binarize", threshold=2)), "found binarize at 2"),
        (post(step("scale_linear", gain=2)), "found the step scale_linear"),
        (lambda files, _: files.update({"test_input.npy": b"no array"}), "test_input.npy with the sha256"),
        (lambda files, _: files.pop("test_input.npy"), "found no test_input.npy"),
        (lambda _, description: description.update(format_version="0.6.0"), "format_version 0.6.0"),
    ],
)
def test_what_a_card_cannot_say_is_named(tmp_path, card, command, change, words):
    code, output = command("import-model", arranged(tmp_path, "0.5", change), "--out", tmp_path / "b", "--card", card)
    assert code == 2
    assert words in output, output


def test_what_a_package_does_not_say_is_asked_for(tmp_path, card, command):
    package = arranged(tmp_path, "0.4")
    for text, words in {
        "": 'channels = ["rgb"]',
        '[input]\nchannels = ["rgb"]': "add to [output] of --card: decoder =",
    }.items():
        card.write_text(text)
        code, output = command("import-model", package, "--out", tmp_path / "b", "--card", card)
        assert (code, words in output) == (2, True), output


@pytest.mark.parametrize(
    ("steps", "rule"),
    [
        ([], ("linear", (0,), (1,), False, False)),
        ([step("scale_linear", gain=1 / 255)], ("linear", (0,), (255,), False, False)),
        (
            [step("clip", min=0, max=255), step("scale_linear", gain=1 / 255)],
            ("fixed", (0,), (255,), True, False),
        ),
        (
            [
                step("scale_linear", gain=1 / 255),
                step("fixed_zero_mean_unit_variance", axis="channel", mean=[0.4, 0.5, 0.6], std=[0.2, 0.2, 0.1]),
                step("ensure_dtype", dtype="float32"),
            ],
            ("linear", (102, 127.5, 153), (153, 178.5, 178.5), False, False),
        ),
        (
            [step("scale_range", axes=["y", "x"], min_percentile=1, max_percentile=99.8)],
            ("percentile", (1,), (99.8,), False, True),
        ),
        (
            [
                step("scale_range", axes=["batch", "channel", "y", "x"], min_percentile=1, max_percentile=99.8),
                step("clip", min=0, max=1),
            ],
            ("percentile", (1,), (99.8,), True, False),
        ),
    ],
)
def test_steps_in_front_of_the_network_become_one_rule(tmp_path, card, steps, rule):
    package = arranged(tmp_path, "0.5", pre(*steps))
    imported = import_model(package, tmp_path / "b", card)
    found = imported.card.input.normalisation
    low, high = (pytest.approx(values) for values in rule[1:3])
    assert (found.kind, found.low, found.high, found.clip, found.per_tile) == (rule[0], low, high, *rule[3:])
    if "batch" in str(steps):
        assert imported.notes == ("scale_range takes the values of a whole data set; each slide gets its own",)
        assert found.joint


def put_graph(files, description, path, pixels, output):
    """Put a graph and test tensors into a package."""
    files |= {"weights.onnx": path.read_bytes(), "test_input.npy": npy(pixels), "test_output.npy": npy(output)}
    description["weights"]["onnx"]["sha256"] = sha256_of(files["weights.onnx"])
    for tensor, name in ((description["inputs"][0], "test_input.npy"), (description["outputs"][0], "test_output.npy")):
        if "test_tensor" in tensor:
            tensor["test_tensor"]["sha256"] = sha256_of(files[name])


def only_agreement(folder):
    (agreement,) = read_expected_output(folder).compare(load_model(str(folder)), 1)
    return agreement


def test_channels_last_and_probabilities_whose_operator_does_not_end_the_graph(tmp_path, card):
    def change(files, description):
        nodes = [
            helper.make_node("ReduceMean", ["x"], ["m"], axes=[3]),
            helper.make_node("Sigmoid", ["m"], ["s"]),
            helper.make_node("Identity", ["s"], ["y"]),
        ]
        path = write_graph(tmp_path / "last.onnx", nodes, ("n", "h", "w", 3), ("n", "h", "w", 1))
        pixels = np.moveaxis(blobs(64, 64), 0, -1)[None]
        mean = (pixels / 255 * 4 - 2).mean(-1, keepdims=True)
        put_graph(files, description, path, pixels, (1 / (1 + np.exp(-mean))).astype(np.float32))
        for tensor in (description["inputs"][0], description["outputs"][0]):
            tensor["axes"].append(tensor["axes"].pop(1))
        pre(step("scale_linear", gain=4 / 255, offset=-2))(files, description)
        description["outputs"][0] |= {"data": {"type": "float32", "range": [0, 1]}, "postprocessing": []}

    found = import_model(arranged(tmp_path, "0.5", change), tmp_path / "b", card).card
    assert (found.input.layout, found.output.tensors[0].activation) == ("NHWC", "sigmoid")
    assert only_agreement(tmp_path / "b").agrees


def test_a_cropped_output_of_two_classes_as_0_4_says_it(tmp_path, card):
    def change(files, description):
        rng = np.random.default_rng(0)
        weights = {"w": rng.normal(0, 0.3, (2, 3, 5, 5)).astype(np.float32)}
        conv = helper.make_node("Conv", ["x", "w"], ["y"])
        path = write_graph(tmp_path / "crop.onnx", [conv], ("n", 3, "h", "w"), ("n", 2, "h2", "w2"), weights)
        pixels = blobs(64, 64).astype(np.float32)
        low, high = np.percentile(pixels, (1, 99.8), axis=(1, 2))[..., None, None]
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {"x": ((pixels - low) / (high - low))[None].astype(np.float32)})
        put_graph(files, description, path, pixels[None], (logits > 0).astype(np.uint8))
        kwargs = {"mode": "per_sample", "axes": "yx", "min_percentile": 1, "max_percentile": 99.8}
        description["inputs"][0] |= {
            "shape": {"min": [1, 3, 32, 32], "step": [0, 0, 8, 8]},
            "preprocessing": [{"name": "scale_range", "kwargs": kwargs}],
        }
        description["outputs"][0] |= {
            "shape": {"reference_tensor": "raw", "scale": [1, 0, 1, 1], "offset": [0, 1, -2, -2]},
            "halo": [0, 0, 6, 6],
            "postprocessing": [{"name": "binarize", "kwargs": {"threshold": 0}}],
        }

    card.write_text(CARD + 'channels = ["background", "foreground"]')
    found = import_model(arranged(tmp_path, "0.4", change), tmp_path / "b", card).card
    assert (found.margin, found.output.crop, found.threshold) == (8, 2, 0.5)
    assert only_agreement(tmp_path / "b").agrees


def test_stars_are_known_by_their_step(tmp_path):
    rule = {"prob_threshold": 0.6, "nms_threshold": 0.3, "n_rays": 8, "grid": [2, 2], "b": 2}

    def change(files, description):
        weights = {"w": np.full((9, 3, 2, 2), 0.1, np.float32)}
        conv = helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2])
        path = write_graph(tmp_path / "stars.onnx", [conv], ("n", 3, "h", "w"), ("n", 9, "h2", "w2"), weights)
        put_graph(files, description, path, blobs(64, 64)[None], np.zeros((1, 1, 64, 64), np.uint16))
        post(step("stardist_postprocessing", **rule))(files, description)

    imported = import_model(arranged(tmp_path, "0.5", change), tmp_path / "b")
    found = imported.card
    assert (found.decoder, found.threshold, found.stardist.overlap) == ("stardist", 0.6, 0.3)
    assert (found.output.stride, found.output.channels[-1]) == (2, "ray 8")
    assert imported.notes == ("stars are not compared with test tensors",)


def test_a_threshold_is_the_cards_and_the_card_counts_before_the_package(tmp_path, card):
    package = arranged(tmp_path, "0.5", post(step("sigmoid"), step("binarize", threshold=0.3)))
    assert import_model(package, tmp_path / "a", card).card.threshold == 0.3
    card.write_text(CARD + 'threshold = 0.6\nmargin = 16\n[training]\ndata = "mine"')
    found = import_model(package, tmp_path / "b", card, "other").card
    assert (found.name, found.threshold, found.margin, found.training) == ("other", 0.6, 16, {"data": "mine"})


def test_the_library_that_reads_packages_is_asked_for(tmp_path, card, command, monkeypatch):
    package = arranged(tmp_path, "0.5")
    monkeypatch.setitem(sys.modules, "bioimageio.spec", None)
    code, output = command("import-model", package, "--out", tmp_path / "b", "--card", card)
    assert (code, "pip install 'cellseg-batch[bioimageio]'" in output) == (2, True), output


def test_large_test_tensors_are_not_kept(tmp_path, card, monkeypatch):
    monkeypatch.setattr(bioimageio_package, "LARGEST_TEST", 1 << 10)
    imported = import_model(arranged(tmp_path, "0.4"), tmp_path / "b", card)
    assert "are not kept: test_input.npy" in imported.notes[0]
    assert read_expected_output(tmp_path / "b") is None


def test_test_tensors_of_other_shapes_are_refused(tmp_path, card, command):
    def shorter(files, description):
        files["test_output.npy"] = npy(np.zeros((1, 1, 63, 64), np.float32))

    code, output = command("import-model", arranged(tmp_path, "0.4", shorter), "--out", tmp_path / "b", "--card", card)
    assert (code, "where (1, 1, 63, 64) is expected" in output) == (2, True), output
    assert not (tmp_path / "b").exists()
