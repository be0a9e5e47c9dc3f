"""Launch every Triton kernel through Triton's real JIT for GPUs that are not there, and print what was launched.

``python -m tests.support.jit_without_gpu CAPABILITY...`` (80, 90, 100) gives the launchers arguments in every form that
a run has.  They specialise and compile to machine code of the GPU; only the driver's last call is left out.
"""

import json
import sys

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from cellseg_batch.kernels import blend_triton, gather_triton, instances_triton, stitch_triton
from cellseg_batch.kernels.instances import seed_rule
from cellseg_batch.kernels.tiling import TileGrid

launches = []


class Launcher:
    """What Triton makes of a compiled kernel; it takes the place of the C code that calls the driver."""

    def __init__(self, source, metadata):
        self.source, self.metadata = source, metadata

    def __call__(self, grid_x, grid_y, grid_z, stream, function, *arguments):
        launches.append(
            {
                "kernel": self.metadata.name,
                "grid": [grid_x, grid_y, grid_z],
                "types": {name: str(kind) for name, kind in self.source.signature.items()},
                "warps": self.metadata.num_warps,
            }
        )


class Utils:
    def load_binary(self, name, kernel, shared, device):
        assert kernel[:4] == b"\x7fELF", "no machine code"
        return 1, 1, 0, 0, 1024

    def unload_module(self, module):
        pass

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}


class Driver:
    """A driver of a GPU that is not there."""

    def __init__(self, capability):
        self.capability, self.utils, self.launcher_cls = capability, Utils(), Launcher

    def get_current_device(self):
        return self.capability  # a number of its own, so that kernels are compiled anew

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


def stitch(dtype):
    logits, out = torch.zeros(2, 3, 256, 256, dtype=dtype), torch.zeros(300, 300, dtype=torch.uint8)
    places = np.array([[64, 64, 0, 0, 128, 128], [64, 64, 0, 128, 128, 104]])
    for threshold in (0.0, -0.4, 1.0, float(np.float64(0.3))):
        stitch_triton.stitch_mask(logits, places, threshold, out)
    stitch_triton.stitch_probability(logits, places, out)
    ragged = places - [0, 0, 0, 0, 1, 1]
    stitch_triton.stitch_mask(logits[:, :, 1:-1], ragged, 0.0, out[3:, 5:])
    # The first tile of a batch that holds tiles of two blocks, at an address of its own.
    stitch_triton.stitch_mask(logits[1:], places[:1], 0.0, out)


def blend(dtype):
    logits = torch.zeros(6, 1, 192, 192, dtype=dtype)
    for grid in (
        TileGrid(2, 3, 64, 64, 64, 128, 256),
        TileGrid(2, 3, 64, 5, 7, 200, 300),
        TileGrid(1, 1, 64, 0, 0, 9, 1),
    ):
        out = torch.zeros(grid.height, grid.width, dtype=torch.uint8)
        blend_triton.blend_mask(logits, grid, 0.2, out)
        blend_triton.blend_probability(logits, grid, out)


def instances(dtype):
    logits, out = torch.zeros(2, 3, 256, 256, dtype=dtype), torch.zeros(300, 300, dtype=torch.uint8)
    places = np.array([[64, 64, 0, 0, 128, 128], [64, 64, 0, 128, 128, 104]])
    for foreground, smoothing, spacing, level in (
        (0.0, 1.0, 1, 0.3),
        (1.0, 0.0, 2, 0.0),
        (-0.4, 1.4, 16, 1 / (1 << 14)),
    ):
        rule = seed_rule(foreground, 0.75, smoothing, spacing, level, -level)
        instances_triton.classify_pixels(logits, places, rule, out)
        instances_triton.classify_pixels(logits[1:, :, 1:-1], places[:1] - [0, 0, 0, 0, 1, 1], rule, out[3:, 5:])
    instances_triton.classify_foreground(logits, places, 0.0, out)


def gather(dtype):
    out = torch.zeros(2, 3, 256, 256, dtype=dtype)
    table = np.zeros((2, 256), np.int64)
    planes = [torch.zeros(3, 500, 496, dtype=kind) for kind in (torch.uint8, torch.uint16, torch.float32)]
    interleaved = [torch.zeros(500, 497, 3, dtype=kind).permute(2, 0, 1) for kind in (torch.uint8, torch.uint16)]
    for pixels in (*planes, *interleaved, planes[0][:1], planes[2][:1, 1:, 1:]):
        for low, scale in ((0.0, 1 / 255), (-1.5, 0.0), (1.0, 1.0)):
            gather_triton.gather(pixels, table, table, low, scale, out)
    gather_triton.gather(planes[0], table[:1], table[:1], 0.0, 1 / 255, out[1:])


def main():
    for capability in map(int, sys.argv[1:]):
        driver.set_active(Driver(capability))
        for launch in (stitch, blend, instances, gather):
            launch(torch.half)
    print(json.dumps(launches))


if __name__ == "__main__":
    main()
