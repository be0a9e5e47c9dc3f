"""Define `instances` in plain numpy.

Per pixel, classifying reads three logits (12 bytes in float32) and writes 1 byte; labelling reads that byte and writes
4 bytes; growth reads 4 and writes 4 bytes, or twice as much with 64-bit ids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.kernels.instances import ONE_BITS, TABLE_RANGE, TABLE_STEPS

if TYPE_CHECKING:
    from cellseg_batch.kernels.instances import SeedRule

Logits = NDArray[np.float32]
_STEPS, _RANGE = np.float32(TABLE_STEPS), TABLE_RANGE
# Above, left, right, below.
_NEIGHBOURS = ((-1, 0), (0, -1), (0, 1), (1, 0))


def classify_pixels(
    logits: Logits, places: NDArray[np.int64], rule: SeedRule, out: NDArray[np.uint8]
) -> tuple[int, int]:
    """Write the pixel codes; arguments as `cellseg_batch.kernels.instances.classify_pixels`."""
    foreground = missing = 0
    for tile, (from_y, from_x, to_y, to_x, height, width) in enumerate(places):
        score = rule.distance[_quantised(logits[tile, 2])] - rule.border[_quantised(logits[tile, 1])]
        score = _smooth(_smooth(score, rule).T, rule).T
        core = np.s_[from_y : from_y + height, from_x : from_x + width]
        score, mask = score[core], logits[tile, 0][core] > rule.foreground
        codes = 1 + (score > rule.border_level).astype(np.uint8) + (score > rule.seed_level)
        out[to_y : to_y + height, to_x : to_x + width] = np.where(mask, codes, 0)
        foreground += int(np.count_nonzero(mask))
        missing += int(np.count_nonzero(np.isnan(logits[tile, :3][:, *core]).any(axis=0)))
    return foreground, missing


def _quantised(logits: Logits) -> NDArray[np.int32]:
    steps = logits * _STEPS + (_RANGE * _STEPS + np.float32(0.5))
    # fmax returns 0 where a logit is NaN.
    index: NDArray[np.int32] = np.fmin(np.fmax(steps, np.float32(0)), 2 * _RANGE * _STEPS).astype(np.int32)
    return index


def _smooth(score: NDArray[np.int32], rule: SeedRule) -> NDArray[np.int32]:
    """Smooth along the last axis."""
    radius, width = (len(rule.weights) - 1) * rule.spacing, score.shape[1]
    padded = np.pad(score, ((0, 0), (radius, radius)), mode="edge")
    total: NDArray[np.int32] = rule.weights[0] * score
    for tap in range(1, len(rule.weights)):
        left, right = radius - tap * rule.spacing, radius + tap * rule.spacing
        total += rule.weights[tap] * (padded[:, left : left + width] + padded[:, right : right + width])
    return (total + (1 << (ONE_BITS - 1))) >> ONE_BITS


def label_seeds(
    pixel_codes: NDArray[np.uint8],
    cell: tuple[int, int],
    smallest: int,
    open_sides: tuple[bool, bool, bool, bool],
    out: NDArray[np.uint32],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number the components; arguments as `cellseg_batch.kernels.instances.label_seeds`."""
    roots = _lowest_of_component(pixel_codes == 3)
    first, area = np.unique(roots[pixel_codes == 3], return_counts=True)
    sides = (roots[0], roots[:, 0], roots[-1], roots[:, -1])
    touching = np.concatenate([side for side, is_open in zip(sides, open_sides, strict=True) if is_open] or [[]])
    is_seed = (area >= smallest) | np.isin(first, touching)
    first, area = first[is_seed], area[is_seed]
    width = pixel_codes.shape[1]
    cells = first // width // cell[0] * -(-width // cell[1]) + first % width // cell[1]
    order = np.lexsort((first, cells))
    codes = np.full(pixel_codes.size + 1, 2, np.uint32)
    codes[first[order]] = 3 + np.arange(len(first))
    out[...] = np.where(pixel_codes == 3, codes[roots], pixel_codes)
    return first[order], area[order]


def _lowest_of_component(seeds: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the lowest raster index in each pixel's 4-connected component; outside seeds, the number of pixels."""
    lowest = np.where(seeds, np.arange(seeds.size).reshape(seeds.shape), seeds.size)
    while True:
        around = np.pad(lowest, 1, constant_values=seeds.size)
        lower = np.minimum.reduce([lowest, *_shifted(around)])
        lower = np.where(seeds, np.append(lower, seeds.size)[lower], seeds.size)
        if (lower == lowest).all():
            return lowest
        lowest = lower


def renumber(codes: NDArray[np.uint32], final: NDArray[Any], out: NDArray[Any]) -> None:
    """Write the final codes; arguments as `cellseg_batch.kernels.instances.renumber`."""
    out[...] = final[codes]


def grow(codes: NDArray[Any], steps: int, out: NDArray[Any]) -> None:
    """Grow the seeds; arguments as `cellseg_batch.kernels.instances.grow`."""
    for lowest_code in (2, 1):
        for _ in range(steps):
            taken = np.zeros_like(codes[1:-1, 1:-1])
            for neighbour in _shifted(codes):
                taken = np.where((taken == 0) & (neighbour > 2), neighbour, taken)
            inside = codes[1:-1, 1:-1]
            free = (inside >= lowest_code) & (inside <= 2) & (taken > 0)
            inside[free] = taken[free]
    frame = 2 * steps + 1
    core = codes[frame:-frame, frame:-frame]
    out[...] = np.where(core > 2, core - np.minimum(core, 2), 0)


def _shifted(framed: NDArray[Any]) -> list[NDArray[Any]]:
    """Return the four neighbours of every pixel inside a frame of 1 px, in the order of precedence."""
    height, width = framed.shape[0] - 2, framed.shape[1] - 2
    return [framed[1 + y : 1 + y + height, 1 + x : 1 + x + width] for y, x in _NEIGHBOURS]
