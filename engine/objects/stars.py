"""Decide which stars survive as far as a window of the slide can tell, and keep stars in files between passes.

In its own block a candidate is decided at once, unless stars of other blocks may reach it, or reach what decides it;
such a star stays open for the merge.  This module knows geometry and files; it does not know models, networks or the
order of passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.geometry import Block, Box
from cellseg_batch.engine.objects.scratch import ScratchFolder, reading
from cellseg_batch.engine.storage.atomic_files import numbered, whole_file
from cellseg_batch.kernels.stardist import SUPPRESSED, Stars, suppress
from cellseg_batch.trainer.card import StarDist

States = NDArray[np.uint8]


@dataclass(frozen=True)
class StarRule:
    """Numbers by which a network's outputs become stars on a slide.

    Attributes:
        card: the model's rule, in px of its input image.
        rays: number of rays of a star.
        grid: px of the slide between two points of the network's output.
        downscale: factor by which the slide is downscaled for the model.
    """

    card: StarDist
    rays: int
    grid: int = 1
    downscale: int = 1

    @property
    def longest(self) -> int:
        """Length of the longest ray, in px of the slide."""
        return self.card.longest_ray * self.downscale


def inside(y: NDArray[np.int32], x: NDArray[np.int32], box: Box) -> NDArray[np.bool_]:
    """Whether places (n,) lie in a box."""
    return (y >= box.y0) & (y < box.y1) & (x >= box.x0) & (x < box.x1)


def decide(stars: Stars, states: States, window: Box, shape: tuple[int, int], rule: StarRule) -> States:
    """Decide which stars survive, from all stars of a window that may.

    Args:
        stars: n stars whose centres lie in the window, in any order.
        states: (n,) uint8, as in `cellseg_batch.kernels.stardist.suppress`.
        window: box of the slide.
        shape: (height, width) of the slide in px.
        rule: rule of the slide.

    Returns:
        (n,) uint8, the state of each star; open if it depends on stars outside the window.
    """
    ranking = stars.ranking()
    ranked = stars.take(ranking)
    exposed = _exposed(ranked, window, shape, rule.longest)
    decided = np.empty_like(states)
    decided[ranking] = suppress(ranked, states[ranking], exposed, rule.card.overlap)
    return decided


def _exposed(stars: Stars, window: Box, shape: tuple[int, int], longest: int) -> NDArray[np.bool_]:
    """Whether a star with rays of up to ``longest`` px outside the window, but inside the slide, may reach each one."""
    reach = stars.rays.max(axis=1, initial=0) + longest
    exposed = np.zeros(len(reach), np.bool_)
    for centre, start, stop, length in (
        (stars.y, window.y0, window.y1, shape[0]),
        (stars.x, window.x0, window.x1, shape[1]),
    ):
        if start > 0:
            exposed |= centre - reach < start
        if stop < length:
            exposed |= centre + reach >= stop
    return exposed


class StarScratch(ScratchFolder):
    """Stars in the scratch of an output, with a file for each block; safe for any number of threads.

    Args:
        journal: folder of the output's journal.
        name: name of the folder in the scratch.
        rays: number of rays of a star.
    """

    def __init__(self, journal: Path, name: str, rays: int) -> None:
        super().__init__(journal, name)
        columns = [("y", "<i4"), ("x", "<i4"), ("logit", "<f4"), ("rays", "<f4", (rays,)), ("state", "u1")]
        self._dtype = np.dtype(columns)

    def write(self, block: Block, stars: Stars, states: States) -> None:
        """Write the stars of a block that are not suppressed, in their order, and wait until they are on disk.

        Raises:
            OutputError: they cannot be written.
        """
        standing = states != SUPPRESSED
        rows = np.empty(np.count_nonzero(standing), self._dtype)
        rows["y"], rows["x"], rows["logit"], rows["rays"] = stars.take(standing)
        rows["state"] = states[standing]
        with whole_file(self._path(block)) as stream:
            stream.write(rows.tobytes())

    def read(self, block: Block, box: Box) -> tuple[NDArray[np.int64], Stars]:
        """Read the stars of a block whose centres lie in ``box``; their places in the block's file, and the stars.

        Raises:
            OutputError: they cannot be read.
        """
        rows = self._rows(block)
        places = np.flatnonzero(inside(rows["y"], rows["x"], box))
        return places, Stars(*(rows[name][places] for name in ("y", "x", "logit", "rays")))

    def states(self, block: Block) -> States:
        """Read the states of a block's stars, in the order of its file.

        Raises:
            OutputError: they cannot be read.
        """
        states: States = self._rows(block)["state"].copy()
        return states

    def _rows(self, block: Block) -> NDArray[Any]:
        with reading(self._path(block), "stars"):
            return np.frombuffer(self._path(block).read_bytes(), self._dtype)

    def _path(self, block: Block) -> Path:
        return numbered(self._folder, block.index, ".stars")
