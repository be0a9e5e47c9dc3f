"""Make instances of stars in two passes over a slide's blocks, without computing a tile twice.

    pass 1   model -> candidates -> those that their own block does not suppress, into scratch
    merge    open stars are decided over all blocks; objects and their ids
    pass 2   objects of the block and of its neighbours -> labels

Which stars survive is decided for the whole slide, so labels do not depend on the blocks.  Each task can be repeated.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.geometry import Block, Box
from cellseg_batch.engine.objects.star_merge import StarIds, draw_objects, merge_stars
from cellseg_batch.engine.objects.stars import StarRule, StarScratch, decide
from cellseg_batch.engine.run.open_slide import OpenSlide
from cellseg_batch.engine.run.records import MergeRecord
from cellseg_batch.kernels.stardist import OPEN, Stars


def keep_stars(slide: OpenSlide, block: Block, candidates: Stars) -> None:
    """Decide the candidates of a block as far as it can, and put those that are not suppressed into the scratch."""
    with slide.clock.stage("suppress"):
        states = np.full(len(candidates.y), OPEN, np.uint8)
        states = decide(candidates, states, block.box, slide.plan.grid.lattice.shape, _rule(slide))
    with slide.clock.stage("write"):
        _scratch(slide)[0].write(block, candidates, states)


def merge_block_stars(slide: OpenSlide, _: int) -> MergeRecord:
    """Decide the open stars of all blocks, and give the objects their final ids."""
    scratch, survivors = _scratch(slide)
    with slide.clock.stage("suppress"):
        ids, cut_rays = merge_stars(scratch, survivors, slide.plan.grid, _rule(slide))
        ids.save(scratch.ids)
        slide.retype_ids(ids.dtype)
    return MergeRecord(ids.objects, cut_rays)


def drawn_labels(slide: OpenSlide, plane: int, target: Box) -> NDArray[Any]:
    """The labels (h, w) of a box of a plane, 0 outside the slide."""
    scratch, survivors = _scratch(slide)
    with slide.clock.stage("draw"):
        return draw_objects(plane, target, survivors, StarIds.load(scratch.ids), slide.plan.grid, _rule(slide))


def _rule(slide: OpenSlide) -> StarRule:
    assert slide.plan.stars is not None
    return slide.plan.stars


def _scratch(slide: OpenSlide) -> tuple[StarScratch, StarScratch]:
    """The stars that their block does not suppress, and those that are objects."""
    assert slide.scratch.stars is not None
    assert slide.scratch.survivors is not None
    return slide.scratch.stars, slide.scratch.survivors
