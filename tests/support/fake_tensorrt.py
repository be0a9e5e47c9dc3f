"""TensorRT, torch-tensorrt and a CUDA device that exist only in these tests.

The two libraries know exactly the names and parameters of the tables in ``signatures``, which were read from the real
ones; anything else fails as it would there.  A plan is an exported program or a graph that the parser took, and running
it computes it on the CPU in float16, between the very addresses that it was given.  Each way to fail is one that the
real libraries have.
"""

from __future__ import annotations

import ctypes
import inspect
import io
import json
import logging
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import onnx
import onnxruntime
import torch

SIGNATURES = Path(__file__).parent / "signatures"
PAIRS = (("10.15.1.29", "2.11.0"), ("11.0.0.114", "2.13.0"))
# Where torch-tensorrt's logger for TensorRT puts what it is told.
TENSORRT_LOG = logging.getLogger("torch_tensorrt [TensorRT Conversion Context]")
FAILURES = ("import", "driver", "build out of memory", "deserialize", "context", "enqueue", "fp32 types", "fp32 layers")
GRAPH_FAILURES = (*FAILURES, "operator", "timings")


def table_of(package, version):
    return json.loads((SIGNATURES / f"{package}-{version}.json").read_text())


def parameters_of(signature):
    """An ``inspect.Signature`` from a line such as ``f(self: A, x: B = <default>) -> C``, and its ``C``."""
    inner, result = signature.split("(", 1)[1].rsplit(") -> ", 1)
    parts, depth = [""], 0
    for character in inner:
        depth += (character in "([{<") - (character in ")]}>")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    kind, empty = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    names = [(part.split(":")[0].strip(), " = " in part) for part in parts]
    return inspect.Signature(
        [inspect.Parameter(name, kind, default=None if optional else empty) for name, optional in names]
    ), result


class Strict:
    """An object with the members that a table gives its class, and what they do from ``behaviour``."""

    def __init__(self, library, kind, behaviour):
        self.__dict__.update(_library=library, _kind=kind, _behaviour=behaviour)

    def __getattr__(self, name):
        members = self._library.table["classes"][self._kind]
        if name not in members:
            raise AttributeError(f"TensorRT {self._library.__version__} has no {self._kind}.{name}")
        self._library.used.add((self._kind, name))
        if isinstance(members[name], str):
            return getattr(self._behaviour, name)
        return lambda *arguments, **keywords: self._library.call(self, members[name], name, arguments, keywords)

    def __setattr__(self, name, value):
        raise AttributeError(f"{self._kind}.{name} is not set by the backend")


class Member:
    """A member of an enum; its number is another one in each version."""

    def __init__(self, name, number):
        self.name, self._number = name, number

    def __int__(self):
        return self._number


class FakeTensorRt:
    """The module ``tensorrt`` of one version."""

    __spec__ = ModuleSpec("tensorrt", None)

    def __init__(self, version, device, failure):
        self.table = table_of("tensorrt", version)
        self.__version__ = self.table["version"]
        self.device, self.failure, self.used = device, failure, set()
        self.builds, self.timings_known = [], []
        for enum, names in self.table["enums"].items():
            setattr(self, enum, SimpleNamespace(**{name: Member(name, number) for number, name in enumerate(names)}))
        self.Runtime = Maker(self, "Runtime", lambda logger: FakeRuntime(self))
        self.Builder = Maker(self, "Builder", lambda logger: FakeBuilder(self))
        self.OnnxParser = Maker(self, "OnnxParser", lambda network, logger: FakeParser(self, network._behaviour))

    def call(self, receiver, signatures, name, arguments, keywords):
        failures = []
        for line in signatures:
            signature, result = parameters_of(line)
            try:
                bound = signature.bind(receiver, *arguments, **keywords)
            except TypeError as error:
                failures.append(f"{line}: {error}")
                continue
            value = getattr(receiver._behaviour, name)(*list(bound.arguments.values())[1:])
            expected = {"bool": bool, "int": int, "str": str}.get(result)
            assert expected is None or type(value) is expected, f"{name} gives {result} in the real library"
            return value
        raise TypeError("; ".join(failures))


