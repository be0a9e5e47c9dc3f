"""Wrap a CUDA device: its owner, streams, events, copies, and a network between two buffers as a CUDA graph.

A `Device` may also be the CPU: enqueued work is then done when the call returns, so that tests run the code for GPUs
without a GPU.  It must not know which library computes, nor bundles, tiles or files.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cellseg_batch.engine.errors import BackendError
from cellseg_batch.engine.inference.backends.protocol import Logits, Shape
from cellseg_batch.engine.machine import gpu_share

# Parts of the messages of full memory, without spaces: TensorRT writes three words as one or as three, and cuDNN finds
# no convolution ("GET was unable to find an engine") where there is no memory for the workspace of any.
_FULL_MEMORY = ("outofmemory", "unabletofindanengine")


def available() -> bool:
    """Whether torch can use a GPU."""
    return torch.cuda.is_available()


def demand_gpu(library: str) -> None:
    """Check that there is a GPU for ``library``.

    Raises:
        BackendError: torch sees no GPU that it can use.
    """
    if not available():
        raise BackendError(
            library,
            expected="an NVIDIA GPU that torch can use",
            found=f"torch {torch.__version__} without one",
            cause="no GPU, no driver, or the CPU build of torch",
            remedy="install the CUDA build of torch on a machine with an NVIDIA GPU",
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error``, or the error that it was raised from, reports in any library's words that memory is full."""
    # A failed capture raises its own error in the context of the first.
    chain = [link for link in (error, error.__context__) if link is not None]
    texts = [str(link).lower().replace(" ", "") for link in chain]
    in_text = any(words in text for words in _FULL_MEMORY for text in texts)
    return in_text or any(isinstance(link, torch.OutOfMemoryError) for link in chain)


class DeviceOwner:
    """Decides which threads of this process may compile, synchronise and capture, for all GPUs together.

    A device that is synchronised breaks the capture of any thread on it, compilers synchronise to load and time
    kernels, and torch captures one graph at a time.  So a capture is alone.  One thread compiles at a time, which may
    take minutes; meanwhile others synchronise.  All threads go on launching, copying and allocating.

    Each method returns a context that waits for the right and holds it; a thread that compiles may nest them.
    """

    def __init__(self) -> None:
        self._compiling, self._synchronising = threading.RLock(), threading.RLock()

    def compiling(self) -> contextlib.AbstractContextManager[object]:
        """Return the right to compile, and to load networks."""
        return self._compiling

    def synchronising(self) -> contextlib.AbstractContextManager[object]:
        """Return the right to synchronise a device."""
        return self._synchronising

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """Return the right to capture."""
        with self._compiling, self._synchronising:
            yield


_OWNER = DeviceOwner()


