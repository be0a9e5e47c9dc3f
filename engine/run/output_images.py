"""List the images that a run writes for a slide; locks, writers, journal, checks and reports run over this list."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cellseg_batch.engine.inference.decoders import DECODERS
from cellseg_batch.engine.run.output_paths import OutputPaths, output_paths
from cellseg_batch.engine.run.places import claim
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.slides.pixel_meaning import CELL_IDS, INSTANCES, PROBABILITY, TISSUE, PixelMeaning
from cellseg_batch.engine.slides.slide import Slide
from cellseg_batch.trainer.card import Card

LABELS, CELLS = "labels", "cells"


@dataclass(frozen=True)
class OutputImage:
    """An image that a run writes for a slide.

    Attributes:
        name: name of the image among those of its slide.
        meaning: meaning of its pixels.
        store: root of its zarr hierarchy.
        path: path of its group in the store.
        source: path from its group to the segmented image; None if that is no zarr group, or its labels lie elsewhere.
    """

    name: str
    meaning: PixelMeaning
    store: Path
    path: str
    source: str | None = None

    @property
    def folder(self) -> Path:
        """Its group on disk."""
        return self.store / self.path


def claim_outputs(slide: Slide, settings: Settings, card: Card) -> OutputPaths:
    """The paths of a slide's output, in a place that belongs to the slide from now on.

    Raises:
        OutputError: there is no such place, or it cannot be noted.
    """
    while True:
        paths = output_paths(slide, settings.name, settings.output)
        outputs = output_images(paths, settings, card)
        if paths.companion not in {output.store for output in outputs} or claim(paths.place):
            return paths


def output_images(paths: OutputPaths, settings: Settings, card: Card) -> tuple[OutputImage, ...]:
    """List the images that a run writes for a slide, the labels first.

    Args:
        paths: paths of the slide's output.
        settings: settings of the run.
        card: card of the model.
    """
    labels = INSTANCES if settings.makes_ids else DECODERS[card.decoder].mask_meaning(card)
    images = [OutputImage(LABELS, labels, paths.store, paths.labels, paths.source)]
    if settings.expand is not None:
        images.append(OutputImage(CELLS, CELL_IDS, paths.store, paths.cells, paths.source))
    if settings.probability:
        images.append(OutputImage("probability", PROBABILITY, paths.companion, paths.in_companion("probability")))
    if settings.tissue:
        images.append(OutputImage(TISSUE.name, TISSUE, paths.store, paths.tissue, paths.source))
    return tuple(images)
