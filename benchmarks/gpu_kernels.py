"""Prove and measure gather and stitch on a GPU: parity with the references, GB/s of the bytes that must move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from statistics import median

import numpy as np
import torch
from gpu_bench import Bench, Row

from cellseg_batch.kernels import blend_triton, gather_triton, instances_triton, stitch_triton
from cellseg_batch.kernels.tiling import TileGrid

Call = Callable[[int], object]


@dataclass(frozen=True)
class Case:
    """A kernel on a block.

    Attributes:
        name: name of the function that launches the kernel.
        kernel: name of the kernel in the profiler.
        moved: bytes that the kernel must read and write.
        inputs: tensors that the kernel is called with in turn.
        launch: function that launches the kernel on an input, by its number.
    """

    name: str
    kernel: str
    moved: float
    inputs: list[torch.Tensor]
    launch: Call


def check_kernels(bench: Bench) -> Iterator[Row]:
    """Compare each kernel with its reference.

    Raises:
        AssertionError: a kernel differs; the others are compared all the same.
    """
    differ = []
    for module in (gather_triton, stitch_triton, blend_triton, instances_triton):
        kernel, reason = module.__name__.rpartition(".")[2], ""
        try:
            module.check(str(bench.device.torch_device))
        except Exception as error:  # whatever Triton, its compilers and the driver raise
            reason = f"{type(error).__name__}: {error}"
            differ.append(kernel)
        yield {"name": f"parity of {kernel}", "agrees": not reason, "reason": reason}
    if differ:
        raise AssertionError(f"{', '.join(differ)} give other results than their references")


def measure_kernels(bench: Bench) -> Iterator[Row]:
    """Measure each kernel at four block sizes, with its input in memory and, as in a run, just written."""
    for side in (64,) if bench.tiny else (1024, 2048, 4096, 8192):
        for case in _cases(bench, side):
            cold, clock = _seconds(bench, case, lambda number: None)
            after, _ = _seconds(bench, case, lambda number, case=case: case.inputs[number].add_(0))
            yield {
                "name": f"{case.name}, {side} px",
                "gb_per_s": case.moved / cold / 1e9,
                "of_ceiling": case.moved / cold / bench.copy,
                "just_written_of_ceiling": case.moved / after / bench.copy,
                "clock": clock,
            }


def _cases(bench: Bench, side: int) -> list[Case]:
    torch_device = bench.device.torch_device
    tile, margin, overlap = (48, 8, 8) if bench.tiny else (640, 64, 64)
    core, area = tile - 2 * margin, side * side
    corners = np.array([(y, x) for y in range(0, side, core) for x in range(0, side, core)])
    count, per_row = len(corners), len(range(0, side, core))
    places = np.array([[margin, margin, y, x, core, core] for y, x in corners])
    grid = TileGrid(per_row, per_row, overlap, 0, 0, side, side)
    rows, columns = (np.minimum(starts[:, None] + np.arange(tile), side - 1) for starts in corners.T)
    # More than the cache of any GPU holds, so that each call reads its input from memory.
    copies = 1 if bench.tiny else max(2, (1 << 28) // area)
    logits = [torch.randn(count, 1, tile, tile, device=torch_device).half() for _ in range(copies)]
    pixels = [torch.randint(0, 256, (3, side, side), device=torch_device).to(torch.uint8) for _ in range(copies)]
    blended = [batch_logits[:, :, : core + overlap, : core + overlap] for batch_logits in logits]
    batch = torch.empty(count, 3, tile, tile, dtype=torch.half, device=torch_device)
    mask = torch.empty(side, side, dtype=torch.uint8, device=torch_device)

    def stitch_mask(number: int) -> None:
        stitch_triton.stitch_mask(logits[number], places, 0.0, mask)

    def blend_mask(number: int) -> None:
        blend_triton.blend_mask(blended[number], grid, 0.0, mask)

    def gather(number: int) -> None:
        gather_triton.gather(pixels[number], rows, columns, 0.0, 1 / 255, batch)

    return [
        Case("stitch_mask", "crop_kernel", 3 * area, logits, stitch_mask),
        Case("blend_mask", "blend_kernel", 2 * count * (core + overlap) ** 2 + area, blended, blend_mask),
        Case("gather", "gather_kernel", 3 * area + 6 * count * tile * tile, pixels, gather),
    ]


def _seconds(bench: Bench, case: Case, before: Call) -> tuple[float, str]:
    """Median seconds of the kernel and the clock that counted them; ``before`` is called before each launch.

    The profiler counts the kernel alone.  Where it sees none, events count a launch with the copies of its tables.
    """
    case.launch(0)
    if not bench.device.is_gpu:
        return bench.seconds(lambda: case.launch(0)), "host"
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for number in range(40):
            before(number % len(case.inputs))
            case.launch(number % len(case.inputs))
        torch.cuda.synchronize()
    times = [event.time_range.elapsed_us() for event in trace.events() if event.name.startswith(case.kernel)]
    if times:
        return median(times) / 1e6, "profiler"
    numbers = cycle(range(len(case.inputs)))
    return bench.seconds(lambda: case.launch(next(numbers))), "events"
