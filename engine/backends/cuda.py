"""One batch's way through a CUDA device: pinned host memory, static device buffers, one stream, one graph.

It must not know which library computes between the buffers, nor bundles, tiles or files.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from cellseg_batch.engine.backends.backend import Shape

DEVICE = "cuda"


def available() -> bool:
    """Whether torch can use a GPU."""
    return torch.cuda.is_available()


class GraphedHalf:
    """float16 buffers on the device that never move, and what is launched between them as one CUDA graph.

    Args:
        pixels: shape (N, C, H, W) of every batch.
        logits: shape (N, K, H, W) of every result.

    Attributes:
        pixels: the batch on the device, float16; a graph has its address baked in.
        logits: the result on the device, float16; likewise.

    Raises:
        torch.cuda.OutOfMemoryError: the buffers do not fit on the device.
    """

    def __init__(self, pixels: Shape, logits: Shape) -> None:
        self.pixels = torch.zeros(pixels, dtype=torch.half, device=DEVICE)
        self.logits = torch.zeros(logits, dtype=torch.half, device=DEVICE)
        self._pixels = pinned(pixels)
        self._logits = pinned(logits)
        self._result = torch.empty(logits)
        # On the default stream TensorRT synchronises after every enqueue, and nothing can be captured.
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._launch: Callable[[int], None] = _no_launch
        # The zeros above were written on the default stream.
        torch.cuda.synchronize()

    def capture(self, launch: Callable[[int], None]) -> None:
        """Keep what ``launch`` enqueues on the stream whose handle it is given, to be replayed by every call.

        Raises:
            RuntimeError: something in it cannot be captured; or whatever ``launch`` raises.
        """
        self._launch = launch
        with torch.cuda.stream(self._stream):
            # Lazy initialisation, which a capture would forbid, happens here.
            launch(self._stream.cuda_stream)
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Threads that read and write slides may go on while this one captures.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            launch(self._stream.cuda_stream)
        self._graph = graph

    def __call__(self, batch: NDArray[np.float32], *, plain: bool = False) -> NDArray[np.float32]:
        """Logits (N, K, H, W) float32 of pixels (N, C, H, W) float32; valid until the next call.

        Args:
            batch: values within float16's range.
            plain: enqueue once more instead of replaying the graph, to compare the two.
        """
        # The host rounds while it copies to pinned memory, which it must do anyway; half the bytes go over the bus.
        self._pixels.copy_(torch.from_numpy(batch))
        with torch.cuda.stream(self._stream):
            self.pixels.copy_(self._pixels, non_blocking=True)
            if plain or self._graph is None:
                self._launch(self._stream.cuda_stream)
            else:
                self._graph.replay()
            self._logits.copy_(self.logits, non_blocking=True)
        self._stream.synchronize()
        logits: NDArray[np.float32] = self._result.copy_(self._logits).numpy()
        return logits


def pinned(shape: Shape) -> torch.Tensor:
    """float16 host memory that the device reads and writes without a detour."""
    return torch.empty(shape, dtype=torch.half, pin_memory=True)


def _no_launch(stream: int) -> None:
    raise RuntimeError("called before anything was captured")
