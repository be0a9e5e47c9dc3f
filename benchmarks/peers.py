"""Run the shipped network over a slide with the loop of a peer, in a process of its own; used by bench_peers.

python benchmarks/peers.py PEER SLIDE OUT LOW HIGH     prints its figures as JSON

Each peer reads the slide from zarr, normalises with the given bounds, and writes the mask to zarr.  Only the first of
the network's outputs is used, which spares the peers two thirds of their logits.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from torch import Tensor

from cellseg_batch.engine.inference.backends.fold_layers import fold_batch_norm
from cellseg_batch.engine.machine import peak_resident_bytes
from cellseg_batch.engine.models import build_torch_network, load_model
from cellseg_batch.kernels.stitch import logit_threshold

_TILE, _BATCH, _OVERLAP = 512, 4, 0.25
_BLOCK, _DEPTH = 1024, 64

Predictor = Callable[[Tensor], Tensor]


class Stopwatch:
    """Predictor that adds up its time in seconds."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.seconds = 0.0

    def __call__(self, tiles: Tensor) -> Tensor:
        start = time.perf_counter()
        logits = self.predictor(tiles)
        self.seconds += time.perf_counter() - start
        return logits


def plain_predictor() -> Predictor:
    """The network as it is loaded: float32."""
    network = build_torch_network(load_model("nuclei"))
    return lambda tiles: network(tiles)[:, :1]


def bf16_predictor() -> Predictor:
    """The network at its best in eager torch: batch norm folded, channels last, bfloat16."""
    network = fold_batch_norm(build_torch_network(load_model("nuclei")))
    network = network.to(dtype=torch.bfloat16).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return lambda tiles: network(tiles.to(torch.bfloat16, memory_format=torch.channels_last))[:, :1].float()


def sliding_window(slide: str, out: str, bounds: tuple[float, float], predictor: Predictor) -> float:
    """Run MONAI's sliding window with its usual Gaussian blending; returns its seconds."""
    from monai.inferers import sliding_window_inference

    start = time.perf_counter()
    pixels = np.asarray(zarr.open_array(f"{slide}/0", mode="r")[...])
    low, high = bounds
    image = ((torch.from_numpy(pixels).float() - low) / (high - low)).clamp(0, 1)[None]
    with torch.inference_mode():
        logits = sliding_window_inference(
            image, (_TILE, _TILE), _BATCH, predictor, overlap=_OVERLAP, mode="gaussian", padding_mode="reflect"
        )
        mask = (logits[0, 0] > _limit()).numpy().astype(np.uint8)
    target = zarr.create_array(out, shape=mask.shape, dtype="uint8", chunks=(_BLOCK, _BLOCK), overwrite=True)
    target[...] = mask
    return time.perf_counter() - start


def map_overlap(slide: str, out: str, bounds: tuple[float, float], predictor: Predictor) -> float:
    """Run the loop that most people write, dask.array.map_overlap around the model; returns its seconds."""
    import dask.array as da

    start = time.perf_counter()
    low, high = bounds

    def segment(block: NDArray[np.uint8]) -> NDArray[np.uint8]:
        image = ((torch.from_numpy(block).float() - low) / (high - low)).clamp(0, 1)[None]
        with torch.inference_mode():
            return (predictor(image)[0, 0] > _limit()).numpy().astype(np.uint8)

    pixels = da.from_zarr(f"{slide}/0").rechunk((-1, _BLOCK, _BLOCK))
    mask = pixels.map_overlap(
        segment, depth=(0, _DEPTH, _DEPTH), boundary=("none", "reflect", "reflect"), drop_axis=0, dtype=np.uint8
    )
    mask.to_zarr(out, overwrite=True)
    return time.perf_counter() - start


def _limit() -> float:
    return logit_threshold(load_model("nuclei").card.threshold)


def main() -> None:
    peer, slide, out, low, high = sys.argv[1:]
    bounds = float(low), float(high)
    stopwatch = Stopwatch(bf16_predictor() if peer == "monai-bf16" else plain_predictor())
    run = map_overlap if peer == "map-overlap" else sliding_window
    seconds = run(slide, out, bounds, stopwatch)
    peak = peak_resident_bytes() / 1e6
    print(json.dumps({"seconds": seconds, "model_seconds": stopwatch.seconds, "peak_mb": peak}))


if __name__ == "__main__":
    main()
