"""Read an ONNX file that somebody else made, without running any of it, and say what the graph takes and gives.

Parsing is by `onnx` alone; nothing is ever unpickled.  What could run code, read other files or loop is refused.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cellseg_batch.engine.errors import ModelError, brief

if TYPE_CHECKING:
    from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

_Identity = tuple[str, str, str]

# Bytes of a graph and its weights that are taken.
LARGEST = 1 << 30
# Operators of a graph, each of its functions counted wherever it is called.
_MOST_OPERATORS = 100_000
_LEAST_OPSET = 11
_DOMAINS = ("", "ai.onnx")
_NAME_THE_FILE = "name the .onnx file in it, or a bioimage.io package with bioimageio.yaml or rdf.yaml at its top"
# First bytes of what torch.save, joblib and pickle write: a zip archive, or a pickle of protocol 2 or later.
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_SMALLER = "export the model in float16, or a smaller one"
_ONE_FILE = "save it in one file: onnx.save(model, path, save_as_external_data=False)"
_TAKES = "export the network of a batch of 2-D images of floats; the card says how pixels become these"
_GIVES = "export the network without this output, or without what makes numbers of an image into labels or one number"
EXPORT = 'torch.onnx.export(network, example, "model.onnx", dynamo=True) where the model was trained'


@dataclass(frozen=True)
class Port:
    """A tensor that a graph takes or gives.

    Attributes:
        name: its name.
        dtype: float32 or float16.
        shape: length of each axis; None where the graph leaves it open.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class GraphFile:
    """A graph that can be taken.

    Attributes:
        serialised: the whole model, its weights inside.
        input: what it takes.
        outputs: what it gives.
        opset: version of the operators.
        makers: name of each output -> operator that makes it.
        properties: remarks of the file's writer.
    """

    serialised: bytes
    input: Port
    outputs: tuple[Port, ...]
    opset: int
    makers: dict[str, str]
    properties: dict[str, str]

    def activation_of(self, output: str) -> str:
        """Activation that makes an output: none, sigmoid or softmax."""
        return {"Sigmoid": "sigmoid", "Softmax": "softmax"}.get(self.makers[output], "none")


def read_graph(path: Path) -> GraphFile:
    """Read and check an ONNX file.

    Raises:
        ModelError: there is no such file, it is something else, or it holds what is not taken; the error says how to
            get a file that is.
    """
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise ModelError(
            str(path),
            expected="the package onnx",
            found=str(error),
            remedy="pip install 'cellseg-batch[onnx]'",
        ) from error

    model = _parsed(path, _content_of(path))
    opset = next((entry.version for entry in model.opset_import if entry.domain in _DOMAINS), 0)
    newest = onnx.defs.onnx_opset_version()
    if not _LEAST_OPSET <= opset <= newest:
        remedy = f"export it again with an opset from {_LEAST_OPSET} to {newest}"
        raise _refused(path, f"operators of an opset from {_LEAST_OPSET} to {newest}", f"opset {opset}", remedy)
    del model.opset_import[:]
    model.opset_import.append(onnx.helper.make_opsetid("", opset))
    _take_in_external_data(path, model)
    _refuse_nan(path, model)
    for value in (*model.graph.input, *model.graph.output):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_value < 1 and not axis.dim_param:
                axis.Clear()  # some writers have -1 or 0 for what is open
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # the checker's own errors
        raise _refused(path, "a valid ONNX graph", brief(error), f"export it again: {EXPORT}") from error
    initial = {value.name for value in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in initial]
    if len(inputs) != 1:
        found = ", ".join(value.name for value in inputs) or "none"
        raise _refused(path, "a graph with one input", found, "export the network alone, on an image alone")
    made_by = {output: node.op_type for node in model.graph.node for output in node.output}
    taken = _port(path, inputs[0], "the input", _TAKES)
    outputs = tuple(_port(path, value, "each output", _GIVES) for value in model.graph.output)
    return GraphFile(
        serialised=model.SerializeToString(),
        input=taken,
        outputs=outputs,
        opset=opset,
        makers={port.name: made_by.get(port.name, "") for port in outputs},
        properties={entry.key: entry.value for entry in model.metadata_props},
    )


def _refused(path: Path, expected: str, found: str, remedy: str) -> ModelError:
    return ModelError(str(path), expected=expected, found=found, remedy=remedy)


