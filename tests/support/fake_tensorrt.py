"""TensorRT, torch-tensorrt and a CUDA device that exist only in these tests.

The two libraries know exactly the names and parameters of the tables in ``signatures``, which were read from the real
ones; anything else fails as it would there.  A plan is an exported program, and running one computes it on the CPU in
float16, between the very addresses that it was given.  Each way to fail is one that the real libraries have.
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

import torch

SIGNATURES = Path(__file__).parent / "signatures"
PAIRS = (("10.15.1.29", "2.11.0"), ("11.0.0.114", "2.13.0"))
# Where torch-tensorrt's logger for TensorRT puts what it is told.
TENSORRT_LOG = logging.getLogger("torch_tensorrt [TensorRT Conversion Context]")
FAILURES = ("import", "driver", "build out of memory", "deserialize", "context", "enqueue", "fp32 types", "fp32 layers")


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


class FakeTensorRt:
    """The module ``tensorrt`` of one version."""

    __spec__ = ModuleSpec("tensorrt", None)

    def __init__(self, version, device, failure):
        self.table = table_of("tensorrt", version)
        self.__version__ = self.table["version"]
        self.device, self.failure, self.used = device, failure, set()
        for enum, names in self.table["enums"].items():
            setattr(self, enum, SimpleNamespace(**{name: SimpleNamespace(name=name) for name in names}))
        self.Runtime = Maker(self, "Runtime", lambda logger: FakeRuntime(self))

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
        return Strict(self.library, "ICudaEngine", FakeEngine(self.library, torch.export.load(io.BytesIO(plan))))


class FakeEngine:
    def __init__(self, library, program):
        self.library, self.program, self.num_io_tensors = library, program, 2

    def get_tensor_name(self, index):
        return ("pixels", "output0")[index]

    def get_tensor_mode(self, name):
        modes = self.library.TensorIOMode
        return modes.INPUT if name == "pixels" else modes.OUTPUT

    def get_tensor_dtype(self, name):
        if self.library.failure == "fp32 types":
            return self.library.DataType.FLOAT
        graph = self.program.graph
        (node,) = [node for node in graph.nodes if node.op == ("placeholder" if name == "pixels" else "output")][-1:]
        tensor = (node if name == "pixels" else node.args[0][0]).meta["val"]
        return {torch.half: self.library.DataType.HALF, torch.float: self.library.DataType.FLOAT}[tensor.dtype]

    def get_engine_stat(self, stat):
        assert stat is self.library.EngineStat.TOTAL_WEIGHTS_SIZE
        size = sum(tensor.numel() * tensor.element_size() for tensor in self.program.state_dict.values())
        return 2 * size if self.library.failure == "fp32 layers" else size

    def create_execution_context(self):
        if self.library.failure == "context":
            return None
        return Strict(self.library, "IExecutionContext", FakeContext(self))


class FakeContext:
    def __init__(self, engine):
        self.engine, self.addresses, self.shapes = engine, {}, {}
        self.module = engine.program.module()

    def set_input_shape(self, name, shape):
        self.shapes = {name: shape, "output0": tuple(self.module(torch.zeros(shape, dtype=torch.half)).shape)}
        return name == "pixels"

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
        pixels, logits = (at_address(self.addresses[name], self.shapes[name]) for name in ("pixels", "output0"))
        logits.copy_(self.module(pixels))


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

    assert failure is None or failure in FAILURES
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
