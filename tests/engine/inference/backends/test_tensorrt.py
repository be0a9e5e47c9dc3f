"""What only a GPU with TensorRT can show; run it there with ``pytest -m tensorrt``."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cellseg_batch.engine.inference.backends.cuda import Device
from cellseg_batch.engine.inference.backends.gate import limits_of, logits_of, measure_parity, real_tiles
from cellseg_batch.engine.inference.backends.registry import make_backend
from cellseg_batch.engine.inference.backends.tensorrt_gpu import TensorRtBackend, load_libraries
from cellseg_batch.engine.inference.decoders import DECODERS
from cellseg_batch.engine.models import build_torch_network, load_model
from cellseg_batch.engine.storage.cache import Artefacts
from cellseg_batch.trainer.bundle import Bundle
from cellseg_batch.trainer.card import ONNX, Output, Tensor

pytestmark = pytest.mark.tensorrt


@pytest.fixture(scope="module")
def bundle():
    return load_model("nuclei")


@pytest.fixture(scope="module")
def backend(bundle, tmp_path_factory):
    return TensorRtBackend(bundle, "fp16", Device("cuda:0"), Artefacts(tmp_path_factory.mktemp("plans")))


@pytest.fixture(scope="module")
def tiles(bundle):
    return real_tiles("gate", bundle.card.input.count)


@pytest.fixture(scope="module")
def graph_bundle(bundle, tmp_path_factory):
    """The shipped network as a graph of others."""
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package, reason="pip install 'cellseg-batch[onnx]'")
    from tests.support.graphs import write_network

    file = write_network(build_torch_network(bundle), tmp_path_factory.mktemp("graph") / "nuclei.onnx")
    output = Output((Tensor(bundle.card.output.channels, name="y"),))
    return Bundle(replace(bundle.card, format=ONNX, output=output), graph=file)


def test_masks_of_real_tiles_agree_with_torch_fp32(bundle, backend, tiles):
    shape = (1, *tiles.shape[1:])
    reference = make_backend(bundle, "torch", "fp32", 4, Artefacts())
    logits, expected = (logits_of(one.compile(shape), tiles) for one in (backend, reference))
    parity = measure_parity(logits, expected, bundle.card.threshold, DECODERS[bundle.card.decoder])
    print(parity)
    assert parity.within(limits_of("fp16")), parity


def test_masks_of_a_graph_agree_with_onnx_runtime_fp32(graph_bundle, backend, tiles):
    shape = (1, *tiles.shape[1:])
    parsed = TensorRtBackend(graph_bundle, "fp16", Device("cuda:0"), backend._artefacts)
    reference = make_backend(graph_bundle, "onnxruntime", "fp32", 4, Artefacts())
    model = parsed.compile(shape)
    logits, expected = (logits_of(one, tiles[:8]) for one in (model, reference.compile(shape)))
    parity = measure_parity(logits, expected, graph_bundle.card.threshold, DECODERS[graph_bundle.card.decoder])
    print(parity)
    assert parity.within(limits_of("fp16")), parity
    np.testing.assert_array_equal(model(tiles[:1], plain=True), logits[:1])


def test_the_engine_is_half(bundle, backend, tiles):
    tensorrt, torch_tensorrt = load_libraries()
    runtime = tensorrt.Runtime(torch_tensorrt.logging.TRT_LOGGER)
    engine = runtime.deserialize_cuda_engine(backend.plan((1, *tiles.shape[1:])))
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    assert [engine.get_tensor_dtype(name) for name in names] == [tensorrt.DataType.HALF] * 2
    weights = sum(array.size for array in bundle.weights.values())
    size = engine.get_engine_stat(tensorrt.EngineStat.TOTAL_WEIGHTS_SIZE)
    print(f"{size} bytes for {weights} weights")
    # Lower than the limit that the backend refuses above: what is seen here may tighten it.
    assert 1.5 * weights < size < 3 * weights


@pytest.mark.parametrize("count", [1, 4])
def test_the_graph_gives_what_a_plain_enqueue_gives(backend, tiles, count):
    batch = np.ascontiguousarray(tiles[:count])
    model = backend.compile(batch.shape)
    replayed = model(batch).copy()
    assert np.abs(replayed).max() > 1
    np.testing.assert_array_equal(model(batch, plain=True), replayed)
    other = model(np.zeros_like(batch)).copy()
    assert not np.array_equal(other, replayed)
    np.testing.assert_array_equal(model(batch), replayed)


def test_two_batch_shapes_agree(backend, tiles):
    together = backend.compile((4, *tiles.shape[1:]))(np.ascontiguousarray(tiles[:4])).copy()
    single = backend.compile((1, *tiles.shape[1:]))
    for tile, expected in zip(tiles[:4], together, strict=True):
        np.testing.assert_allclose(single(tile[None])[0], expected, atol=2e-2 * np.abs(expected).max())


def test_a_kept_plan_gives_the_same_logits(bundle, backend, tiles):
    shape = (1, *tiles.shape[1:])
    kept = TensorRtBackend(bundle, "fp16", Device("cuda:0"), backend._artefacts)
    expected = backend.compile(shape)(tiles[:1]).copy()
    np.testing.assert_array_equal(kept.compile(shape)(tiles[:1]), expected)


def test_nothing_of_a_compiled_model_stays_on_the_device(backend, tiles):
    shape = (1, *tiles.shape[1:])
    backend.compile(shape)(tiles[:1])
    free = torch.cuda.mem_get_info()[0]
    for _ in range(5):
        backend.compile(shape)(tiles[:1])
    assert torch.cuda.mem_get_info()[0] >= free - (256 << 20)
