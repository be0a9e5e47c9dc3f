"""A CUDA device as the engine uses it: streams, events, pinned memory, and a network between two buffers as a graph.

A `Device` may also be the CPU: there everything that is enqueued is done when the call returns, so that the code for
GPUs runs, and is tested, without one.  Nothing here knows which library computes, nor bundles, tiles or files.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cellseg_batch.engine.errors import BackendError
from cellseg_batch.engine.inference.backends.protocol import Logits, Shape


def available() -> bool:
    """Whether torch can use a GPU."""
    return torch.cuda.is_available()


def demand_gpu(library: str) -> None:
    """Refuse to go on without a GPU.

    Raises:
        BackendError: there is none that torch can use.
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
    """Whether ``error`` says, in any library's way, that the device's memory is full, or was raised because of it."""
    # A capture that fails raises an error of its own.
    chain = [cause for cause in (error, error.__context__) if cause is not None]
    # TensorRT writes it as one word or as three.
    says_so = ("outofmemory" in str(cause).lower().replace(" ", "") for cause in chain)
    return any(isinstance(cause, torch.OutOfMemoryError) for cause in chain) or any(says_so)


class Device:
    """One GPU, or the CPU in its stead.

    Args:
        name: as torch names it, such as ``cuda:0``, counted among the visible ones.

    Attributes:
        torch_device: where its tensors live.
        is_gpu: False for the CPU.

    Raises:
        BackendError: there is no such GPU.
    """

    def __init__(self, name: str) -> None:
        self.torch_device = torch.device(name)
        self.is_gpu = self.torch_device.type == "cuda"
        if self.is_gpu and self.torch_device.index >= torch.cuda.device_count():
            raise BackendError(
                f"`device={name}`",
                expected="a GPU that torch can see",
                found=f"{torch.cuda.device_count()} of them, counted from cuda:0",
                cause="CUDA_VISIBLE_DEVICES hides it",
                remedy="see cellseg-batch doctor",
            )

    @property
    def model(self) -> str:
        """Name and compute capability: what a compiled network is valid for."""
        major, minor = torch.cuda.get_device_capability(self.torch_device)
        return f"{torch.cuda.get_device_name(self.torch_device)} sm_{major}{minor}"

    def stream(self) -> Any:
        """A new stream, never the default one."""
        return torch.cuda.Stream(self.torch_device) if self.is_gpu else _HostStream()  # type: ignore[no-untyped-call]

    def event(self) -> Any:
        """A new event; a thread that waits for it sleeps."""
        return torch.cuda.Event(enable_timing=True, blocking=True) if self.is_gpu else _HostEvent()  # type: ignore[no-untyped-call]

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """Enqueue what is launched inside on ``stream``, and make its device the current one."""
        return torch.cuda.stream(stream) if self.is_gpu else contextlib.nullcontext()

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Host memory that the device reads and writes without a detour; torch keeps it for the next that asks."""
        return torch.empty(shape, dtype=dtype, pin_memory=self.is_gpu)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory of the device; raises torch.OutOfMemoryError."""
        return torch.zeros(shape, dtype=dtype, device=self.torch_device)

    def graph(self, launch: Callable[[int], None], stream: Any) -> Callable[[], None]:
        """Capture what ``launch`` enqueues on the stream whose handle it is given; a call replays it.

        Raises:
            RuntimeError: something in it cannot be captured; or whatever ``launch`` raises.
        """
        if not self.is_gpu:
            return lambda: launch(0)
        graph = torch.cuda.CUDAGraph()
        # Threads that read and write slides may go on while this one captures.
        with self.on(stream), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            launch(stream.cuda_stream)
        return graph.replay

    def settle(self) -> None:
        """Wait for all that was enqueued, and give back what nobody holds any more."""
        if self.is_gpu:
            torch.cuda.synchronize(self.torch_device)
            torch.cuda.empty_cache()


class GraphedHalf:
    """float16 buffers on the device that never move, and what is launched between them as one CUDA graph.

    Args:
        pixels: shape (N, C, H, W) of every batch.
        logits: shape (N, K, H, W) of every result.
        device: that computes.

    Attributes:
        pixels: the batch on the device, float16; a graph has its address baked in.
        logits: the result on the device, float16; likewise.

    Raises:
        torch.OutOfMemoryError: the buffers do not fit on the device.
    """

    def __init__(self, pixels: Shape, logits: Shape, device: Device) -> None:
        self.pixels = device.zeros(pixels, torch.half)
        self.logits = device.zeros(logits, torch.half)
        self._device = device
        # On the default stream TensorRT synchronises after every enqueue, and nothing can be captured.
        self._stream = device.stream()
        # In this order, in which they are dropped: a graph before what it launches.
        self._replay: Callable[[], None] = lambda: _no_launch(0)
        self._launch: Callable[[int], None] = _no_launch
        # The zeros above were written on the default stream.
        device.settle()

    def capture(self, launch: Callable[[int], None]) -> None:
        """Keep what ``launch`` enqueues on the stream whose handle it is given, to be replayed by every call.

        Raises:
            RuntimeError: something in it cannot be captured; or whatever ``launch`` raises.
        """
        self._launch = launch
        with self._device.on(self._stream):
            # Lazy initialisation, which a capture would forbid, happens here.
            launch(self._stream.cuda_stream)
        self._stream.synchronize()
        self._replay = self._device.graph(launch, self._stream)

    def enqueue(self) -> None:
        """Enqueue on the current stream: logits from what `pixels` will hold by then."""
        self._replay()

    def repeat(self) -> None:
        """Compute the last batch again and wait for it: what the device takes, without the copies."""
        with self._device.on(self._stream):
            self.enqueue()
        self._stream.synchronize()

    def __call__(
        self, batch: NDArray[np.float32], *, out: Logits | None = None, plain: bool = False
    ) -> NDArray[np.float32]:
        """Logits (N, K, H, W) float32 of pixels (N, C, H, W) float32.

        Args:
            batch: values within float16's range.
            out: not used; the result is a new array.
            plain: enqueue once more instead of replaying the graph, to compare the two.
        """
        # The host rounds while it copies to pinned memory, which it must do anyway; half the bytes go over the bus.
        sent, received = (self._device.pinned(tuple(tensor.shape), torch.half) for tensor in (self.pixels, self.logits))
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
    """Has nothing to wait for."""

    cuda_stream = 0

    def synchronize(self) -> None:
        """Return."""

    def wait_event(self, event: _HostEvent) -> None:
        """Return."""


class _HostEvent:
    """Remembers when it was recorded."""

    def __init__(self) -> None:
        self._time = 0.0

    def record(self, stream: _HostStream) -> None:
        """Note the time."""
        self._time = time.perf_counter()

    def synchronize(self) -> None:
        """Return."""

    def query(self) -> bool:
        """True: it has happened."""
        return True

    def elapsed_time(self, end: _HostEvent) -> float:
        """Milliseconds from this event to ``end``."""
        return 1000 * (end._time - self._time)