class Maker:
    """A class of the module: calling it checks the arguments of ``__init__`` and makes a strict object."""

    def __init__(self, library, kind, make):
        self._library, self._kind, self._make = library, kind, make

    def __call__(self, *arguments, **keywords):
        self._library.used.add((self._kind, "__init__"))
        (line,) = self._library.table["classes"][self._kind]["__init__"]
        bound = parameters_of(line)[0].bind(None, *arguments, **keywords)
        return Strict(self._library, self._kind, self._make(*list(bound.arguments.values())[1:]))


class FakeRuntime:
    def __init__(self, library):
        self.library = library

    def deserialize_cuda_engine(self, plan):
        assert self.library.device.current is not None, "plans are loaded on the current GPU, which may be another"
        if self.library.failure == "deserialize":
            TENSORRT_LOG.error("IRuntime::deserializeCudaEngine: Error Code 1: Serialization (stale plan)")
            return None
        network = ExportedProgram(plan) if plan[:2] == b"PK" else ParsedGraph(plan)
        return Strict(self.library, "ICudaEngine", FakeEngine(self.library, network))


class ExportedProgram:
    """A plan of torch-tensorrt."""

    names = ("pixels", "output0")

    def __init__(self, plan):
        self._program = torch.export.load(io.BytesIO(plan))
        self._module = self._program.module()
        nodes = list(self._program.graph.nodes)
        (pixels,) = [node for node in nodes if node.op == "placeholder"][-1:]
        self.dtypes = [node.meta["val"].dtype for node in (pixels, nodes[-1].args[0][0])]
        self.bytes = sum(tensor.numel() * tensor.element_size() for tensor in self._program.state_dict.values())

    def __call__(self, pixels):
        return self._module(pixels)


class ParsedGraph:
    """A plan of the builder."""

    def __init__(self, plan):
        self._session = session_of(plan)
        ends = (*self._session.get_inputs(), *self._session.get_outputs())
        self.names = [end.name for end in ends]
        self.dtypes = [{"tensor(float16)": torch.half, "tensor(float)": torch.float}[end.type] for end in ends]
        self.bytes = sum(
            len(onnx.numpy_helper.to_array(value).tobytes()) for value in onnx.load_from_string(plan).graph.initializer
        )

    def __call__(self, pixels):
        return torch.from_numpy(self._session.run(None, {self.names[0]: pixels.numpy()})[0])


