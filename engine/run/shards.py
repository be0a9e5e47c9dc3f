"""Split the images of a campaign among jobs that know nothing of each other, as those of a job array."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

from cellseg_batch.engine.settings import shard_numbers
from cellseg_batch.engine.slides.slide import Slide, UnreadableImage


def images_of_shard(images: Sequence[Slide | UnreadableImage], shard: str | None) -> list[Slide | UnreadableImage]:
    """The images that ``shard`` takes, such as 0/4; all of them without one.

    An image is chosen by a hash of its path below the input alone, so other images shift nothing, wherever the input
    lies.
    """
    if shard is None:
        return list(images)
    number, count = shard_numbers(shard)
    return [image for image in images if _hash(image.name) % count == number]


def _hash(name: str) -> int:
    """A number from the path of an image below the input, whose name comes first; an input of one image has no more."""
    _, _, below = name.partition("/")
    return int.from_bytes(hashlib.sha256(os.fsencode(below or name)).digest()[:8], "big")