def _content_of(path: Path) -> bytes:
    """The content of a file that may be ONNX."""
    if path.is_dir():
        raise _refused(path, "an ONNX file", "a folder", _NAME_THE_FILE)
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= LARGEST else b""
    except OSError as error:
        raise _refused(path, "an ONNX file that can be read", brief(error), "check the path") from error
    if size > LARGEST:
        raise _refused(path, f"at most {LARGEST >> 20} MiB", f"{size >> 20} MiB", _SMALLER)
    is_archive = content[:4] == _ZIP
    is_pickle = content[:1] == _PICKLE and content[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    running = _running_kind(path) if is_archive else "a pickle" if is_pickle else ""
    if running:
        raise _refused(path, "an ONNX file", f"{running}, which runs code when it is read", f"convert it: {EXPORT}")
    if is_archive:
        raise _refused(path, "an ONNX file", "an archive that is damaged or of something else", _NAME_THE_FILE)
    return content


def _running_kind(path: Path) -> str:
    """The kind of an archive that runs code when it is read, from the names in it; "" for any other archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # zip's own errors
        return ""
    if any("/code/" in name or name.endswith("constants.pkl") for name in names):
        return "a TorchScript archive"
    if any(name.endswith(("archive_format", "serialized_exported_program.json")) for name in names):
        return "a .pt2 program of torch.export"
    return "an archive of pickles by torch.save" if any(name.endswith(".pkl") for name in names) else ""


def _parsed(path: Path, content: bytes) -> ModelProto:
    """The model of a file, after its operators were checked, with its own functions inlined."""
    import onnx
    from onnx import inliner

    try:
        model = onnx.load_model_from_string(content)
        operators = _count_operators(model)
    except Exception as error:  # protobuf's own errors, or functions that call themselves
        raise _refused(path, "an ONNX file", brief(error), f"write one: {EXPORT}") from error
    if not model.graph.node or not model.opset_import:
        raise _refused(path, "an ONNX file", "no graph in it", f"write one: {EXPORT}")
    if operators > _MOST_OPERATORS:
        found = f"{operators}, most of them in functions that call each other"
        raise _refused(path, f"at most {_MOST_OPERATORS} operators", found, f"export it again: {EXPORT}")
    _refuse_operators(path, model)
    try:
        # Dimensions of operators' own functions are none of the graph's; the exporter of torch writes some.
        return inliner.inline_local_functions(model) if model.functions else model
    except Exception as error:  # the inliner's own errors
        raise _refused(path, "functions that can be inlined", brief(error), f"export it again: {EXPORT}") from error


def _count_operators(model: ModelProto) -> int:
    """Number of a graph's operators, each of its functions counted wherever it is called.

    Raises:
        RecursionError: a function calls itself.
    """
    bodies = {_identity(function, function.name): function.node for function in model.functions}

    @cache
    def count(function: _Identity) -> int:
        return sum(count(_identity(node, node.op_type)) for node in bodies.get(function, ())) or 1

    return sum(count(_identity(node, node.op_type)) for node in model.graph.node)


def _identity(one: FunctionProto | NodeProto, name: str) -> _Identity:
    """What a function and the operators that call it have in common."""
    domain = "" if one.domain in _DOMAINS else one.domain
    return domain, name, one.overload


def _refuse_operators(path: Path, model: ModelProto) -> None:
    """Refuse operators of other domains but calls of the model's own functions, and those that hold graphs."""
    functions = {_identity(function, function.name) for function in model.functions}
    for node in chain(model.graph.node, *(function.node for function in model.functions)):
        name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        if node.domain not in _DOMAINS and _identity(node, node.op_type) not in functions:
            raise _refused(path, "operators of ONNX's own domain, ai.onnx", name, "export it without custom operators")
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            expected = "no operators that hold graphs of their own, such as If, Loop and Scan"
            remedy = "export it by tracing one image, without branches and loops over its values"
            raise _refused(path, expected, name, remedy)


def _take_in_external_data(path: Path, model: ModelProto) -> None:
    """Read weights from files beside the graph, by plain names alone."""
    from onnx import external_data_helper as external

    tensors = [tensor for tensor in external._get_all_tensors(model) if external.uses_external_data(tensor)]
    try:
        # Many tensors may take the same bytes of a file.
        size = model.ByteSize() + sum(_size_beside(path, tensor) for tensor in tensors)
        if size > LARGEST:
            raise _refused(path, f"at most {LARGEST >> 20} MiB with its weights", f"{size >> 20} MiB", _SMALLER)
        external.load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError) as error:
        raise _refused(path, "weights that lie in a file beside it", brief(error), _ONE_FILE) from error


def _size_beside(path: Path, tensor: TensorProto) -> int:
    """Bytes that a tensor takes of a file beside the graph.

    Raises:
        ModelError: the file lies elsewhere, or is none.
        ValueError: the place in the file is no number.
    """
    from onnx.external_data_helper import ExternalDataInfo

    info = ExternalDataInfo(tensor)
    beside = path.parent / info.location
    if Path(info.location).name != info.location or beside.is_symlink() or not beside.is_file():
        found = f"weights in {info.location!r}"
        raise _refused(path, "weights in the file or in a file beside it", found, _ONE_FILE)
    size, length = beside.stat().st_size, info.length or 0
    # Without a length, all of the file is read.
    return length if 0 < length < size else size


def _refuse_nan(path: Path, model: ModelProto) -> None:
    from onnx import numpy_helper

    from cellseg_batch.engine.inference.backends.onnx_half import constants_of

    for tensor in constants_of(model):
        values = numpy_helper.to_array(tensor)
        if values.dtype.kind == "f" and np.isnan(values).any():
            remedy = "export an earlier checkpoint of the training"
            raise _refused(path, "weights that are numbers", f"NaN in {tensor.name or 'a constant'}", remedy)


def _port(path: Path, value: ValueInfoProto, which: str, remedy: str) -> Port:
    from onnx import TensorProto

    tensor = value.type.tensor_type
    dtypes: dict[int, str] = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16"}
    shape = tuple(axis.dim_value or None for axis in tensor.shape.dim)
    if tensor.elem_type not in dtypes or len(shape) != 4:
        kind = TensorProto.DataType.Name(tensor.elem_type).lower()
        found = f"{value.name}: {kind} with {len(shape)} axes"
        expected = f"four axes (batch, channels, height, width) in float32 or float16 for {which}"
        raise _refused(path, expected, found, remedy)
    return Port(value.name, dtypes[tensor.elem_type], shape)
