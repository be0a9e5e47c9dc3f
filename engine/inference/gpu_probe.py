"""Find out whether a GPU can run the Triton kernels, by one small launch.

Triton compiles its launcher with a C compiler at the first launch, and not every machine has one.
"""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import torch

from cellseg_batch.engine.inference.backends import cuda


def why_no_kernels(gpu: str) -> str:
    """Return why the Triton kernels cannot run on ``gpu``; "" if they can."""
    if find_spec("triton") is None:
        return "triton is not installed; pip install 'cellseg-batch[triton]'"
    try:
        _launch(cuda.Device(gpu))
    except Exception as error:  # Triton raises what its compilers and the driver raise
        return f"triton cannot launch a kernel ({type(error).__name__}: {error}); it needs a C compiler such as gcc"
    return ""


def _launch(device: cuda.Device) -> None:
    """Gather one tile of 1 px and wait for it."""
    from cellseg_batch.kernels import gather_triton

    stream, index = device.stream(), np.zeros((1, 1), np.int64)
    with device.on(stream):
        pixels, tile = device.zeros((1, 1, 1), torch.uint8), device.zeros((1, 1, 1, 1), torch.half)
        gather_triton.gather(pixels, index, index, 0.0, 1.0, tile)
    stream.synchronize()
