"""Prove seams: compare the tiled with the untiled result, in windows over the corners of blocks and tiles.

The untiled result of a window comes from one call of the network on the window and all context that it can see. It is
the result that the network would give if the whole slide fitted into one tile.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from cellseg_batch.engine.errors import UsageError
from cellseg_batch.engine.geometry import Box, Lattice, Tile, source_box
from cellseg_batch.engine.inference.backends.protocol import Backend
from cellseg_batch.engine.inference.cpu_predictor import tile_logits
from cellseg_batch.engine.inference.decoders import DECODERS
from cellseg_batch.engine.inference.model_pool import ModelPool
from cellseg_batch.engine.inference.normalise import settle_bounds
from cellseg_batch.engine.inference.prediction import PredictionRule
from cellseg_batch.engine.inference.session import Session, compile_network
from cellseg_batch.engine.models import load_model
from cellseg_batch.engine.run.output_paths import output_paths
from cellseg_batch.engine.run.slide_plan import SlidePlan, open_reader, plan_slide
from cellseg_batch.engine.run.working_scale import lay_tiles, settle_downscale
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.slides.discover import find_images, first_slide
from cellseg_batch.engine.slides.reader import SlideReader
from cellseg_batch.engine.stage_clock import StageClock
from cellseg_batch.trainer.card import Card

_WINDOW = 2048


@dataclass(frozen=True)
class SeamReport:
    """Comparison of the tiled with the untiled result, over all windows.

    Attributes:
        windows: number of windows.
        pixels: number of pixels in the windows.
        max_dp: largest difference of the two probabilities of a pixel.
        flipped: number of pixels whose masks differ.
        objects_tiled, objects_untiled: numbers of connected components of the two masks.
        backend, precision: backend and precision of the network.
        tile: (height, width) of a tile in px.
        margin: px cut from each side of a tile.
        cost: pixels that the network computes per pixel of the slide.
    """

    windows: int
    pixels: int
    max_dp: float
    flipped: int
    objects_tiled: int
    objects_untiled: int
    backend: str
    precision: str
    tile: tuple[int, int]
    margin: int
    cost: float

    def holds(self, bound: float) -> bool:
        """Whether at most a share ``bound`` of the pixels flips; NaN logits prove nothing."""
        return self.flipped_fraction <= bound and bool(np.isfinite(self.max_dp))

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {**asdict(self), "flipped_fraction": self.flipped_fraction}

    @property
    def flipped_fraction(self) -> float:
        """Share of the pixels whose masks differ."""
        return self.flipped / self.pixels


def seam_windows(plan: SlidePlan, full: bool, most: int) -> list[Box]:
    """Lay the windows to compare.

    Returns:
        Up to ``most`` windows of 2048 px, centred on corners of blocks first and of tiles then. If ``full``, one window
        over the whole slide.
    """
    height, width = plan.grid.lattice.shape
    if full:
        return [Box(0, 0, height, width)]
    corners = [
        *_corners(plan.grid.lattice, plan.grid.block_shape),
        *_corners(plan.grid.lattice, plan.grid.lattice.core),
    ]
    corners = list(dict.fromkeys(corners)) or [(height // 2, width // 2)]
    spread = [corners[round(i)] for i in np.linspace(0, len(corners) - 1, min(most, len(corners)))]
    windows = []
    for y, x in spread:
        (y0, y1), (x0, x1) = _around(y, height), _around(x, width)
        windows.append(Box(y0, x0, y1, x1))
    return windows


def prove_seams(path: Path, settings: Settings, full: bool, most: int) -> SeamReport:
    """Compare both results on the first plane of the first image below ``path``.

    Args:
        path: a path that holds a slide.
        settings: settings of the run whose seams are to be proved.
        full: compare the whole slide in one piece; the memory needed grows with the slide.
        most: largest number of windows if ``full`` is False.

    Raises:
        UsageError: there is no image, or no model or backend as asked.
        SlideError: the slide cannot be read.
    """
    slide = first_slide(find_images(path, settings.axes))
    bundle = load_model(settings.model)
    if bundle.card.input.size.fixed:
        raise UsageError(
            f"verify-seams with {bundle.card.name}",
            expected="a model that takes tiles of several sizes, so that there is an untiled result",
            found=f"tiles of {bundle.card.input.size.fixed} px alone",
            remedy="export the model with a dynamic height and width",
        )
    decoder = DECODERS[bundle.card.decoder]
    model_pool = ModelPool(bundle, settings, pixels=0)
    paths = output_paths(slide, settings.name, None)
    with open_reader(slide, settings, bundle.card) as reader:
        plan = plan_slide(slide, paths, settings, bundle.card, settle_bounds(reader, bundle.card.input.normalisation))
        factor = settle_downscale(plan, settings, model_pool, reader)
        backend = model_pool.downscaled(model_pool.chosen, factor)
        plan = lay_tiles(plan, settings, bundle, factor, backend.name)
        card = bundle.downscaled(factor).card
        outputs = len(decoder.network(bundle, instances=False).outputs)
        windows = seam_windows(plan, full, most)
        tiled_logits = _LogitsOf(plan, backend, reader)
        compared = [_compare(window, plan, card, backend, reader, tiled_logits, outputs) for window in windows]
    masks = [[decoder.mask(logits, plan.threshold)[0] for logits in pair] for pair in compared]
    differences = (np.abs(decoder.probability(tiled) - decoder.probability(untiled)) for tiled, untiled in compared)
    return SeamReport(
        windows=len(windows),
        pixels=sum(window.area for window in windows),
        max_dp=max(float(difference.max()) for difference in differences),
        flipped=sum(int(np.count_nonzero(tiled != untiled)) for tiled, untiled in masks),
        objects_tiled=sum(_count_objects(tiled) for tiled, _ in masks),
        objects_untiled=sum(_count_objects(untiled) for _, untiled in masks),
        backend=backend.name,
        precision=backend.precision,
        tile=plan.grid.lattice.tile,
        margin=plan.grid.lattice.margin,
        cost=plan.grid.lattice.cost,
    )


def _compare(
    window: Box,
    plan: SlidePlan,
    card: Card,
    backend: Backend,
    reader: SlideReader,
    tiled_logits: _LogitsOf,
    outputs: int,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits (1, K, h, w) of the outputs that a mask needs, in ``window``, tiled and untiled."""
    shape = (1, outputs, *window.shape)
    tiled, untiled = np.empty(shape, np.float32), np.empty(shape, np.float32)
    for tile in _tiles_over(plan.grid.lattice, window):
        tiled_logits.put(tile, window, tiled)
    # A network that sees the whole tile is shown the window with the margin that its tiles have.
    reach = plan.grid.lattice.margin if card.exact_margin is None else card.exact_margin
    frame = _grown(window, reach, card.total_stride)
    _LogitsOf(plan, backend, reader).put(Tile(frame, window), window, untiled)
    return tiled, untiled


