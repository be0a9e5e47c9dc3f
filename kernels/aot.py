"""Compile every Triton kernel for several GPU models without a GPU, and report the resources that ptxas assigns.

``python -m cellseg_batch.kernels.aot`` prints the table as Markdown.  It needs triton, which ships ptxas, and no GPU.
It is only for measuring: a run compiles its kernels at their first launch.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cellseg_batch.kernels import blend_triton, gather_triton, instances_triton, stitch_triton

CAPABILITIES = (80, 90, 100)
"""Compute capabilities, times ten: A100, H100 and H200, B200."""

TILE, OVERLAP = 512, 64
TAPS = 5
"""Of half a smoothing kernel, as in the shipped model."""


@dataclass(frozen=True)
class Variant:
    """A kernel with the arguments that are fixed at compilation.

    Attributes:
        name: description for the table.
        kernel: the decorated function.
        types: type of every argument that is not constant, in order, as Triton spells it.
        constants: constant arguments by name.
        options: options of the compiler.
    """

    name: str
    kernel: Any
    types: tuple[str, ...]
    constants: dict[str, int]
    options: dict[str, Any]


@dataclass(frozen=True)
class Resources:
    """The resources that a kernel uses on a GPU model.

    Attributes:
        name: name of the variant.
        target: the GPU model, as ptxas names it.
        registers: registers per thread.
        spilled: spilled bytes per thread, stored and loaded.
        shared: bytes of shared memory per program.
        loads: bytes of the widest vector load from global memory; 0 if all are scalar.
        stores: bytes of the widest vector store to global memory; 0 if all are scalar.
    """

    name: str
    target: str
    registers: int
    spilled: int
    shared: int
    loads: int
    stores: int


def variants() -> Iterator[Variant]:
    """Yield every kernel in every form, for float16 logits of a GPU network and for float32."""
    block = {"BLOCK_Y": stitch_triton.BLOCK_Y, "BLOCK_X": stitch_triton.BLOCK_X}
    step = {"STEP_Y": TILE - OVERLAP, "STEP_X": TILE - OVERLAP, "OVERLAP": OVERLAP}
    forms = {"mask": stitch_triton.MASK, "probability": stitch_triton.PROBABILITY}
    for logits in ("fp16", "fp32"):
        written = ("fp32", "*u8", "i32", "*i32")
        for name, form in forms.items():
            yield Variant(
                f"stitch {logits} to {name}",
                stitch_triton.crop_kernel,
                (f"*{logits}", "i32", "i32", "*i64", "i32", "i32", *written),
                {"FORM": form.value, "ALIGN": 8, **block},
                stitch_triton.LAUNCH,
            )
            yield Variant(
                f"blend {logits} to {name}",
                blend_triton.blend_kernel,
                (f"*{logits}", *["i32"] * 8, *written),
                {"FORM": form.value, **step, **block},
                stitch_triton.LAUNCH,
            )
        tile = (f"*{logits}", "i32", "i32", "i32")
        smoothing = ("i32", "i32", "*i64", "i32", "*i32", "i32", "i32")
        yield Variant(
            f"rows {logits} to int32",
            instances_triton.rows_kernel,
            (*tile, "i32", "i32", "*i64", *smoothing),
            {"TAPS": TAPS, **block},
            stitch_triton.LAUNCH,
        )
        yield Variant(
            f"codes {logits} to codes",
            instances_triton.codes_kernel,
            (*tile, "*i64", *smoothing, "fp32", "i32", "i32", "*u8", "i32", "*i32"),
            {"TAPS": TAPS, "ALIGN": 8, **block},
            stitch_triton.LAUNCH,
        )
    block = {"BLOCK_Y": gather_triton.BLOCK_Y, "BLOCK_X": gather_triton.BLOCK_X}
    for pixels, tiles, sources in (("u8", "fp16", 3), ("u8", "fp16", 1), ("u16", "fp16", 1), ("fp32", "fp32", 1)):
        yield Variant(
            f"gather {sources} x {pixels} to 3 x {tiles}",
            gather_triton.gather_kernel,
            (f"*{pixels}", "i32", "i32", "i32", "*i64", "*i64", "*fp32", "*fp32", f"*{tiles}", "i32", "i32"),
            {"SOURCES": sources, "CHANNELS": 3, "CLIP": 1, **block},
            {"num_warps": 4},
        )


def measure(variant: Variant, capability: int) -> Resources:
    """Compile ``variant`` and return its resources; pointers, sizes and strides count as multiples of 16.

    For whole tiles they are.

    Raises:
        CalledProcessError: ptxas refused the code.
        LookupError: the output of ptxas has an unknown format.
    """
    names = variant.kernel.arg_names
    free = [name for name in names if name not in variant.constants]
    types = dict(zip(free, variant.types, strict=True))
    # Counts and strides that are not multiples of 16, and floats.
    odd = {"rows", "columns", "blocks_y", "blocks_x", "threshold", "low", "scale", "column_stride"}
    odd |= {"spacing", "foreground", "border_level", "seed_level"}
    source = ASTSource(
        fn=variant.kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in free if name not in odd},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=variant.options)
    ptx = compiled.asm["ptx"]
    target = _find(r"\.target (\w+)", ptx)
    tool = triton.knobs.nvidia.ptxas_blackwell if capability >= 100 else triton.knobs.nvidia.ptxas
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "kernel.ptx"
        code.write_text(ptx)
        command = [tool.path, "-v", "--gpu-name", target, code, "-o", code.with_suffix(".cubin")]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return Resources(
        name=variant.name,
        target=target,
        registers=int(_find(r"Used (\d+) registers", log)),
        spilled=int(_find(r"(\d+) bytes spill stores", log)) + int(_find(r"(\d+) bytes spill loads", log)),
        shared=compiled.metadata.shared,
        loads=_widest("ld", ptx),
        stores=_widest("st", ptx),
    )


def _find(pattern: str, text: str) -> str:
    """Return the first group of ``pattern`` in ``text``; raises LookupError if the pattern does not occur."""
    match = re.search(pattern, text)
    if match is None:
        raise LookupError(f"no {pattern} in: {text}")
    return match[1]


def _widest(instruction: str, ptx: str) -> int:
    """Return the bytes that the widest vector ``instruction`` moves per thread; ld.global.v4.b32 moves 16."""
    vectors = re.findall(instruction + r"\.global[.\w:]*\.v(\d)\.[bu](\d+)", ptx)
    return max((int(count) * int(bits) // 8 for count, bits in vectors), default=0)


def table() -> str:
    """Return a Markdown table: a row per variant with registers on each GPU, then the worst of all GPUs in bytes."""
    lines: list[str] = []
    for variant in variants():
        measured = [measure(variant, capability) for capability in CAPABILITIES]
        if not lines:
            targets = [resources.target for resources in measured]
            header = ["kernel", *targets, "spilled", "shared", "vector load", "vector store"]
            lines = [_row(header), _row(["-"] * len(header))]
        worst = (
            max(resources.spilled for resources in measured),
            max(resources.shared for resources in measured),
            min(resources.loads for resources in measured),
            min(resources.stores for resources in measured),
        )
        lines.append(_row([variant.name, *(resources.registers for resources in measured), *worst]))
    return "\n".join(lines)


def _row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    print(f"triton {triton.__version__}\n\n{table()}")