def session_of(graph):
    """A session of ONNX Runtime, which refuses graphs whose dtypes do not go together."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class FakeBuilder:
    def __init__(self, library):
        if library.failure == "driver":
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self.library = library

    def create_network(self, flags):
        assert flags == 1 << int(self.library.NetworkDefinitionCreationFlag.STRONGLY_TYPED), "layers of any precision"
        return Strict(self.library, "INetworkDefinition", SimpleNamespace(graph=None))

    def create_builder_config(self):
        return Strict(self.library, "IBuilderConfig", FakeConfig(self.library))

    def build_serialized_network(self, network, config):
        graph, cache = network._behaviour.graph, config._behaviour.cache
        assert self.library.device.current is not None, "plans are built for the current GPU, which may be another"
        (source,) = onnx.load_from_string(graph).graph.input
        if not all(axis.dim_value for axis in source.type.tensor_type.shape.dim):
            TENSORRT_LOG.error("Network has dynamic or shape inputs, but no optimization profile has been defined.")
            return None
        if self.library.failure == "build out of memory":
            TENSORRT_LOG.error("[defaultAllocator.cpp] Error Code 1: Cuda Runtime (out of memory)")
            return None
        self.library.timings_known.append(len(cache.content))
        cache.content += b"t"
        self.library.builds.append(tuple(axis.dim_value for axis in source.type.tensor_type.shape.dim))
        return memoryview(graph)


class FakeConfig:
    def __init__(self, library):
        self.library, self.cache = library, None

    def create_timing_cache(self, serialized):
        return Strict(self.library, "ITimingCache", FakeTimings(bytes(serialized)))

    def set_timing_cache(self, cache, ignore_mismatch):
        self.cache = cache._behaviour
        return self.library.failure != "timings"

    def get_timing_cache(self):
        return Strict(self.library, "ITimingCache", self.cache)


class FakeTimings:
    def __init__(self, content):
        self.content = content

    def serialize(self):
        return memoryview(self.content)


class FakeParser:
    def __init__(self, library, network):
        self.library, self.network, self.errors = library, network, []

    @property
    def num_errors(self):
        return len(self.errors)

    def parse(self, model, path=None):
        try:
            session_of(bytes(model))
        except Exception as error:
            self.errors.append(("", str(error)))
        if self.library.failure == "operator":
            self.errors.append(("Magic", "No importer registered for op: Magic"))
        self.network.graph = bytes(model)
        return not self.errors

    def get_error(self, index):
        operator, text = self.errors[index]
        return Strict(self.library, "ParserError", SimpleNamespace(node_operator=lambda: operator, desc=lambda: text))


class FakeEngine:
    def __init__(self, library, network):
        self.library, self.network, self.num_io_tensors = library, network, 2

    def get_tensor_name(self, index):
        return self.network.names[index]

    def get_tensor_mode(self, name):
        modes = self.library.TensorIOMode
        return modes.INPUT if name == self.network.names[0] else modes.OUTPUT

    def get_tensor_dtype(self, name):
        if self.library.failure == "fp32 types":
            return self.library.DataType.FLOAT
        dtype = self.network.dtypes[self.network.names.index(name)]
        return {torch.half: self.library.DataType.HALF, torch.float: self.library.DataType.FLOAT}[dtype]

    def get_engine_stat(self, stat):
        assert stat is self.library.EngineStat.TOTAL_WEIGHTS_SIZE
        return 2 * self.network.bytes if self.library.failure == "fp32 layers" else self.network.bytes

    def create_execution_context(self):
        if self.library.failure == "context":
            return None
        return Strict(self.library, "IExecutionContext", FakeContext(self))


class FakeContext:
    def __init__(self, engine):
        self.engine, self.addresses, self.shapes = engine, {}, {}

    def set_input_shape(self, name, shape):
        pixels, logits = self.engine.network.names
        self.shapes = {name: shape, logits: tuple(self.engine.network(torch.zeros(shape, dtype=torch.half)).shape)}
        return name == pixels

    def get_tensor_shape(self, name):
        return self.shapes[name]

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return address != 0

    def execute_async_v3(self, stream):
        if self.engine.library.failure == "enqueue":
            return False
        self.engine.library.device.enqueue(stream, self._run)
        return True

    def _run(self):
        network = self.engine.network
        pixels, logits = (at_address(self.addresses[name], self.shapes[name]) for name in network.names)
        logits.copy_(network(pixels))


def at_address(address, shape):
    """The float16 tensor that lies at an address of this process."""
    size = 2 * torch.Size(shape).numel()
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=torch.half).view(shape)


class FakeTorchTensorRt:
    """The module ``torch_tensorrt`` of one version."""

    __spec__ = ModuleSpec("torch_tensorrt", None)

    def __init__(self, version, device, failure):
        self.table = table_of("torch_tensorrt", version)
        self.__version__, self.device = version, device
        self.failure, self.builds, self.timings_known = failure, [], []
        if "logging.py:TRT_LOGGER" in self.table["constants"]:
            self.logging = SimpleNamespace(TRT_LOGGER=object())
        name = "convert_exported_program_to_serialized_trt_engine"
        self.dynamo = SimpleNamespace(**{name: lambda *a, **k: self._convert(self.table["functions"][name], a, k)})

    def Input(self, **keywords):
        unread = set(keywords) - set(self.table["functions"]["Input"]["keys_read"])
        assert not unread, f"torch-tensorrt {self.__version__} never reads {unread}"
        return SimpleNamespace(**keywords)

    def _convert(self, entry, arguments, keywords):
        # The real function takes any keyword and forgets the ones it does not know.
        unknown = set(keywords) - set(entry["keyword_only"]) - set(entry["positional"])
        assert not unknown, f"torch-tensorrt {self.__version__} would silently drop {unknown}"
        assert len(arguments) <= len(entry["positional"])
        assert self.device.current is not None, "plans are built for the current GPU, which may be another"
        if self.failure == "driver":
            self._fail("pybind11::init(): factory function returned nullptr")
        if self.failure == "build out of memory":
            TENSORRT_LOG.error("[defaultAllocator.cpp] Error Code 1: Cuda Runtime (out of memory)")
            self._fail("")
        (profile,) = keywords["arg_inputs"]
        for least, best, most in zip(profile.min_shape, profile.opt_shape, profile.max_shape, strict=True):
            assert least <= best <= most
        self.builds.append(profile)
        timings = Path(keywords["timing_cache_path"])
        self.timings_known.append(len(timings.read_bytes()))
        timings.write_bytes(timings.read_bytes() + b"t")
        buffer = io.BytesIO()
        torch.export.save(arguments[0], buffer)
        return buffer.getvalue()

    def _fail(self, reason):
        message = f"While interpreting the module got an error: {reason}"
        if self.__version__ >= "2.13":
            raise RuntimeError(message)
        # 2.11 logs what went wrong and stumbles over it two lines later.
        logging.getLogger("torch_tensorrt.dynamo._compiler").error(message)
        raise UnboundLocalError("cannot access local variable 'interpreter_result'")


class FakeDevice:
    """Streams and graphs of a device whose memory is the host's: what is enqueued runs at once, unless captured."""

    def __init__(self):
        self.current, self.capturing, self.events = None, None, []

    def enqueue(self, stream, work):
        assert stream != 0, "the default stream"
        assert self.current is not None
        assert self.current.cuda_stream == stream
        if self.capturing is None:
            self.events.append("enqueue")
            work()
        else:
            self.events.append("capture")
            self.capturing.work.append(work)

    def install(self, monkeypatch):
        from cellseg_batch.engine.inference.backends import cuda

        monkeypatch.setattr(cuda, "available", lambda: True)
        monkeypatch.setattr(cuda, "Device", self.device_class(cuda.Device))
        real = inspect.signature(torch.cuda.graph.__init__)
        device = self

        class Stream:
            cuda_stream = 4711

            def __init__(self, device, priority=0):
                pass

            def synchronize(self):
                assert device.capturing is None, "nothing may wait during a capture"

        class Graph:
            def __init__(self):
                self.work = []

            def replay(self):
                device.events.append("replay")
                for work in self.work:
                    work()

        @contextmanager
        def stream_context(stream):
            device.current, before = stream, device.current
            yield
            device.current = before

        @contextmanager
        def graph_context(*arguments, **keywords):
            bound = real.bind(None, *arguments, **keywords).arguments
            device.capturing = bound["cuda_graph"]
            with stream_context(bound["stream"]):
                try:
                    yield
                finally:
                    device.capturing = None

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "stream", stream_context)
        monkeypatch.setattr(torch.cuda, "graph", graph_context)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Fake GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    @staticmethod
    def device_class(base):
        """A device whose streams are a GPU's and whose memory is the host's."""

        class OnHost(base):
            def __init__(self, name):
                super().__init__("cpu")
                self.is_gpu = True

            def pinned(self, shape, dtype):
                return torch.empty(shape, dtype=dtype)

        return OnHost


class Refusing:
    """An import hook: what torch_tensorrt does where TensorRT's libraries are missing."""

    def find_spec(self, name, path=None, target=None):
        if name == "torch_tensorrt":
            raise Exception("import error when try to import _TensorRTProxyModule, Could not find libnvinfer.so.11")


def install(monkeypatch, pair, failure=None):
    """Put the fakes where the real libraries would be; returns (tensorrt, torch_tensorrt, device)."""
    import sys

    assert failure is None or failure in GRAPH_FAILURES
    device = FakeDevice()
    device.install(monkeypatch)
    tensorrt, torch_tensorrt = FakeTensorRt(pair[0], device, failure), FakeTorchTensorRt(pair[1], device, failure)
    if failure == "import":
        monkeypatch.setattr(sys, "meta_path", [Refusing(), *sys.meta_path])
        monkeypatch.delitem(sys.modules, "torch_tensorrt", raising=False)
    else:
        monkeypatch.setitem(sys.modules, "torch_tensorrt", torch_tensorrt)
        monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)
    return tensorrt, torch_tensorrt, device
