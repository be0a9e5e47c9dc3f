"""Keep the objects whose centroids lie in the region of a slide, in two passes between the merge and the labels.

    centroids   labels of all objects, as without a region -> the sums of each that make its centroid
    kept        centroids -> which objects are kept, and their ids

Objects that are left out still take part in growth, so those that are kept are the same as without a region.  Each task
can be repeated.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.geometry import Box, Lattice
from cellseg_batch.engine.objects.kept import keep
from cellseg_batch.engine.objects.merge import FinalIds
from cellseg_batch.engine.objects.moment_files import Objects, merge_parts, write_part
from cellseg_batch.engine.run.instance_passes import final_labels
from cellseg_batch.engine.run.open_slide import OpenSlide
from cellseg_batch.engine.run.records import CentroidRecord, KeptRecord
from cellseg_batch.engine.run.slide_region import largest_object, of_slide
from cellseg_batch.engine.slides.region import Region
from cellseg_batch.kernels import moments_columns as m
from cellseg_batch.kernels.moments import HALO, measure


def add_up_block(slide: OpenSlide, number: int) -> CentroidRecord:
    """Add up the coordinates of the objects in a block, before any of them is left out."""
    plan, block = slide.plan, slide.plan.grid[number]
    assert plan.region is not None
    assert plan.instances is not None
    if plan.computed(block).tiles:
        labels = final_labels(slide, block.plane, block.box.grown(HALO))
        with slide.clock.stage("measure"):
            width = plan.region.identity.reach - largest_object(plan.instances)
            edge = plan.region.edge(block.box, plan.grid.lattice, width).view(np.uint8)
            ids, rows = measure(labels, edge[None], None, (block.box.y0, block.box.x0))
            write_part(slide.scratch.folders[0].sums, block.index, block.plane, ids, rows)
    return CentroidRecord()


def keep_objects(slide: OpenSlide, _: int) -> KeptRecord:
    """Keep the objects whose centroid lies inside the region, and give them their ids."""
    plan, folder = slide.plan, slide.scratch.folders[0]
    assert slide.region is not None
    assert plan.instances is not None
    with slide.clock.stage("measure"), of_slide(plan.slide):
        merged = FinalIds.load(folder.ids)
        is_kept, cut = np.zeros(merged.objects, np.bool_), 0
        for objects in merge_parts(folder.sums):
            inside = _has_centroid_in(slide.region, plan.grid.lattice, objects)
            is_kept[objects.ids[inside].astype(np.int64) - 1] = True
            cut += _count_cut(slide.region, plan.grid.lattice, objects, largest_object(plan.instances))
        kept = keep(is_kept, merged.dtype)
        kept.save(folder.ids)
    return KeptRecord(kept.count, cut)


def _has_centroid_in(region: Region, lattice: Lattice, objects: Objects) -> NDArray[np.bool_]:
    """Whether the pixel that holds each object's centroid lies inside the region, (n,)."""
    area = objects.rows[:, m.AREA]
    # A pixel's coordinates are those of its centre.
    y, x = (
        np.floor(objects.rows[:, corner] + objects.rows[:, total] / area + 0.5).astype(np.int64)
        for corner, total in ((m.TOP, m.SUM_Y), (m.LEFT, m.SUM_X))
    )
    inside = np.zeros(len(area), np.bool_)
    for cell, members in _grouped(y // lattice.core[0] * lattice.grid[1] + x // lattice.core[1]):
        core = lattice.tile_at(*divmod(cell, lattice.grid[1])).core
        inside[members] = region.inside(core)[y[members] - core.y0, x[members] - core.x0]
    return inside


def _grouped(numbers: NDArray[np.int64]) -> Iterable[tuple[int, NDArray[np.intp]]]:
    """Each number, and the indices at which it stands."""
    order = np.argsort(numbers, kind="stable")
    values, starts = np.unique(numbers[order], return_index=True)
    return zip(values.tolist(), np.split(order, starts[1:]), strict=True)


def _count_cut(region: Region, lattice: Lattice, objects: Objects, largest: int) -> int:
    """Number of objects around the region that come close to what is not computed, too large to be sure to be whole."""
    rows = objects.rows
    sides = np.maximum(rows[:, m.BOTTOM] - rows[:, m.TOP], rows[:, m.RIGHT] - rows[:, m.LEFT])
    is_doubtful = (rows[:, m.CHANNELS + m.HIGH] > 0) & (sides >= largest)
    boxes = rows[is_doubtful][:, [m.TOP, m.LEFT, m.BOTTOM, m.RIGHT]].astype(np.int64).tolist()
    return sum(_meets(region, lattice, Box(*box)) for box in boxes)


def _meets(region: Region, lattice: Lattice, box: Box) -> bool:
    """Whether any pixel of a box lies in the region; only a tile of it is drawn at a time."""
    height, width = lattice.core
    rows, columns = (range(box.y0 // height, -(-box.y1 // height)), range(box.x0 // width, -(-box.x1 // width)))
    cores = (lattice.tile_at(row, column).core.within(box) for row in rows for column in columns)
    return any(region.inside(core).any() for core in cores)
