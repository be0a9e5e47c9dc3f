"""Tell whether an image has changed since it was segmented.

The sizes and times of a few of its files are compared first.  Only where these differ, as after a copy or a change, are
some of the segmented blocks read again; only other pixels are a change.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.run.records import BLOCKS, BlockRecord, InputPixels, Manifest, TaskRecord
from cellseg_batch.engine.slides.formats import format_of
from cellseg_batch.engine.slides.reader import SlideReader
from cellseg_batch.engine.slides.slide import Slide
from cellseg_batch.engine.storage.checksums import checksum
from cellseg_batch.engine.storage.journal import Journal
from cellseg_batch.engine.storage.paths import version_of

# Number of blocks that are read again at most, spread over the slide.
_MAX_BLOCKS = 8
# Every fourth row of a block's core is looked at: chunks and tiles of images are higher, and a block costs a quarter.
_ROW_STEP = 4


def files_state(slide: Slide, level: int) -> str:
    """Hash of the sizes and times of some of the files that hold ``level`` of a slide."""
    versions = "\n".join(version_of(path) for path in format_of(slide).sample_files(slide, level))
    return hashlib.sha256(versions.encode()).hexdigest()[:32]


def pixels_state(core: NDArray[Any]) -> int:
    """Checksum of the input pixels (C, h, w) in the core of a block, in the stored dtype."""
    return checksum(core[:, ::_ROW_STEP])


def has_changed(slide: Slide, journal: Journal, manifest: Manifest) -> bool:
    """Whether a slide has other pixels than those that the blocks in a journal were made of.

    Raises:
        ReadError: the pixels of such a block cannot be read any more.
        OutputError: a record is damaged.
    """
    earlier = manifest.decisions.input
    if not _has_form(slide, earlier):
        return True
    if files_state(slide, earlier.level) == manifest.input_files:
        return False
    numbers = sorted(journal.numbers(BLOCKS))
    if manifest.decisions.region is not None or manifest.decisions.tissue_tiles is not None:
        numbers = [number for number in numbers if _was_read(journal, number)]
    spread = {numbers[round(i)] for i in np.linspace(0, len(numbers) - 1, min(len(numbers), _MAX_BLOCKS))}
    with SlideReader(slide, earlier.level, earlier.channels) as reader:
        for number in sorted(spread):
            record, block = journal.get(BLOCKS, number, TaskRecord[BlockRecord]), manifest.grid[number]
            if record is None:
                continue  # a run that goes on at the same time does it anew
            if record.result.input_pixels != pixels_state(reader.read(block.plane, block.box)):
                return True
    return False


def _was_read(journal: Journal, number: int) -> bool:
    """Whether a block was read: those wholly on glass or outside the region are not."""
    record = journal.get(BLOCKS, number, TaskRecord[BlockRecord])
    return record is not None and record.result.input_pixels is not None


def _has_form(slide: Slide, earlier: InputPixels) -> bool:
    """Whether a slide has the level, axes, shape and dtype that were segmented."""
    if earlier.level >= len(slide.levels):
        return False
    form = slide.axes, slide.dtype, slide.levels[earlier.level].shape
    return form == (earlier.axes, earlier.dtype, earlier.shape)
