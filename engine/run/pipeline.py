"""The path of the data: slide -> blocks -> tiles -> batch -> model -> stitch -> writer -> journal.

`segment_block` is the whole story of a block, `passes_of` that of a slide; every other room is called from here or
calls these.  What lies here runs in a worker, which may be a process on another machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial

from cellseg_batch.engine.inference.background import without_background
from cellseg_batch.engine.run.instance_passes import INSTANCES, grow_block, keep_seeds, merge_blocks, tabulate
from cellseg_batch.engine.run.open_slide import BLOCKS, OpenSlide, Pass, Record
from cellseg_batch.engine.run.slide_plan import SlidePlan
from cellseg_batch.engine.slides.label_layout import lay_out
from cellseg_batch.engine.storage.journal import Journal

_MERGE, _TABLE = "merge", "table"


def passes_of(plan: SlidePlan) -> Iterator[Pass]:
    """The passes over a slide, in order."""
    yield Pass(BLOCKS, len(plan.grid), segment_block)
    if plan.instances is not None:
        yield Pass(_MERGE, 1, merge_blocks)
        yield Pass(INSTANCES, len(plan.grid), grow_block)
    if plan.objects:
        yield Pass(_TABLE, 1, tabulate)
    layout = lay_out(plan.slide, plan.level.level, plan.grid, plan.place.zarr_format)
    for level in range(1, len(layout.shapes)):
        yield Pass(f"levels/{level}", layout.shard_count(level), partial(build_shard, level), scratch=False)


def segment_block(slide: OpenSlide, number: int) -> Record:
    """Read, segment and write one block."""
    block = slide.plan.grid[number]
    with slide.clock.stage("read"):
        pixels = slide.reader.read(block.plane, block.read_box)
    with slide.clock.stage("gather"):
        shown = without_background(block, pixels, slide.plan.grid.lattice, slide.plan.flat)
    result = slide.predictor.predict(pixels, shown)
    skipped = len(block.tiles) - len(shown.tiles)
    record = {"foreground": result.foreground, "missing": result.missing, "skipped_tiles": skipped}
    if slide.plan.instances is not None:
        record |= keep_seeds(slide, block, result.mask)
    with slide.clock.stage("write"):
        if slide.plan.instances is None:
            slide.labels.write(0, block.plane, block.box, result.mask)
        if slide.probability is not None and result.probability is not None:
            slide.probability.write(0, block.plane, block.box, result.probability)
        if slide.certainty is not None and result.probability is not None:
            slide.certainty.write(block, result.probability)
    return record


def build_shard(level: int, slide: OpenSlide, number: int) -> Record:
    """Shrink one shard of a level of the pyramid from the level above it."""
    with slide.clock.stage("pyramid"):
        for image in slide.images:
            image.shrink(level, *image.layout.shard_box(level, number))
    return {}


def totals(plan: SlidePlan, journal: Journal) -> dict[str, int]:
    """What the records of a finished slide add up to.

    Foreground pixels, NaN in the input and tiles that were not computed; of instances, objects and foreground pixels
    that belong to none.
    """
    wanted: dict[str, tuple[str, ...]] = {BLOCKS: ("foreground", "missing", "skipped_tiles")}
    if plan.instances is not None:
        wanted |= {_MERGE: ("objects",), INSTANCES: ("labelled",)}
    counts: Counter[str] = Counter()
    for part, names in wanted.items():
        for _, record in journal.records(part):
            counts.update({name: record[name] for name in names})
    if plan.instances is not None:
        counts["unreached"] = counts["foreground"] - counts.pop("labelled", 0)
    return dict(counts)
