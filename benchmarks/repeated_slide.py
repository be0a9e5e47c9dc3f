"""Write a huge slide in a moment: its chunk files repeat those of a small one, by hard links where there are any.

Reading it decodes as many chunks as any slide of its size; only the disk is spared, which holds them once.
"""

from __future__ import annotations

import json
import os
import shutil
from itertools import product
from pathlib import Path

from cellseg_batch.engine.profiling.bench_slides import PATTERN, Form, Pieces, write_slide


def write_repeated_slide(path: Path, side: int, pieces: Pieces, chunk: int = 1024, pattern: int = PATTERN) -> Path:
    """Write an image of ``side`` px, uint8, three channels, as `write_slide` writes it, of a repeated pattern.

    Args:
        path: folder of the image.
        side: side in px, a multiple of ``pattern``.
        pieces: pictures that fill the pattern.
        chunk: side of a chunk in px, a divisor of ``pattern``.
        pattern: side of the pattern in px.
    """
    write_slide(path, Form(pattern, chunk=chunk), pieces)
    metadata = path / "0" / "zarr.json"
    content = json.loads(metadata.read_text())
    channels, *_ = content["shape"]
    content["shape"] = [channels, side, side]
    metadata.write_text(json.dumps(content))
    chunks, repeated = path / "0" / "c", pattern // chunk
    for channel, y, x in product(range(channels), range(side // chunk), range(side // chunk)):
        target = chunks / str(channel) / str(y) / str(x)
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            _link(chunks / str(channel) / str(y % repeated) / str(x % repeated), target)
    return path


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links, or with too few
        shutil.copyfile(source, target)
