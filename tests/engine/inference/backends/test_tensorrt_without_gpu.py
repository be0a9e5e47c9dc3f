"""The TensorRT backend against fakes that know the real libraries' signatures: its calls, its results, its refusals.

What only a GPU can show is in ``test_tensorrt.py``.
"""

import ast
import gc
import io
import subprocess
import sys
import tomllib
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from torch._decomp import get_decompositions

from cellseg_batch.engine.errors import BackendError
from cellseg_batch.engine.inference import gpu_probe
from cellseg_batch.engine.inference import race as racing
from cellseg_batch.engine.inference.backends import cuda, tensorrt_gpu, tensorrt_parser
from cellseg_batch.engine.inference.backends.registry import make_backend, why_not
from cellseg_batch.engine.inference.backends.tensorrt_gpu import TensorRtBackend, export_half, load_libraries
from cellseg_batch.engine.inference.choice import Choice
from cellseg_batch.engine.inference.model_pool import ModelPool
from cellseg_batch.engine.models import build_torch_network, load_model
from cellseg_batch.engine.reports.import_model import import_model
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.storage.cache import Artefacts
from cellseg_batch.trainer.unet import ARCHITECTURES, build_network
from tests.support import fake_tensorrt
from tests.support.fake_tensorrt import FAILURES, GRAPH_FAILURES, PAIRS, SIGNATURES, parameters_of, table_of
from tests.support.graphs import write_network
from tests.support.images import blobs, labels_of, write_ome_zarr

SHAPE = (2, 3, 64, 96)
SMALL = {
    "stem-unet": {"width": 4, "depth": 3},
    "unet": {"width": 4, "depth": 3},
    "unet-plus": {"width": 4, "depth": 3},
    "unet-mobilenetv2": {"widths": (8, 8, 8, 8, 8)},
    "unet-resnet34": {"widths": (8, 8, 8, 8, 8), "up": "bilinear"},
    "unet-efficientnet-lite0": {},
}


@pytest.fixture(params=PAIRS, ids=[f"TensorRT {pair[0]}" for pair in PAIRS])
def pair(request):
    return request.param


def backend_of(bundle, folder):
    """The backend on the device that is there when it is made, its plans in ``folder``."""
    return TensorRtBackend(bundle, "fp16", cuda.Device("cuda:0"), Artefacts(folder))


CARD = """
[input]
channels = ["rgb"]
normalisation = {kind = "linear", low = 0, high = 255}
[output]
decoder = "mask"
channels = ["foreground", "border", "distance"]
"""


@pytest.fixture(scope="module")
def graph_bundle(tiny_bundle, tmp_path_factory):
    """The tiny network as a graph of others."""
    folder = tmp_path_factory.mktemp("graph")
    (folder / "card.toml").write_text(CARD)
    write_network(build_torch_network(tiny_bundle), folder / "tiny.onnx")
    import_model(folder / "tiny.onnx", folder / "bundle", folder / "card.toml")
    return load_model(str(folder / "bundle"))


@pytest.fixture
def batch():
    return np.random.default_rng(0).random(SHAPE, np.float32)


def test_a_batch_goes_through_the_engine_and_back(pair, monkeypatch, tiny_bundle, batch):
    _, _, device = fake_tensorrt.install(monkeypatch, pair)
    model = make_backend(tiny_bundle, "tensorrt", "fp16", 1, Artefacts()).compile(SHAPE)
    logits = model(batch)
    assert logits.dtype == np.float32
    with torch.inference_mode():
        expected = build_torch_network(tiny_bundle)(torch.from_numpy(batch)).numpy()
    np.testing.assert_allclose(logits, expected, atol=np.abs(expected).max() * 1e-2)
    assert device.events == ["enqueue", "capture", "replay"]
    np.testing.assert_array_equal(model(batch, plain=True), logits)
    other = model(batch[::-1].copy()).copy()
    np.testing.assert_array_equal(other[::-1], model(batch))


def test_a_graph_goes_through_parser_and_engine_and_back(pair, monkeypatch, graph_bundle, batch, tmp_path):
    tensorrt, torch_tensorrt, device = fake_tensorrt.install(monkeypatch, pair)
    model = backend_of(graph_bundle, tmp_path).compile(SHAPE)
    expected = make_backend(graph_bundle, "onnxruntime", "fp32", 1, Artefacts(tmp_path)).compile(SHAPE)(batch)
    logits = model(batch)
    np.testing.assert_allclose(logits, expected, atol=np.abs(expected).max() * 1e-2)
    assert device.events == ["enqueue", "capture", "replay"]
    np.testing.assert_array_equal(model(batch, plain=True), logits)
    kept = backend_of(graph_bundle, tmp_path)
    np.testing.assert_array_equal(kept.compile(SHAPE)(batch), logits)
    kept.compile((1, *SHAPE[1:]))
    assert tensorrt.builds == [SHAPE, (1, *SHAPE[1:])]
    assert (tensorrt.timings_known, torch_tensorrt.builds) == ([0, 1], [])


