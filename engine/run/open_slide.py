"""Keep slides open in one process from task to task: reader, predictor, writers, scratch and journal."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from cellseg_batch.engine.errors import OutputError
from cellseg_batch.engine.inference.model_pool import ModelPool
from cellseg_batch.engine.inference.predictor import Predictor, make_predictor
from cellseg_batch.engine.objects.scratch import Scratch, ScratchFolder
from cellseg_batch.engine.objects.stars import StarScratch
from cellseg_batch.engine.run.output_images import CELLS, LABELS
from cellseg_batch.engine.run.records import BackendIdentity
from cellseg_batch.engine.run.slide_plan import SlidePlan
from cellseg_batch.engine.run.slide_tissue import mask_layout
from cellseg_batch.engine.slides.pixel_meaning import TISSUE
from cellseg_batch.engine.slides.reader import SlideReader
from cellseg_batch.engine.slides.region import Region
from cellseg_batch.engine.slides.writer import ImageWriter
from cellseg_batch.engine.stage_clock import StageClock
from cellseg_batch.engine.storage.journal import Journal

# This many slides without a task stay open, because their next task often follows soon.
_IDLE_SLIDES = 2


@dataclass(frozen=True)
class SlideScratch:
    """What the passes over a slide keep for each other.

    Attributes:
        codes: the numbered codes; None where nothing grows.
        stars: the stars of each block that it does not suppress; None where there are no stars.
        survivors: the stars that are objects; None where there are no stars.
        probability: the probability; None if objects are not measured.
        classes: the class codes; None if objects get no classes.
    """

    codes: Scratch | None
    stars: StarScratch | None
    survivors: StarScratch | None
    probability: Scratch | None
    classes: Scratch | None

    @property
    def folders(self) -> list[ScratchFolder]:
        """Those that the slide has, in order; the first stands for all when it is asked whether they exist."""
        return [folder for folder in vars(self).values() if folder is not None]


@dataclass(frozen=True)
class OpenSlide:
    """The open objects that one slide's pixels pass through in this process.

    Attributes:
        plan: plan of the slide.
        reader: reader of the image.
        predictor: the network and its stitching, for several blocks at a time.
        images: name of each output image -> its writer.
        scratch: what the passes of this slide keep for each other.
        journal: journal of the output.
        clock: clock of the process.
        region: region of the slide; None if there is none.
    """

    plan: SlidePlan
    reader: SlideReader
    predictor: Predictor
    images: dict[str, ImageWriter]
    scratch: SlideScratch
    journal: Journal
    clock: StageClock
    region: Region | None = None

    @property
    def labels(self) -> ImageWriter:
        """The writer of the labels."""
        return self.images[LABELS]

    def retype_ids(self, dtype: str) -> None:
        """Give the images of ids pixels of another type; they are created again, empty, unless they have it.

        Raises:
            OutputError: a store cannot be written.
        """
        for name in (LABELS, CELLS):
            if name in self.images:
                self.images[name].retype(dtype)


class OpenSlides:
    """The slides that are open in a process, shared by its threads.

    Args:
        model_pool: model pool of the process, for predictors.
        clock: clock of the process.
    """

    def __init__(self, model_pool: ModelPool, clock: StageClock) -> None:
        self._model_pool = model_pool
        self._clock = clock
        self._entries: OrderedDict[SlidePlan, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def opened(
        self, plan: SlidePlan, backend: BackendIdentity, reader: SlideReader | None = None
    ) -> Iterator[OpenSlide]:
        """Keep a slide open for as long as the context lasts.

        Args:
            plan: plan of the slide.
            backend: backend that computes it.
            reader: reader of the slide, if there is one already; it is closed with the slide.

        Raises:
            ReadError: the image cannot be opened.
            OutputError: the backend in this process is of another version.
        """
        with self._lock:
            entry = self._entries.setdefault(plan, _Entry())
            self._entries.move_to_end(plan)
            entry.users += 1
        try:
            with entry.lock:
                if entry.slide is None:
                    reader = reader or SlideReader(plan.slide, plan.level.level, plan.channels.indices)
                    entry.slide = open_slide(plan, backend, reader, self._model_pool, self._clock)
            yield entry.slide
        finally:
            with self._lock:
                entry.users -= 1
                self._close_idle(_IDLE_SLIDES)

    def close(self) -> None:
        """Close every slide without a running task."""
        with self._lock:
            self._close_idle(0)

    def _close_idle(self, keep: int) -> None:
        idle = [plan for plan, entry in self._entries.items() if not entry.users]
        for plan in idle[: len(idle) - keep]:
            slide = self._entries.pop(plan).slide
            if slide is not None:
                slide.reader.close()
                if slide.region is not None:
                    slide.region.close()


class _Entry:
    """A slide that is open, or is being opened, and the number of threads that use it."""

    def __init__(self) -> None:
        self.slide: OpenSlide | None = None
        self.users = 0
        self.lock = threading.Lock()


def open_slide(
    plan: SlidePlan, backend: BackendIdentity, reader: SlideReader, model_pool: ModelPool, clock: StageClock
) -> OpenSlide:
    """Open a slide's predictor, writers, scratch and journal.

    Raises:
        OutputError: the backend in this process has another version than the one that began these labels, or the
            region has changed.
        ReadError: the region cannot be read.
    """
    own_backend = model_pool.backend(backend.name, backend.precision, plan.downscale)
    if own_backend.version != backend.version:
        raise OutputError(
            str(plan.paths.labels_folder),
            expected=f"{backend.name} {backend.version} in every worker, as these labels were begun with it",
            found=own_backend.version,
            remedy="install one version everywhere",
        )
    return OpenSlide(
        plan=plan,
        reader=reader,
        predictor=make_predictor(model_pool, own_backend, plan.prediction, clock),
        images=image_writers(plan),
        scratch=scratch_of(plan),
        journal=Journal(plan.paths.journal),
        clock=clock,
        region=None if plan.region is None else plan.region.open(plan.slide, plan.level.level),
    )


def image_writers(plan: SlidePlan) -> dict[str, ImageWriter]:
    """The name of each output image of a slide -> its writer."""
    layout, mask = plan.layout, mask_layout(plan.layout)
    return {
        output.name: ImageWriter(
            output.store,
            output.path,
            replace(mask if output.meaning == TISSUE else layout, dtype=output.meaning.dtype),
        )
        for output in plan.outputs
    }


def scratch_of(plan: SlidePlan) -> SlideScratch:
    """The scratch of a slide."""
    journal, stars = plan.paths.journal, plan.stars
    return SlideScratch(
        codes=Scratch(journal, "codes", np.uint32, plan.frame + plan.spread) if plan.frame is not None else None,
        stars=StarScratch(journal, "stars", stars.rays) if stars is not None else None,
        survivors=StarScratch(journal, "survivors", stars.rays) if stars is not None else None,
        probability=Scratch(journal, "probability", np.uint8, frame=0) if plan.objects else None,
        classes=Scratch(journal, "classes", np.uint8, frame=0) if plan.classes is not None else None,
    )
