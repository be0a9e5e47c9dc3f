"""GPUs that exist only in tests, with the memory of the host; they fail where real ones would.

What is enqueued on a stream runs as late as it may: when the host waits for it, or when work that waits for it runs.
So a wait that is missing shows as wrong pixels.  New memory is full of garbage.  Each device has 32 streams of each
priority, handed out in turn; one capture may go on in the process, and nothing may synchronise meanwhile; all tensors
of a kernel must lie on the stream's device; memory may run out.  Weights of networks count as constants anywhere.
"""

from __future__ import annotations

import threading
import time
import weakref
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cellseg_batch.engine.inference.backends import cuda
from cellseg_batch.kernels import gather_reference, instances_reference, stitch_reference

STREAMS = 32
# What torch lets the host ask of a tensor only after the device has caught up.
_WAITING = ("_local_scalar_dense", "is_nonzero", "equal")


class FakeGpus:
    """The GPUs of a machine.

    Attributes:
        memory: bytes of each GPU.
        captures: number of captures.
    """

    def __init__(self, memory=1 << 40):
        self.memory = memory
        self.captures = 0
        self.capture = None
        self.lock = threading.RLock()
        self.used = {}
        self.local = threading.local()
        self._pools = {}
        self._devices = {}  # address of a tensor's memory -> number of its GPU
        self._pinned = set()
        self._held = []  # so that no address is given twice

    def install(self, monkeypatch):
        """Put these GPUs where the real ones would be."""
        from cellseg_batch.kernels import blend_triton, gather_triton, pixel_codes_triton, stitch_triton

        monkeypatch.setattr(cuda, "available", lambda: True)
        monkeypatch.setattr(cuda, "Device", lambda name: FakeDevice(self, name))
        monkeypatch.setattr(gather_triton, "gather", self.gather)
        classify = self._kernel(instances_reference.classify_pixels, True)
        monkeypatch.setattr(pixel_codes_triton, "classify_pixels", classify)
        for module, names in ((stitch_triton, "stitch"), (blend_triton, "blend")):
            for form in ("mask", "probability"):
                name = f"{names}_{form}"
                monkeypatch.setattr(module, name, self._kernel(getattr(stitch_reference, name), form == "mask"))

    def stream(self, device, priority):
        with self.lock:
            pool, number = self._pools.setdefault((device, priority), ([Stream(self, device) for _ in range(32)], []))
            number.append(None)
            return pool[(len(number) - 1) % STREAMS]

    def streams(self, device):
        return [stream for (place, _), (pool, _) in self._pools.items() if place == device for stream in pool]

    def own(self, tensor, device):
        """Note that a tensor's memory lies on a GPU; None for memory of the host that is pinned."""
        storage = tensor.untyped_storage()
        with self.lock:
            self._held.append(storage)
            if device is None:
                self._pinned.add(storage.data_ptr())
            else:
                self._devices[storage.data_ptr()] = device
        return tensor

    def device_of(self, tensor):
        return self._devices.get(tensor.untyped_storage().data_ptr())

    @contextmanager
    def on(self, stream):
        before, self.local.stream = getattr(self.local, "stream", None), stream
        try:
            with _Enqueuing(self, stream):
                yield
        finally:
            self.local.stream = before

    @contextmanager
    def running(self):
        """Let torch compute at once in this thread."""
        before, self.local.running = getattr(self.local, "running", False), True
        try:
            with torch.no_grad():
                yield
        finally:
            self.local.running = before

    @contextmanager
    def capturing(self, stream):
        with self.lock:
            if self.capture is not None:
                self.break_capture("torch captures one graph at a time")
            self.capture = Capture(stream)
        try:
            time.sleep(0.002)  # in which other threads do what they must not
            yield self.capture
            time.sleep(0.002)
        finally:
            with self.lock:
                capture, self.capture = self.capture, None
                self.captures += 1
        if capture.broken:
            raise RuntimeError(f"operation failed due to a previous error during capture: {capture.broken}")

    def break_capture(self, why):
        self.capture.broken = why
        raise RuntimeError(f"operation not permitted when stream is capturing: {why}")

    def synchronise(self, device):
        with self.lock:
            if self.capture is not None:
                self.break_capture("the device is synchronised")
            for stream in self.streams(device):
                stream.run_until(len(stream.work))

    def launch(self, work, *tensors):
        """Enqueue work on tensors, as a kernel would."""
        stream = self.local.stream
        places = {self.device_of(tensor) for tensor in tensors}
        if places != {stream.device}:
            raise RuntimeError(f"tensors on {places}, None is the host, and a stream of GPU {stream.device}")
        stream.enqueue(work)

    def replay(self, graph):
        for work in graph.work:
            self.local.stream.enqueue(work)

    def gather(self, pixels, rows, columns, low, scale, out, clip=True):
        def work():
            tiles = np.empty(out.shape, np.float32)
            gather_reference.gather(pixels.numpy(), rows, columns, low, scale, tiles, clip)
            out.copy_(torch.from_numpy(tiles))

        self.launch(work, pixels, out)

    def _kernel(self, reference, counts):
        """A launcher around a reference, whose last argument is the output."""

        def launcher(logits, *arguments):
            out = arguments[-1]
            result = self.own(torch.full((2,), 12345), self.local.stream.device)

            def work():
                counted = reference(logits.float().numpy(), *arguments[:-1], out.numpy())
                if counts:
                    result.copy_(torch.tensor(counted))

            self.launch(work, logits, out)
            return result

        return launcher

    def dispatch(self, stream, func, args, kwargs):
        """Run an operation of torch on the host, or enqueue it; its result then holds garbage until it has run."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        places = {self.device_of(tensor) for tensor in tensors} - {None}
        if getattr(self.local, "running", False) or (tensors and not places):
            return func(*args, **kwargs)
        if not tensors:  # it makes memory, all of it on the device
            return self.own(func(*args, **kwargs), stream.device)
        if places != {stream.device}:
            raise RuntimeError(f"Expected all tensors to be on the same device: {places}, GPU {stream.device}")
        schema = func._schema
        if schema.name.removeprefix("aten::") in _WAITING:
            raise RuntimeError(f"the host waits for the device in {schema.name}")
        if schema.is_mutable:
            target = args[0]
            if self.device_of(target) is None and target.untyped_storage().data_ptr() not in self._pinned:
                raise RuntimeError(f"{schema.name} waits for the device, as the host's memory is not pinned")
            stream.enqueue(lambda: func(*args, **kwargs))
            return target
        made = func(*args, **kwargs)
        if any(result.alias_info is not None for result in schema.returns):  # a view
            return made
        for leaf in tree_leaves(made):
            self.own(leaf, stream.device)

        def work():
            for leaf, value in zip(tree_leaves(made), tree_leaves(func(*args, **kwargs)), strict=True):
                leaf.copy_(value)

        stream.enqueue(work)
        return made


class Capture:
    """The work of a graph, while and after it is captured."""

    def __init__(self, stream):
        self.stream, self.thread = stream, threading.current_thread()
        self.work, self.broken = [], ""


class _Enqueuing(TorchDispatchMode):
    def __init__(self, gpus, stream):
        super().__init__()
        self.gpus, self.stream = gpus, stream

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.gpus.dispatch(self.stream, func, args, kwargs or {})


class Stream:
    def __init__(self, gpus, device):
        self.gpus, self.device = gpus, device
        self.work, self.done = [], 0

    @property
    def cuda_stream(self):
        return id(self)

    def enqueue(self, work):
        with self.gpus.lock:
            capture = self.gpus.capture
            if capture is None or capture.stream is not self:
                self.work.append(work)
            elif capture.thread is threading.current_thread():
                capture.work.append(work)
            else:
                self.gpus.break_capture("another thread works on the stream")

    def run_until(self, count):
        with self.gpus.lock, self.gpus.running():
            while self.done < count:
                work, self.work[self.done] = self.work[self.done], None
                self.done += 1
                work()

    def wait_event(self, event):
        stream, count = event.stream, event.count
        if stream is not None:
            self.enqueue(lambda: stream.run_until(count))

    def synchronize(self):
        with self.gpus.lock:
            if self.gpus.capture is not None and self.gpus.capture.stream is self:
                self.gpus.break_capture("the stream is synchronised")
            self.run_until(len(self.work))


class Event:
    def __init__(self):
        self.stream, self.count = None, 0

    def record(self, stream):
        with stream.gpus.lock:
            self.stream, self.count = stream, len(stream.work)

    def synchronize(self):
        if self.stream is not None:
            self.stream.run_until(self.count)

    def query(self):
        return self.stream is None or self.stream.done >= self.count

    def elapsed_time(self, end):
        return 1.0


class FakeDevice(cuda.Device):
    """One of the GPUs, for the engine."""

    def __init__(self, gpus, name):
        super().__init__("cpu")
        self.gpus = gpus
        self.number = int(name.partition(":")[2] or 0)

    def stream(self, for_captures=False):
        return self.gpus.stream(self.number, -1 if for_captures else 0)

    def event(self):
        return Event()

    def on(self, stream):
        return self.gpus.on(stream)

    def pinned(self, shape, dtype):
        capture = self.gpus.capture
        if capture is not None and capture.thread is threading.current_thread():
            self.gpus.break_capture("pinned memory is allocated")
        with self.gpus.running():
            return self.gpus.own(torch.full(shape, 111, dtype=dtype), None)

    def empty(self, shape, dtype):
        with self.gpus.running():
            return self._take(torch.full(shape, 111, dtype=dtype))

    def send(self, array):
        with self.gpus.running():
            pinned = torch.from_numpy(array).clone()
            sent = self._take(torch.full_like(pinned, 111))
        self.gpus.local.stream.enqueue(lambda: sent.copy_(pinned))
        return sent

    def _take(self, tensor):
        """Count the memory of a tensor for as long as something refers to it."""
        gpus, size = self.gpus, tensor.numel() * tensor.element_size()

        def give_back():
            with gpus.lock:
                gpus.used[self.number] -= size

        with gpus.lock:
            used = gpus.used.get(self.number, 0)
            if used + size > gpus.memory:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")
            gpus.used[self.number] = used + size
        weakref.finalize(tensor, give_back)
        return gpus.own(tensor, self.number)

    def _graph(self, launch, stream):
        with self.gpus.capturing(stream) as graph, self.on(stream):
            launch(stream.cuda_stream)
        return lambda: self.gpus.replay(graph)

    def _synchronise(self):
        self.gpus.synchronise(self.number)
