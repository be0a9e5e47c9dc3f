"""Run an ONNX file over a slide with the loop that most people write: ONNX Runtime and numpy; used by bench_onnx.

python benchmarks/onnx_loop.py FILE SLIDE OUT LOW HIGH     prints its seconds as JSON

Tiles of 512 px overlap by 25 % and go to the session one by one; where they overlap their first output is averaged.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import onnxruntime
import zarr

_TILE, _STEP, _BLOCK = 512, 384, 1024


def segment(file: str, slide: str, out: str, low: float, high: float) -> float:
    """Write the mask of a slide whose axes are c, y, x; returns the seconds from opening the slide."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    start = time.perf_counter()
    pixels = np.asarray(zarr.open_array(f"{slide}/0", mode="r")[...])
    height, width = pixels.shape[1:]
    total, count = np.zeros((height, width), np.float32), np.zeros((height, width), np.float32)
    for y in _starts(height):
        for x in _starts(width):
            there = np.s_[y : y + _TILE, x : x + _TILE]
            tile = np.clip((pixels[:, *there].astype(np.float32) - low) / (high - low), 0, 1)
            total[there] += session.run(None, {name: tile[None]})[0][0, 0]
            count[there] += 1
    mask = (total / count > 0).astype(np.uint8)
    target = zarr.create_array(out, shape=mask.shape, dtype="uint8", chunks=(_BLOCK, _BLOCK), overwrite=True)
    target[...] = mask
    return time.perf_counter() - start


def _starts(length: int) -> list[int]:
    return [*range(0, length - _TILE, _STEP), length - _TILE]


if __name__ == "__main__":
    file, slide, out, low, high = sys.argv[1:]
    print(json.dumps({"seconds": segment(file, slide, out, float(low), float(high))}))
