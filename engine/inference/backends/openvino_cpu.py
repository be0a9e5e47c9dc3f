"""Run networks in OpenVINO on the CPU, where it is the fastest: fp32, int8, and bf16 if the processor has it.

A network of ours goes from ``torch.export`` straight into OpenVINO with dynamic batch and size, and is cached on disk,
so that only the first run needs torch, in a process of its own; a graph is read as it is.  Each batch shape is then
compiled separately, which takes a fraction of a second.  int8 is post-training quantisation by NNCF (explicit
fake-quantise nodes, calibrated on real tiles).
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.errors import BackendError
from cellseg_batch.engine.inference.backends.gate import tiles_for
from cellseg_batch.engine.inference.backends.protocol import (
    CONVERSION_VERSION,
    BackendRequest,
    ByteModel,
    CompiledModel,
    Logits,
    Numbers,
    Shape,
)
from cellseg_batch.engine.inference.backends.torch_turn import TORCH_TURN
from cellseg_batch.engine.machine import run_module
from cellseg_batch.engine.models import build_torch_network
from cellseg_batch.engine.storage.cache import Artefacts
from cellseg_batch.trainer.bundle import CARD_FILE, WEIGHTS_FILES, Bundle
from cellseg_batch.trainer.card import SAFETENSORS, Card

# OpenVINO's telemetry looks up a host and writes files when it is imported.  If its package is missing, OpenVINO uses
# its own stub, so that no run contacts another machine.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

import openvino  # noqa: E402
from openvino import opset13 as op  # noqa: E402

# The layers of a quantised network that stay in floats run in bf16 if it is native, otherwise in fp32.
_HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "bf16"}
# A network for normalised pixels, and the same one for bytes.
_FILE, _BYTES_FILE = "model.xml", "bytes.xml"
_QUANTISED = "--quantised"
_DEPTHWISE = "GroupConvolution"
_VALUES = ("Parameter", "Constant")
_LARGEST_BATCH = 64
_LARGEST_SIDE = 1 << 16


def supported_precisions() -> tuple[str, ...]:
    """Return the floats that this processor runs natively, and int8, which every processor runs."""
    return ("bf16", "fp32", "int8") if "bf16" in _native() else ("fp32", "int8")


def _native() -> set[str]:
    """Return OpenVINO's names of the precisions that this processor runs natively."""
    return {name.lower() for name in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")}


def make(bundle: Bundle, request: BackendRequest) -> OpenVinoBackend:
    """Make the backend of a bundle's network."""
    return OpenVinoBackend(bundle, request.precision, request.threads, request.artefacts)


class OpenVinoBackend:
    """A bundle's network in OpenVINO."""

    name = "openvino"
    version = openvino.__version__

    def __init__(self, bundle: Bundle, precision: str, threads: int, artefacts: Artefacts) -> None:
        self.precision = precision
        self._core = openvino.Core()
        self._options = {
            "INFERENCE_PRECISION_HINT": _HINTS[precision] if _HINTS[precision] in _native() else "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            # With pinning, the threads of all processes on a machine would share its first cores.
            "ENABLE_CPU_PINNING": False,
        }
        folder = _network(bundle, precision == "int8", artefacts)
        self._model, self._byte_model = (self._core.read_model(folder / file) for file in (_FILE, _BYTES_FILE))

    def compile(self, shape: Shape) -> CompiledModel:
        """Compile for one batch shape."""
        return self._compiled(self._model, shape)

    def compile_bytes(self, shape: Shape) -> ByteModel:
        """Compile for one batch shape; the logits are the same bit for bit as `compile`'s (`test_session.py`)."""
        count, channels, height, width = shape
        return self._compiled(self._byte_model, (count, height, width, channels))

    def _compiled(self, model: Any, shape: Shape) -> _Compiled:
        model = model.clone()
        model.reshape({0: openvino.PartialShape(list(shape))})
        return _Compiled(self._core.compile_model(model, "CPU", self._options))


class _Compiled:
    """A compiled network: a `CompiledModel`, or a `ByteModel` if called with ``low`` and ``scale``."""

    def __init__(self, network: Any) -> None:
        self._request = network.create_infer_request()
        self._logits_shape = tuple(network.output(0).shape)

    def __call__(self, batch: NDArray[Any], *constants: Numbers, out: Logits | None = None) -> Logits:
        logits = np.empty(self._logits_shape, np.float32) if out is None else out
        self._request.set_input_tensor(0, openvino.Tensor(batch, shared_memory=True))
        if constants:
            low, scale = constants
            self._request.set_input_tensor(1, openvino.Tensor(-low))
            self._request.set_input_tensor(2, openvino.Tensor(scale))
        self._request.set_output_tensor(0, openvino.Tensor(logits, shared_memory=True))
        self._request.infer()
        return logits


def _normalising(model: Any, clip: bool) -> list[str]:
    """Replace the input of normalised pixels (N, C, H, W) by three inputs: bytes (N, H, W, C), -low and scale.

    The plugin would turn a subtraction into a product and a sum, and round the product to bfloat16.

    Returns:
        names of the layers that normalise.
    """
    (pixels,) = model.get_parameters()
    count, channels, height, width = pixels.get_output_partial_shape(0)
    # Channels last is the convolutions' own layout; for any other, the plugin would keep a second copy of the batch.
    raw = op.parameter(openvino.PartialShape([count, height, width, channels]), np.uint8, name="raw")
    # Bounds are inputs instead of constants, so that slides of one shape share one compiled network.
    names = ("minus_low", "scale")
    minus_low, scale = (op.parameter(openvino.PartialShape([channels]), np.float32, name=name) for name in names)
    layers = [op.convert(raw, "f32")]
    layers.append(op.add(layers[-1], minus_low))
    layers.append(op.multiply(layers[-1], scale))
    if clip:
        layers.append(op.clamp(layers[-1], 0.0, 1.0))
    layers.append(op.transpose(layers[-1], [0, 3, 1, 2]))
    for target in pixels.output(0).get_target_inputs():
        target.replace_source_output(layers[-1].output(0))
    model.remove_parameter(pixels)
    model.add_parameters([raw, minus_low, scale])
    model.validate_nodes_and_infer_types()
    return [layer.get_friendly_name() for layer in layers]


def _network(bundle: Bundle, quantised: bool, artefacts: Artefacts) -> Path:
    """Return the folder of the converted network, which serves every processor, shape and number of threads."""
    packages = ["onnx" if bundle.graph is not None else "torch", "openvino", *(["nncf"] if quantised else [])]
    key = {
        "what": "openvino network",
        "model": bundle.card.name,
        "sha256": bundle.sha256,
        "conversion_version": CONVERSION_VERSION,
        "quantised": quantised,
        "clip": bundle.card.input.normalisation.clip,
        "versions": {package: version(package) for package in packages},
    }

    needs_torch = bundle.graph is None and "torch" not in sys.modules
    write = _write_elsewhere if needs_torch else _write
    return artefacts.get(key, lambda folder: write(bundle, quantised, folder))


def _write(bundle: Bundle, quantised: bool, folder: Path) -> None:
    """Write the converted network into a folder."""
    if quantised:
        tiles = tiles_for("calibration", bundle.card)
        model = _quantise(_convert(bundle, tiles), tiles)
    else:
        model = _convert(bundle)
    filters = _edge_filters(model)
    openvino.save_model(model, folder / _FILE, compress_to_fp16=False)
    _keep_floats(folder / _FILE, filters)
    normalising = _normalising(model, bundle.card.input.normalisation.clip)
    openvino.save_model(model, folder / _BYTES_FILE, compress_to_fp16=False)
    # Filters of edges also see what rounding does to their input.
    _keep_floats(folder / _BYTES_FILE, [*filters, *normalising] if filters else [])


def _write_elsewhere(bundle: Bundle, quantised: bool, folder: Path) -> None:
    """Do `_write` in a process of its own, so that the memory of torch does not stay in the run."""
    from safetensors.numpy import save_file

    with tempfile.TemporaryDirectory(prefix="cellseg-convert-") as given:
        save_file(bundle.weights, Path(given) / WEIGHTS_FILES[SAFETENSORS])
        (Path(given) / CARD_FILE).write_text(bundle.card.to_json())
        _, failure = run_module(__name__, given, str(folder), *([_QUANTISED] if quantised else []))
    if failure:
        raise BackendError(
            f"network of {bundle.card.name}",
            expected="a process that converts it for OpenVINO",
            found=failure,
            cause="too little memory",
            remedy="run with `backend=torch`, or see cellseg-batch doctor",
        )


def main() -> None:
    """Convert a network that `_write_elsewhere` gives: a bundle's card and weights, perhaps of some outputs alone."""
    from safetensors.numpy import load_file

    given, result, *options = sys.argv[1:]
    card = msgspec.json.decode((Path(given) / CARD_FILE).read_bytes(), type=Card)
    bundle = Bundle(card, load_file(Path(given) / WEIGHTS_FILES[SAFETENSORS]))
    _write(bundle, _QUANTISED in options, Path(result))


def _convert(bundle: Bundle, tiles: NDArray[np.float32] | None = None) -> Any:
    """Convert the network to OpenVINO.

    With ``tiles`` (N, C, H, W), the weights of a network of ours are prepared for int8 on these tiles; a graph is read
    as it is.
    """
    if bundle.graph is not None:
        from cellseg_batch.engine.inference.backends.onnx_graph import plain_graph

        return openvino.Core().read_model(plain_graph(bundle))
    import torch
    from torch.export import Dim

    from cellseg_batch.engine.inference.backends.fold_layers import fold_batch_norm, fold_upsampling, plain_clamps
    from cellseg_batch.engine.inference.backends.int8_equalise import equalise
    from cellseg_batch.engine.inference.backends.int8_round import round_weights

    stride = bundle.card.total_stride
    batch = Dim("batch", min=1, max=_LARGEST_BATCH)
    height = stride * Dim("height", min=1, max=_LARGEST_SIDE // stride)
    width = stride * Dim("width", min=1, max=_LARGEST_SIDE // stride)
    # torch.export would take a batch of 1 for a constant.
    example = torch.zeros(2, bundle.card.input.count, 8 * stride, 8 * stride)
    with TORCH_TURN, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = fold_upsampling(fold_batch_norm(build_torch_network(bundle)))
        if tiles is not None:
            batches = [torch.from_numpy(tile[None]) for tile in tiles]
            network = round_weights(equalise(network, batches), batches)
        program = torch.export.export(
            plain_clamps(network), (example,), dynamic_shapes=({0: batch, 2: height, 3: width},)
        )
        return openvino.convert_model(program)


def _edge_filters(model: Any) -> list[str]:
    """Names of the layers up to the depthwise convolution behind the first one; none if the network does not begin so.

    MobileNets and EfficientNets begin with filters of edges: large weights of both signs, which almost cancel.
    Rounding these or what they read to bfloat16 changes the logits more than rounding all other layers does.
    """
    first, second, *_ = (*_convolutions(model), None, None)
    if second is None or second.get_type_name() != _DEPTHWISE:
        return []
    before, around = [], [first]
    while around:
        node = around.pop()
        before.append(node)
        around += [value.get_node() for value in node.input_values()]
    return [node.get_friendly_name() for node in (*before, second) if node.get_type_name() not in _VALUES]


def _convolutions(model: Any) -> list[Any]:
    kinds = ("Convolution", "ConvolutionBackpropData", _DEPTHWISE)
    return [node for node in model.get_ordered_ops() if node.get_type_name() in kinds]


def _keep_floats(path: Path, names: Sequence[str]) -> None:
    """Mark layers of a saved network as exempt from `INFERENCE_PRECISION_HINT`; from Python it cannot be done else."""
    if not names:
        return
    document = ElementTree.parse(path)
    for layer in document.iterfind("layers/layer"):
        if layer.get("name") in names:
            information = ElementTree.Element("rt_info")
            ElementTree.SubElement(information, "attribute", {"name": "precise", "version": "0"})
            layer.insert(1, information)  # after its data
    document.write(path, encoding="utf-8", xml_declaration=True)


def _quantise(model: Any, tiles: NDArray[np.float32]) -> Any:
    """Quantise the network to int8, calibrated on ``tiles`` (N, C, H, W); first and last layers stay in floats.

    Activations are clipped at the 1e-6 quantiles.  NNCF's bias correction is off because it makes results worse: it
    uses means over the tiles, which are mostly background and say little about nuclei.
    """
    import nncf
    from nncf.quantization.advanced_parameters import (
        AdvancedQuantizationParameters,
        AdvancedSmoothQuantParameters,
        OverflowFix,
    )
    from nncf.quantization.range_estimator import (
        AggregatorType,
        RangeEstimatorParameters,
        StatisticsCollectorParameters,
        StatisticsType,
    )

    convolutions = [node.get_friendly_name() for node in _convolutions(model)]
    in_floats = {*convolutions[:1], *convolutions[-1:], *_edge_filters(model)}
    outliers = StatisticsCollectorParameters(
        statistics_type=StatisticsType.QUANTILE, aggregator_type=AggregatorType.MEAN, quantile_outlier_prob=1e-6
    )
    # NNCF logs its progress at length, and warns about its own dependencies.
    nncf.set_log_level(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nncf.quantize(
            model,
            nncf.Dataset([tile[None] for tile in tiles]),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(tiles),
            model_type=nncf.ModelType.TRANSFORMER,  # for any other type NNCF quantises sums too
            ignored_scope=nncf.IgnoredScope(names=sorted(in_floats)),
            advanced_parameters=AdvancedQuantizationParameters(
                # The fix halves the number of steps, for processors without VNNI, whose sums may overflow; on the
                # one that was tried they did not.
                overflow_fix=OverflowFix.DISABLE,
                disable_bias_correction=True,
                activations_range_estimator_params=RangeEstimatorParameters(min=outliers, max=outliers),
                smooth_quant_alphas=AdvancedSmoothQuantParameters(convolution=-1, matmul=-1),
            ),
        )


if __name__ == "__main__":
    main()
