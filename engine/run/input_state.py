"""Tell whether an image has changed since it was segmented.

The sizes and times of a few of its files are compared first.  Only where these differ, as after a copy or a change, are
sampled pixels hashed; only another hash is a change.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from cellseg_batch.engine.errors import ReadError
from cellseg_batch.engine.inference.normalise import sample_boxes
from cellseg_batch.engine.slides.formats import format_of
from cellseg_batch.engine.slides.reader import SlideReader
from cellseg_batch.engine.slides.slide import Slide
from cellseg_batch.engine.storage.paths import version_of

# Number of values that are hashed at most, over all channels and planes: images of up to 1024 px squared as a whole.
_MAX_VALUES = 1 << 20


@dataclass(frozen=True)
class InputState:
    """An image at one moment.

    Attributes:
        files: hash of the versions of its files.
        pixels: hash of sampled pixels; "" if they could not be read, so that they cannot be compared.
    """

    files: str
    pixels: str


def input_state(slide: Slide, level: int) -> InputState:
    """The present state of a slide whose ``level`` is segmented."""
    return InputState(_hash_of_files(slide, level), _hash_of_pixels(slide, level))


def has_changed(slide: Slide, level: int, earlier: InputState) -> bool:
    """Whether the pixels of a slide differ from those in an earlier state."""
    if level >= len(slide.levels):
        return True
    if not earlier.pixels or _hash_of_files(slide, level) == earlier.files:
        return False
    return _hash_of_pixels(slide, level) != earlier.pixels


def _hash_of_files(slide: Slide, level: int) -> str:
    versions = [version_of(path) for path in format_of(slide).sample_files(slide, level)]
    return hashlib.sha256("\n".join(versions).encode()).hexdigest()[:32]


def _hash_of_pixels(slide: Slide, level: int) -> str:
    channels = tuple(range(slide.extent("c", level)))
    digest = hashlib.sha256(f"{slide.axes} {slide.dtype} {slide.levels[level].shape}".encode())
    try:
        with SlideReader(slide, level, channels) as reader:
            for plane, box in sample_boxes(slide, level, _MAX_VALUES // len(channels)):
                digest.update(np.ascontiguousarray(reader.read(plane, box)).tobytes())
    except ReadError:
        return ""
    return digest.hexdigest()[:32]
