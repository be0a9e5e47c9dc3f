"""Run networks in PyTorch on the CPU: eager, channels-last, batch norm folded into the convolutions.

In fp32 it is the reference that every other backend is compared with.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cellseg_batch.engine.inference.backends.fold_layers import fold_batch_norm
from cellseg_batch.engine.inference.backends.protocol import BackendRequest, CompiledModel, Logits, Shape
from cellseg_batch.engine.inference.backends.torch_turn import TORCH_TURN
from cellseg_batch.engine.models import build_torch_network
from cellseg_batch.trainer.bundle import Bundle

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def supported_precisions() -> tuple[str, ...]:
    """Return the precisions that this processor runs natively; others take many times as long as fp32."""
    features = torch.cpu.get_capabilities()
    native = any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # "bf16" is ARM's
    return ("fp32", "bf16") if native else ("fp32",)


def make(bundle: Bundle, request: BackendRequest) -> TorchBackend:
    """Make the backend of a bundle's network."""
    return TorchBackend(bundle, request.precision, request.threads)


class TorchBackend:
    """A bundle's network in eager torch."""

    name = "torch"
    version = str(torch.__version__)

    def __init__(self, bundle: Bundle, precision: str, threads: int) -> None:
        self.precision = precision
        self._dtype = _DTYPES[precision]
        torch.set_num_threads(threads)
        folded = fold_batch_norm(build_torch_network(bundle))
        self._network: nn.Module = folded.to(dtype=self._dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def compile(self, shape: Shape) -> CompiledModel:
        """Return the model; eager torch compiles nothing."""
        return self._run

    def compile_bytes(self, shape: Shape) -> None:
        """Return None: torch would normalise bytes no faster than the gather kernel."""

    def _run(self, batch: NDArray[np.float32], *, out: Logits | None = None) -> Logits:
        with TORCH_TURN, torch.inference_mode():
            pixels = torch.from_numpy(batch).to(dtype=self._dtype, memory_format=torch.channels_last)
            logits: Logits = self._network(pixels).float().contiguous().numpy()
        return logits
