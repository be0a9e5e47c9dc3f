"""Settle the factor by which a slide is downscaled for the model, from the model's masks of a few windows.

It must not know what a mask is for, nor where results go.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.errors import ReadError, UsageError
from cellseg_batch.engine.geometry import Box, lay_blocks, reflect
from cellseg_batch.engine.inference.decoders import DECODERS
from cellseg_batch.engine.inference.model_pool import ModelPool
from cellseg_batch.engine.inference.tissue import Tissue
from cellseg_batch.engine.run.slide_plan import SlidePlan, lay_lattice
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.slides.reader import SlideReader
from cellseg_batch.trainer.bundle import Bundle
from cellseg_batch.trainer.scale import pick_downscale

_WINDOW = 1024
_WINDOWS = 3  # along each axis


def settle_downscale(plan: SlidePlan, settings: Settings, model_pool: ModelPool, reader: SlideReader) -> int:
    """The factor of the settings, else the one that the model's card prefers for the size of the slide's objects.

    Only factors that the margin and the tile allow are considered.
    """
    if settings.downscale is not None:
        return settings.downscale
    bundle = model_pool.bundle
    factors = possible_downscales(plan, settings, bundle)
    widths = {name: width for name, width in bundle.card.downscale.items() if int(name) in factors}
    factor = pick_downscale(widths, lambda factor: _masks(plan, model_pool, factor, reader)) if widths else 1
    if plan.tiles > plan.grid.planes:
        # Tiles of a large slide need the memory of the probes; for small images it costs too much to make them anew.
        model_pool.probes.clear()
    return factor


def possible_downscales(plan: SlidePlan, settings: Settings, bundle: Bundle) -> list[int]:
    """The factors that `settle_downscale` may return for a slide; it looks at the pixels if there are several."""
    if settings.downscale is not None:
        return [settings.downscale]
    return [1, *(factor for factor in map(int, bundle.card.downscale) if _fits(plan, settings, bundle, factor))]


def lay_tiles(
    plan: SlidePlan,
    settings: Settings,
    bundle: Bundle,
    factor: int,
    backend: str | None = None,
    tissue: Tissue | None = None,
) -> SlidePlan:
    """The plan with a lattice for ``backend`` and for images that are downscaled by ``factor`` for the model.

    Args:
        plan: plan of the slide.
        settings: settings of the run.
        bundle: the model.
        factor: factor by which the image is downscaled.
        backend: name of the backend that computes the slide; None if none is chosen yet.
        tissue: tissue of the slide; None if all of it may be tissue.

    Raises:
        UsageError: tile and margin do not go together.
    """
    card = bundle.downscaled(factor).card
    lattice = lay_lattice(plan.grid.lattice.shape, settings, card, backend, factor, tissue)
    return replace(
        plan,
        grid=lay_blocks(lattice, settings.block_side(), plan.grid.planes, plan.grid.ring),
        shape=(*plan.shape[:2], *lattice.tile),
        downscale=factor,
        instances=plan.instances and replace(plan.instances, downscale=factor),
        stars=plan.stars and replace(plan.stars, downscale=factor),
    )


def _fits(plan: SlidePlan, settings: Settings, bundle: Bundle, factor: int) -> bool:
    """Whether tile and margin allow the factor."""
    try:
        lay_tiles(plan, settings, bundle, factor)
    except UsageError:
        return False
    return True


def _masks(plan: SlidePlan, model_pool: ModelPool, factor: int, reader: SlideReader) -> Iterable[NDArray[np.bool_]]:
    """The masks (H, W) of some windows, at the size of the image downscaled by ``factor``."""
    backend = model_pool.prober(factor)
    stride = model_pool.bundle.card.total_stride * factor
    windows = spread_windows(plan.grid.lattice.shape)
    height, width = (min(_WINDOW // stride, -(-length // stride)) * stride for length in windows[0].shape)
    shape = (1, plan.shape[1], height, width)
    decoder = DECODERS[plan.decoder]
    for box in windows:
        try:
            pixels = reader.read(plan.grid.planes // 2, box)
        except ReadError:  # a damaged chunk costs its block, not the slide
            continue
        rows, columns = (reflect(0, side, length)[None] for side, length in zip(shape[2:], box.shape, strict=True))
        logits = model_pool.probes.logits(backend, shape, pixels, rows, columns, plan.bounds)
        inside = logits[..., : box.shape[0], : box.shape[1]]
        yield decoder.mask(inside[..., factor // 2 :: factor, factor // 2 :: factor], plan.threshold)[0]


def spread_windows(shape: tuple[int, int]) -> list[Box]:
    """Equal windows spread evenly over a plane of ``shape`` (height, width).

    They overlap by no more than a row or column, so that every object counts once.
    """
    sides, starts = [], []
    for length in shape:
        count = min(_WINDOWS, -(-length // _WINDOW))
        side = min(_WINDOW, -(-length // count))
        sides.append(side)
        starts.append([round(start) for start in np.linspace(0, length - side, count)])
    return [Box(y, x, y + sides[0], x + sides[1]) for y, x in product(*starts)]