def test_every_call_is_in_the_tables_of_both_versions(pair, monkeypatch, tiny_bundle, graph_bundle, batch, tmp_path):
    """The fakes refuse what is not; here: that the calls above were all the calls there are."""
    tensorrt, _, _ = fake_tensorrt.install(monkeypatch, pair, "operator")
    backend_of(tiny_bundle, tmp_path).compile(SHAPE)(batch)
    with pytest.raises(BackendError, match="Magic"):
        backend_of(graph_bundle, tmp_path).compile(SHAPE)
    tensorrt.failure = None
    backend_of(graph_bundle, tmp_path).compile(SHAPE)(batch)
    used = {name for _, name in tensorrt.used}
    known = {name for members in tensorrt.table["classes"].values() for name in members}
    trees = [ast.parse(Path(module.__file__).read_text()) for module in (tensorrt_gpu, tensorrt_parser)]
    calls = [node.func for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    called = {function.attr for function in calls if isinstance(function, ast.Attribute)} & known
    assert called <= used
    assert {"create_network", "parse", "desc", "set_timing_cache", "build_serialized_network"} <= called
    assert {"execute_async_v3", "set_tensor_address", "deserialize_cuda_engine", "get_tensor_dtype"} <= called


def test_the_fakes_are_strict(pair, monkeypatch):
    tensorrt, torch_tensorrt, _ = fake_tensorrt.install(monkeypatch, pair)
    runtime = tensorrt.Runtime(torch_tensorrt.logging.TRT_LOGGER)
    with pytest.raises(AttributeError, match="has no Runtime"):
        runtime.deserialise(b"")
    with pytest.raises(TypeError, match="deserialize_cuda_engine"):
        runtime.deserialize_cuda_engine(b"", 1, 2)
    with pytest.raises(TypeError):
        tensorrt.Runtime(torch_tensorrt.logging.TRT_LOGGER, verbose=True)
    with pytest.raises(AssertionError, match="silently drop"):
        torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(None, arg_inputs=[], precision="fp16")
    with pytest.raises(AssertionError, match="never reads"):
        torch_tensorrt.Input(least=(1,))


def test_signatures_are_read_as_written():
    line = "f(self: a.B, one: tuple[int, str], two: a.E = <E.X: 0>) -> bool"
    signature, result = parameters_of(line)
    assert list(signature.parameters) == ["self", "one", "two"]
    assert [p.default is p.empty for p in signature.parameters.values()] == [True, True, False]
    assert result == "bool"


def test_plans_are_kept_for_this_gpu_and_these_libraries(pair, monkeypatch, tiny_bundle, batch, tmp_path):
    _, torch_tensorrt, _ = fake_tensorrt.install(monkeypatch, pair)
    logits = backend_of(tiny_bundle, tmp_path).compile(SHAPE)(batch).copy()
    kept = backend_of(tiny_bundle, tmp_path)
    np.testing.assert_array_equal(kept.compile(SHAPE)(batch), logits)
    assert len(torch_tensorrt.builds) == 1
    kept.compile((1, *SHAPE[1:]))
    assert [profile.opt_shape[0] for profile in torch_tensorrt.builds] == [2, 1]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Another GPU")
    kept.compile(SHAPE)
    assert len(torch_tensorrt.builds) == 3
    # What was timed for the first shape serves the second, but no other GPU.
    assert torch_tensorrt.timings_known == [0, 1, 0]


def test_a_dropped_model_leaves_at_once(pair, monkeypatch, tiny_bundle, tmp_path):
    """Its memory on the device is needed for the next one."""
    fake_tensorrt.install(monkeypatch, pair)
    model = backend_of(tiny_bundle, tmp_path).compile(SHAPE)
    left = [weakref.ref(model), weakref.ref(model.pixels)]
    gc.disable()
    try:
        del model
        assert [reference() for reference in left] == [None, None]
    finally:
        gc.enable()


REFUSED = {
    "import": ["libnvinfer.so.11", "pip install 'cellseg-batch[tensorrt]'"],
    "driver": ["nullptr", "update the NVIDIA driver"],
    "build out of memory": [
        "to build a plan",
        "Error Code 1: Cuda Runtime (out of memory)",
        "likely a GPU that is out of memory",
        "smaller `batch` or `tile`",
    ],
    "deserialize": ["deserialize_cuda_engine returned None", "stale plan", "built anew"],
    "context": ["create_execution_context returned None", "likely a GPU that is out of memory"],
    "enqueue": ["execute_async_v3 returned False", "another `backend`"],
    "fp32 types": ["expected HALF", "pixels FLOAT, "],
    "fp32 layers": ["layers in fp16", "bytes for"],
    "operator": ["to build a plan", "Magic: No importer registered", "another `backend`"],
    "timings": ["set_timing_cache returned False", "another `backend`"],
}


@pytest.mark.parametrize(
    ("source", "failure"),
    [*(("tiny_bundle", failure) for failure in FAILURES), *(("graph_bundle", failure) for failure in GRAPH_FAILURES)],
)
def test_every_way_to_fail_says_what_to_do(pair, monkeypatch, request, source, failure, tmp_path):
    fake_tensorrt.install(monkeypatch, pair, failure)
    # The tiny network's weights are all within what padding is allowed to take.
    monkeypatch.setattr(tensorrt_gpu, "_PADDING_BYTES", 0)
    with pytest.raises(BackendError) as caught:
        backend_of(request.getfixturevalue(source), tmp_path).compile(SHAPE)
    for words in REFUSED[failure]:
        assert words in str(caught.value)
    # The queue in front of the network then tries smaller batches.
    assert cuda.is_out_of_memory(caught.value) == (failure in ("build out of memory", "context"))


def test_the_shipped_network_is_large_enough_to_tell_fp32_from_fp16(pair, monkeypatch, tmp_path):
    fake_tensorrt.install(monkeypatch, pair, "fp32 layers")
    with pytest.raises(BackendError, match="layers in fp16"):
        backend_of(load_model("nuclei"), tmp_path).compile((1, 3, 16, 16))


def test_a_device_without_room_is_named(pair, monkeypatch, tiny_bundle, tmp_path):
    fake_tensorrt.install(monkeypatch, pair)

    def full(self, shape, dtype):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(cuda.Device, "zeros", full)
    with pytest.raises(BackendError, match=r"20.00 GiB.*smaller `batch` or `tile`"):
        backend_of(tiny_bundle, tmp_path).compile(SHAPE)


def test_a_float32_network_is_noticed(pair, monkeypatch, tiny_bundle, tmp_path):
    fake_tensorrt.install(monkeypatch, pair)
    program = torch.export.export(build_torch_network(tiny_bundle), (torch.zeros(SHAPE),))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    monkeypatch.setattr(TensorRtBackend, "_build", lambda *arguments: buffer.getvalue())
    with pytest.raises(BackendError, match="pixels FLOAT"):
        backend_of(tiny_bundle, tmp_path).compile(SHAPE)


def test_too_large_a_batch_is_refused(pair, monkeypatch, tiny_bundle, tmp_path):
    fake_tensorrt.install(monkeypatch, pair)
    with pytest.raises(BackendError, match="at most 64"):
        backend_of(tiny_bundle, tmp_path).compile((65, *SHAPE[1:]))


def test_without_a_gpu_nothing_is_imported(monkeypatch):
    monkeypatch.setattr(cuda, "available", lambda: False)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(BackendError, match="NVIDIA GPU"):
        load_libraries()
    assert "NVIDIA GPU" in why_not("tensorrt", "fp16")


def test_doctor_says_what_is_there_and_what_proves_it(pair, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "500")
    monkeypatch.setattr(cuda, "available", lambda: False)
    assert "found torch" in command("doctor")[1]
    fake_tensorrt.install(monkeypatch, pair, "import")
    output = command("doctor")[1]
    assert "libnvinfer.so.11" in output
    assert "pip install 'cellseg-batch[tensorrt]'; not yet run on hardware: pytest -m tensorrt" in output
    fake_tensorrt.install(monkeypatch, pair)
    assert "on the GPU" in command("doctor")[1]


def test_the_race_goes_on_when_tensorrt_fails(pair, monkeypatch, tiny_bundle, tmp_path):
    fake_tensorrt.install(monkeypatch, pair, "enqueue")
    assert why_not("tensorrt", "fp16") == ""
    monkeypatch.setattr(racing, "candidates", lambda *_: [("tensorrt", "fp16"), ("torch", "fp32")])
    request = racing.Request("tiny", "auto", "auto", (64, 64), 1, 1)
    race_result = racing.race(request, tiny_bundle, Artefacts(tmp_path))
    assert race_result.pick("auto", "auto").name == "torch fp32"
    with pytest.raises(BackendError, match="execute_async_v3 returned False"):
        race_result.pick("tensorrt", "auto")


def test_a_graph_is_held_against_onnx_runtime(pair, monkeypatch, graph_bundle, tmp_path):
    fake_tensorrt.install(monkeypatch, pair)
    request = racing.Request("graph", "tensorrt", "auto", (64, 64), 1, 1, "cuda")
    (row,) = racing.race(request, graph_bundle, Artefacts(tmp_path)).candidates
    assert (row.name, row.missing, row.passed) == ("tensorrt fp16", "", True), row
    assert 0 < row.parity.max_dp < 0.02
    assert row.parity.objects > 100


def test_a_run_of_a_graph_gives_the_masks_of_onnx_runtime(pair, monkeypatch, graph_bundle, segment, tmp_path):
    fake_tensorrt.install(monkeypatch, pair)
    monkeypatch.setattr(gpu_probe, "why_no_kernels", lambda gpu: "this GPU is the processor")
    path, masks = write_ome_zarr(tmp_path / "a.zarr", blobs(150, 170)), []
    for backend, device in (("tensorrt", "cuda:0"), ("onnxruntime", "cpu")):
        usual = {"precision": "auto", "device": device, "name": backend, "gate": False, "margin": 16, "workers": 1}
        report = segment(path, model=str(graph_bundle.graph.parent), backend=backend, **usual)
        assert report.slides[0].status == "done", report.slides[0].reason
        masks.append(labels_of(report))
    assert 0.1 < masks[1].mean() < 0.9
    assert np.mean(masks[0] != masks[1]) < 1e-2


def test_windows_that_show_the_size_of_nuclei_compile_at_once(pair, monkeypatch, tiny_bundle, graph_bundle):
    fake_tensorrt.install(monkeypatch, pair)
    choice = Choice("tensorrt", "fp16", None)
    pools = [ModelPool(bundle, Settings(threads=1), choice=choice) for bundle in (tiny_bundle, graph_bundle)]
    assert [pool.prober(2).name for pool in pools] == ["torch-cuda", "onnxruntime"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_float16_throughout(monkeypatch, name):
    """Casts to float32 would be kept by TensorRT: slower, and not what was asked for."""
    monkeypatch.setattr(tensorrt_gpu, "build_torch_network", random_network)
    card = SimpleNamespace(architecture={"name": name, **SMALL[name]}, input=SimpleNamespace(count=3))
    program = export_half(SimpleNamespace(card=card), (64, 32), cuda.Device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # torch-tensorrt takes ReLU6 apart by torch's own rule.
        decomposed = program.run_decompositions(get_decompositions([torch.ops.aten.hardtanh, torch.ops.aten.hardtanh_]))
    values = [node.meta.get("val") for node in decomposed.graph.nodes]
    types = {value.dtype for value in values if isinstance(value, torch.Tensor)}
    assert {dtype for dtype in types if dtype.is_floating_point} == {torch.half}
    shapes = [tuple(decomposed.module()(torch.zeros(n, 3, 64, 32, dtype=torch.half)).shape) for n in (1, 5)]
    assert [shape[0] for shape in shapes] == [1, 5]


def random_network(bundle):
    return build_network(bundle.card.architecture).eval()


def test_the_extra_pins_what_the_tables_were_made_from():
    extra = tomllib.loads((Path(__file__).parents[4] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]

    pins = {requirement.name: requirement.specifier for requirement in map(Requirement, extra["tensorrt"])}
    for tensorrt, torch_tensorrt in PAIRS:
        assert torch_tensorrt in pins["torch-tensorrt"]
        assert tensorrt in pins["tensorrt"]
        needs = map(Requirement, table_of("torch_tensorrt", torch_tensorrt)["requires"])
        assert all(tensorrt in need.specifier for need in needs if need.name == "tensorrt")
    assert "11.4.0.106" not in pins["tensorrt"]


def test_the_tables_are_in_the_form_that_the_script_writes():
    code = "import dump, json, sys; print(json.dumps([dump.CLASSES, dump.FUNCTIONS]))"
    output = subprocess.check_output([sys.executable, "-c", code], cwd=SIGNATURES, text=True)
    classes, functions = ast.literal_eval(output)
    for tensorrt, torch_tensorrt in PAIRS:
        assert list(table_of("tensorrt", tensorrt)["classes"]) == classes
        names = list(table_of("torch_tensorrt", torch_tensorrt)["functions"])
        assert names == [place.split(":")[1] for place in functions]
