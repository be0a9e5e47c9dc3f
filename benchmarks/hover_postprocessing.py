"""Rate of the decoder `hover` beside MONAI's post-processing: ``python benchmarks/hover_postprocessing.py``.

Both get the same maps, drawn from nuclei that touch, in turns and on one core.  MONAI's transform also outlines each
instance, which compares the whole image with every id; so its steps up to the instances are timed by themselves too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from monai.apps.pathology.transforms.post.array import HoVerNetInstanceMapPostProcessing
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from cellseg_batch.engine.inference.decoders import DECODERS
from cellseg_batch.engine.objects.seeds import InstanceRule
from cellseg_batch.kernels import pixel_codes
from cellseg_batch.kernels.instances import grow, label_seeds, reach
from cellseg_batch.trainer.card import Hover
from cellseg_batch.trainer.metrics import instance_overlaps, matches

_PITCH, _RADIUS = 22, 13


def draw(side: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """True labels (side, side) of nuclei on a shaken grid, and their outputs (3, side, side): logit, two maps."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(_PITCH / 2, side, _PITCH)] * 2), axis=-1).reshape(-1, 2)
    centres = grid + rng.uniform(-4, 4, grid.shape)
    pixels = np.indices((side, side)).reshape(2, -1).T
    distance, nearest = cKDTree(centres).query(pixels)
    inside = distance < _RADIUS * rng.uniform(0.6, 1, len(centres))[nearest]
    offsets = np.where(inside[:, None], (pixels - centres[nearest]) / _RADIUS, 0)
    outputs = np.stack([np.where(inside, 4, -4), *offsets.T[::-1]]).reshape(3, side, side)
    labels = np.unique(np.where(inside, nearest + 1, 0), return_inverse=True)[1].reshape(side, side)
    return labels, (outputs + rng.normal(0, 0.1, outputs.shape)).astype(np.float32)


def ours(outputs: NDArray[np.float32]) -> NDArray[Any]:
    """Instances as the engine makes them of one block of one tile."""
    rule, shape = InstanceRule(None, hover=Hover()), outputs.shape[1:]
    write = DECODERS["hover"].code_writer(rule, 0.5, pixel_codes)
    pixels, codes, labels = np.empty(shape, np.uint8), np.empty(shape, np.uint32), np.empty(shape, np.uint32)
    write(outputs[None], np.array([[0, 0, 0, 0, *shape]]), pixels)
    label_seeds(pixels, shape, rule.smallest_seed, (False,) * 4, codes)
    grow(np.pad(codes, reach(rule.steps)), rule.steps, labels)
    return labels


def monai(outputs: NDArray[np.float32], outlines: bool) -> NDArray[Any]:
    """Instances of MONAI's transform with the published Sobel kernel, or of its steps before the outlines."""
    transform = HoVerNetInstanceMapPostProcessing(sobel_kernel_size=21, min_num_points=3)
    prediction, maps = torch.from_numpy(np.stack([-outputs[0], outputs[0]])), torch.from_numpy(outputs[1:])
    if outlines:
        return np.asarray(transform(prediction, maps)[1])[0]
    mask = transform.generate_watershed_mask(prediction)
    border = transform.generate_instance_border(mask, maps)
    distance = transform.generate_distance_map(mask, border)
    return np.asarray(transform.watershed(distance, mask, transform.generate_watershed_markers(mask, border)))[0]


def f1(labels: NDArray[Any], truth: NDArray[np.int64]) -> float:
    """F1 at an IoU of 0.5."""
    contiguous = np.unique(labels, return_inverse=True)[1].reshape(labels.shape)
    found, spurious, missed = matches(instance_overlaps(contiguous, truth).ious, 0.5)
    return 2 * found / (2 * found + spurious + missed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    truth, outputs = draw(arguments.side)
    ways: dict[str, Callable[[], NDArray[Any]]] = {
        "ours": partial(ours, outputs),
        "MONAI, instances": partial(monai, outputs, outlines=False),
        "MONAI, with outlines": partial(monai, outputs, outlines=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    ours(outputs)  # compiles the kernels
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            labels = way()
            seconds[name].append(time.perf_counter() - start)
            if len(seconds[name]) == 1:
                print(f"{name}: F1@0.5 {f1(labels, truth):.3f} of {truth.max()} nuclei", flush=True)
    for name, times in seconds.items():
        print(f"{name}: {arguments.side**2 / median(times) / 1e6:.3f} Mpx/s")


if __name__ == "__main__":
    main()