class Device:
    """A GPU, or the CPU in its stead; a process takes no more than its share of a GPU's memory (`gpu_share`).

    Args:
        name: torch's name of the device, such as ``cuda:0``, counted among the visible GPUs.

    Attributes:
        torch_device: torch device of its tensors.
        is_gpu: False for the CPU.

    Raises:
        BackendError: there is no such GPU.
    """

    def __init__(self, name: str) -> None:
        self.torch_device = torch.device(name)
        self.is_gpu = self.torch_device.type == "cuda"
        self._capture_stream: Any = None
        if self.is_gpu and self.torch_device.index >= torch.cuda.device_count():
            raise BackendError(
                f"`device={name}`",
                expected="a GPU that torch can see",
                found=f"{torch.cuda.device_count()} of them, counted from cuda:0",
                cause="CUDA_VISIBLE_DEVICES hides it",
                remedy="see cellseg-batch doctor",
            )
        if self.is_gpu and (share := gpu_share()) < 1:
            torch.cuda.set_per_process_memory_fraction(share, self.torch_device)

    @property
    def model(self) -> str:
        """Name and compute capability; a compiled network is valid for this model only."""
        major, minor = torch.cuda.get_device_capability(self.torch_device)
        return f"{torch.cuda.get_device_name(self.torch_device)} sm_{major}{minor}"

    def stream(self, for_captures: bool = False) -> Any:
        """Return a stream, never the default one.

        torch hands out 32 streams of each priority in turn, so callers may share one.  Streams for captures have a
        priority of their own: work of another thread on a stream that is captured would go into the graph.
        """
        if not self.is_gpu:
            return _HostStream()
        return torch.cuda.Stream(self.torch_device, priority=-1 if for_captures else 0)  # type: ignore[no-untyped-call]

    def event(self) -> Any:
        """Return a new event; a thread that waits for it sleeps."""
        return torch.cuda.Event(enable_timing=True, blocking=True) if self.is_gpu else _HostEvent()  # type: ignore[no-untyped-call]

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """Return a context that launches work on ``stream`` and makes its device the current device."""
        return torch.cuda.stream(stream) if self.is_gpu else contextlib.nullcontext()

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return page-locked host memory, which the device copies directly; torch reuses it only after these copies."""
        return torch.empty(shape, dtype=dtype, pin_memory=self.is_gpu)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return memory of the device for the current stream; raises torch.OutOfMemoryError."""
        return torch.empty(shape, dtype=dtype, device=self.torch_device)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return zeroed memory of the device; raises torch.OutOfMemoryError."""
        return self.empty(shape, dtype).zero_()

    def send(self, array: NDArray[Any]) -> torch.Tensor:
        """Return a copy of a host array on the device, with its strides, enqueued on the current stream.

        It goes through page-locked memory: a copy from other memory waits for all earlier work of the stream.
        """
        source = torch.from_numpy(array)
        sent = torch.empty_like(source, pin_memory=self.is_gpu).copy_(source)
        return sent.to(self.torch_device, non_blocking=True)

    def receive(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of a device tensor in page-locked memory, enqueued on the current stream."""
        return self.pinned(tuple(tensor.shape), tensor.dtype).copy_(tensor, non_blocking=True)

    def compiling(self) -> contextlib.AbstractContextManager[object]:
        """Return a context in which this thread may compile; see `DeviceOwner`."""
        return _OWNER.compiling()

    def capture(self, launch: Callable[[int], None]) -> Callable[[], None]:
        """Capture the work that ``launch`` enqueues on the stream whose handle it gets, after a first launch.

        Returns:
            A call that replays the work on the current stream.

        Raises:
            RuntimeError: some of the work cannot be captured.
            Exception: whatever ``launch`` raises.
        """
        with _OWNER.compiling():
            # A single stream for all captures of this device, because libraries keep a workspace for each stream.
            self._capture_stream = stream = self._capture_stream or self.stream(for_captures=True)
            with self.on(stream):
                launch(stream.cuda_stream)  # compiles and initialises what is done lazily, which a capture forbids
            stream.synchronize()
            with _OWNER.capturing():
                return self._graph(launch, stream)

    def settle(self) -> None:
        """Wait for all enqueued work, and free the unused memory that torch still holds."""
        with _OWNER.synchronising():
            self._synchronise()

    def _graph(self, launch: Callable[[int], None], stream: Any) -> Callable[[], None]:
        if not self.is_gpu:
            return lambda: launch(0)
        graph = torch.cuda.CUDAGraph()
        # Other threads may launch, copy and allocate while this thread captures.
        with self.on(stream), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            launch(stream.cuda_stream)
        return graph.replay

    def _synchronise(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize(self.torch_device)
            torch.cuda.empty_cache()


class GraphedHalf:
    """float16 buffers on the device that never move, and the work between them as one CUDA graph.

    Args:
        pixels: shape (N, C, H, W) of every batch.
        logits: shape (N, K, H, W) of every result.
        device: the device that computes.

    Attributes:
        pixels: the batch on the device, float16; the graph contains its address.
        logits: the result on the device, float16; the graph contains its address.

    Raises:
        torch.OutOfMemoryError: the buffers do not fit on the device.
    """

    def __init__(self, pixels: Shape, logits: Shape, device: Device) -> None:
        self.pixels = device.zeros(pixels, torch.half)
        self.logits = device.zeros(logits, torch.half)
        self._device = device
        self._stream = device.stream()
        # Keep this order, in which Python drops them: the graph must go before the objects that it launches.
        self._replay: Callable[[], None] = lambda: _no_launch(0)
        self._launch: Callable[[int], None] = _no_launch
        # The zeros above were written on the default stream.
        device.settle()

    def capture(self, launch: Callable[[int], None]) -> None:
        """Capture the work that ``launch`` enqueues on the stream whose handle it gets; every call replays it.

        Raises:
            RuntimeError: some of the work cannot be captured.
            Exception: whatever ``launch`` raises.
        """
        self._launch = launch
        self._replay = self._device.capture(launch)

    def enqueue(self) -> None:
        """See `DeviceModel.enqueue`."""
        self._replay()

    def repeat(self) -> None:
        """See `DeviceModel.repeat`."""
        with self._device.on(self._stream):
            self.enqueue()
        self._stream.synchronize()

    def __call__(
        self, batch: NDArray[np.float32], *, out: Logits | None = None, plain: bool = False
    ) -> NDArray[np.float32]:
        """Return logits (N, K, H, W) float32 of pixels (N, C, H, W) float32.

        Args:
            batch: pixels, values within float16's range.
            out: not used; the result is a new array.
            plain: launch the work directly instead of replaying the graph, to compare the two.
        """
        # The host must copy to pinned memory anyway; rounding to float16 on the way halves the bytes on the bus.
        buffers = (self.pixels, self.logits)
        sent, received = (self._device.pinned(tuple(buffer.shape), torch.half) for buffer in buffers)
        sent.copy_(torch.from_numpy(batch))
        with self._device.on(self._stream):
            self.pixels.copy_(sent, non_blocking=True)
            if plain:
                self._launch(self._stream.cuda_stream)
            else:
                self.enqueue()
            received.copy_(self.logits, non_blocking=True)
        self._stream.synchronize()
        logits: NDArray[np.float32] = received.float().numpy()
        return logits


def _no_launch(stream: int) -> None:
    raise RuntimeError("called before anything was captured")


class _HostStream:
    """A stream of the CPU, where work is done at once, so there is nothing to wait for."""

    cuda_stream = 0

    def synchronize(self) -> None:
        """Return at once."""

    def wait_event(self, event: _HostEvent) -> None:
        """Return at once."""


class _HostEvent:
    """An event of the CPU; it keeps the time at which it was recorded."""

    def __init__(self) -> None:
        self._time = 0.0

    def record(self, stream: _HostStream) -> None:
        """Note the time."""
        self._time = time.perf_counter()

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Return True: the event has happened."""
        return True

    def elapsed_time(self, end: _HostEvent) -> float:
        """Return the milliseconds from this event to ``end``."""
        return 1000 * (end._time - self._time)
