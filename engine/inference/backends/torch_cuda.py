"""Run networks in PyTorch on an NVIDIA GPU in fp16: channels-last, batch norm folded, all in one CUDA graph.

It holds two backends: ``torch-cuda`` runs cuDNN's convolutions, each fused with the ReLU behind it; in
``torch-compile`` Inductor fuses all layers between them.  Neither has run on hardware yet.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from cellseg_batch.engine.inference.backends import cuda
from cellseg_batch.engine.inference.backends.cuda import Device, GraphedHalf, demand_gpu
from cellseg_batch.engine.inference.backends.cudnn_fusion import fuse_relu
from cellseg_batch.engine.inference.backends.fold_layers import fold_batch_norm
from cellseg_batch.engine.inference.backends.protocol import BackendRequest, Shape
from cellseg_batch.engine.inference.backends.torch_turn import TORCH_TURN
from cellseg_batch.engine.models import build_torch_network
from cellseg_batch.trainer.bundle import Bundle

# torch compiles each batch shape separately, and a folder of small images may have many shapes.
_MAX_SHAPES = 10_000


def supported_precisions() -> tuple[str, ...]:
    """Return the precisions offered on this machine.

    Raises:
        BackendError: there is no GPU that torch can use.
    """
    demand_gpu("torch on a GPU")
    return ("fp16",)


def make(bundle: Bundle, request: BackendRequest) -> TorchCudaBackend:
    """Make the backend of a bundle's network."""
    return TorchCudaBackend(bundle, cuda.Device(request.gpu), compiled=request.name == "torch-compile")


class TorchCudaBackend:
    """A bundle's network in torch on a GPU.

    Args:
        bundle: the model.
        device: the device that computes.
        compiled: whether to compile the network with ``torch.compile``.
    """

    precision = "fp16"
    version = str(torch.__version__)

    def __init__(self, bundle: Bundle, device: Device, compiled: bool) -> None:
        self.name = "torch-compile" if compiled else "torch-cuda"
        self._compiled = compiled
        self._device = device
        network = fold_batch_norm(build_torch_network(bundle))
        with TORCH_TURN, torch.no_grad():
            side = bundle.card.total_stride
            self._outputs = network(torch.zeros(1, bundle.card.input.count, side, side)).shape[1]
        # With timing, cuDNN could choose other convolutions in each run, and a resumed run would round differently.
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        with device.compiling():
            network = network.half().to(device.torch_device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self._network: Callable[..., torch.Tensor] = (
                torch.compile(network, fullgraph=True, dynamic=False) if compiled else fuse_relu(network)
            )

    def compile_bytes(self, shape: Shape) -> None:
        """Return None: not offered."""

    def compile(self, shape: Shape) -> GraphedHalf:
        """Capture the network for batches of ``shape`` (N, C, H, W).

        Raises:
            torch.OutOfMemoryError: the network and its buffers do not fit on the device.
        """
        buffers = GraphedHalf(shape, (shape[0], self._outputs, *shape[2:]), self._device)
        # Capture the tensors, not their owner: a reference cycle would hold device memory until garbage collection.
        pixels, logits, network = buffers.pixels, buffers.logits, self._network

        def launch(stream: int) -> None:
            with TORCH_TURN, torch.no_grad():
                logits.copy_(network(pixels.contiguous(memory_format=torch.channels_last)))

        with self._any_number_of_shapes():
            buffers.capture(launch)
        return buffers

    def _any_number_of_shapes(self) -> AbstractContextManager[Any]:
        """Return a context in which torch compiles for further shapes; each thread has Dynamo settings of its own."""
        if not self._compiled:
            return nullcontext()
        limits = {"recompile_limit": _MAX_SHAPES, "accumulated_recompile_limit": _MAX_SHAPES}
        return torch._dynamo.config.patch(limits)  # type: ignore[no-any-return]