class _LogitsOf:
    """Logits of single tiles; the network is compiled for the shape of the first tile."""

    def __init__(self, plan: SlidePlan, backend: Backend, reader: SlideReader) -> None:
        self._plan = plan
        self._backend = backend
        self._reader = reader
        self._session: Session | None = None

    def put(self, tile: Tile, window: Box, out: NDArray[np.float32]) -> None:
        """Write the logits of the part of the tile's core that lies in ``window`` to ``out``."""
        plan, lattice = self._plan, self._plan.grid.lattice
        shape = (1, plan.shape[1], *tile.frame.shape)
        if self._session is None:
            self._session = Session(compile_network(self._backend, shape, plan.slide.dtype))
        rule = PredictionRule(lattice, shape, plan.slide.dtype, plan.bounds, plan.threshold)
        read_box = source_box(tile.frame, lattice.shape)
        pixels = self._reader.read(0, read_box)
        logits = tile_logits(self._session, rule, pixels, read_box, [tile], StageClock())
        logits = logits.repeat(plan.output_grid, axis=2).repeat(plan.output_grid, axis=3)
        part = tile.core.within(window)
        out[..., *part.seen_from(window).slices()] = logits[..., *part.seen_from(tile.frame).slices()]


def _tiles_over(lattice: Lattice, window: Box) -> list[Tile]:
    rows = range(window.y0 // lattice.core[0], -(-window.y1 // lattice.core[0]))
    columns = range(window.x0 // lattice.core[1], -(-window.x1 // lattice.core[1]))
    return [lattice.tile_at(row, column) for row, column in product(rows, columns)]


def _grown(window: Box, reach: int, stride: int) -> Box:
    """The window with ``reach`` px of context, extended to multiples of ``stride`` px."""
    low = [(edge - reach) // stride * stride for edge in (window.y0, window.x0)]
    high = [-(-(edge + reach) // stride) * stride for edge in (window.y1, window.x1)]
    return Box(low[0], low[1], high[0], high[1])


def _corners(lattice: Lattice, side: tuple[int, int]) -> list[tuple[int, int]]:
    """Points (y, x) inside the slide where four boxes of ``side`` px meet, or two along a seam from edge to edge."""
    height, width = lattice.shape
    rows, columns = range(side[0], height, side[0]), range(side[1], width, side[1])
    return list(product(rows or [height // 2], columns or [width // 2])) if rows or columns else []


def _around(centre: int, length: int) -> tuple[int, int]:
    start = max(0, min(centre - _WINDOW // 2, length - _WINDOW))
    return start, min(start + _WINDOW, length)


def _count_objects(mask: NDArray[Any]) -> int:
    return int(ndimage.label(mask)[1])
