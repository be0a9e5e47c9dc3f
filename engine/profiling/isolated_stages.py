"""Measure each stage of a sample alone, with nothing else going on: the best that it can do on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.geometry import Block
from cellseg_batch.engine.inference.background import without_background
from cellseg_batch.engine.inference.model_pool import ModelPool
from cellseg_batch.engine.machine import cores
from cellseg_batch.engine.run.lifecycle import Request, prepare_slide
from cellseg_batch.engine.run.open_slide import OpenSlide
from cellseg_batch.engine.run.output_paths import output_paths
from cellseg_batch.engine.run.prepared_slide import PreparedSlide
from cellseg_batch.engine.run.worker import Worker
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.slides.slide import Slide
from cellseg_batch.engine.stage_clock import StageClock

_COPIED = 64 << 20
_ROUNDS = 5


@dataclass(frozen=True)
class Alone:
    """Seconds of each stage on the blocks of a sample, measured stage by stage.

    Attributes:
        first_read: seconds of the first read of the boxes, on every core; longer than later reads if a cache was cold.
        seconds: stage -> seconds; reading and writing on every core, the others as in a run.
        read_bytes, written_bytes: bytes of the decoded pixels that were read and written.
    """

    first_read: float
    seconds: dict[str, float]
    read_bytes: int
    written_bytes: int


@contextmanager
def opened_alone(slide: Slide, settings: Settings, model_pool: ModelPool, folder: Path) -> Iterator[OpenSlide]:
    """Open a slide outside of any run, for as long as the context lasts.

    Args:
        slide: the image.
        settings: settings as of a run over the slide.
        model_pool: source of the network.
        folder: new folder for the labels, which are created empty.

    Raises:
        SlideError: the slide cannot be processed as asked.
    """
    worker = Worker(settings, model_pool, StageClock())
    prepared = prepare_slide(worker, Request(slide, output_paths(slide, settings.name, folder)))
    assert isinstance(prepared, PreparedSlide)  # the folder is new, so the slide cannot be finished
    with worker.slides.opened(prepared.plan, prepared.backend) as opened:
        yield opened
    worker.close()


def first_read(slide: OpenSlide, blocks: list[Block]) -> float:
    """Seconds to read the blocks for the first time, on every core, with caches as they are."""
    return _timed(lambda block: slide.reader.decode(block.plane, block.read_box), blocks)


def measure_alone(slide: OpenSlide, blocks: list[Block], first: float) -> Alone:
    """Read, compute and write the blocks, stage after stage.

    Args:
        slide: the open slide, with empty labels.
        blocks: blocks of the slide.
        first: seconds from `first_read`.
    """
    sizes: list[int] = []

    def read(block: Block) -> NDArray[Any]:
        pixels = slide.reader.decode(block.plane, block.read_box)
        sizes.append(pixels.nbytes)
        return pixels

    reading = _timed(read, blocks)
    slide.clock.drain()
    masks: dict[int, NDArray[np.uint8]] = {}
    for block in blocks:
        pixels = slide.reader.decode(block.plane, block.read_box)
        shown = without_background(block, pixels, slide.plan.grid.lattice, slide.plan.flat)
        masks[block.index] = slide.predictor.predict(pixels, shown).mask
    computing = {name: seconds for name, seconds in slide.clock.drain().items() if seconds}
    writing = _timed(lambda block: slide.labels.write(0, block.plane, block.box, masks[block.index]), blocks)
    return Alone(
        first_read=first,
        seconds={"read": reading, **computing, "write": writing},
        read_bytes=sum(sizes),
        written_bytes=sum(mask.nbytes for mask in masks.values()),
    )


def memory_bandwidth() -> float:
    """Bytes per second that a thread copies, read and written bytes both counted; the best of a few rounds."""
    source, target = np.ones(_COPIED, np.uint8), np.zeros(_COPIED, np.uint8)
    seconds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - start)
    return 2 * _COPIED / min(seconds)


def _timed(call: Callable[[Block], object], blocks: Iterable[Block]) -> float:
    """Seconds to call ``call`` for every block, on every core; results are dropped at once."""
    start = time.perf_counter()
    with ThreadPoolExecutor(cores()) as pool:
        for future in [pool.submit(_call_and_drop, call, block) for block in blocks]:
            future.result()
    return time.perf_counter() - start


def _call_and_drop(call: Callable[[Block], object], block: Block) -> None:
    call(block)
