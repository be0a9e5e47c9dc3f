"""Find the images of a run: those of its inputs or of its manifest, and of them the part that a job takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cellseg_batch.engine.errors import CellsegError, UsageError
from cellseg_batch.engine.run.output_paths import refuse_output_inside
from cellseg_batch.engine.run.shards import images_of_shard
from cellseg_batch.engine.run.slide_list import Row, read_rows, refuse_rows
from cellseg_batch.engine.run.slide_plan import choose_input
from cellseg_batch.engine.run.slide_region import check_region, refuse_region
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.slides.discover import find_all_images, find_images
from cellseg_batch.engine.slides.image_format import some_of
from cellseg_batch.engine.slides.plate import FieldChoice
from cellseg_batch.engine.slides.slide import Asked, Slide, UnreadableImage
from cellseg_batch.trainer.card import Card

Images = list[Slide | UnreadableImage]


def find_run_images(inputs: Sequence[Path], settings: Settings, card: Card) -> Images:
    """Every image that a run of these settings processes.

    Args:
        inputs: files, zarr stores or folders of them; none with a manifest.
        settings: settings of the run.
        card: card of its model.

    Raises:
        NoImageError: an input does not exist or holds nothing that could be an image.
        UsageError: there are neither inputs nor a manifest, or both; or rows of the manifest cannot be used; or
            no plate has one of the wells or fields; or settings or model keep no regions.
    """
    if bool(inputs) == bool(settings.manifest):
        raise UsageError(
            "`manifest`" if inputs else "SLIDES",
            expected="SLIDES, or a file that lists them" if inputs else "a slide, a store or a folder of them",
            found="both" if inputs else "none",
            remedy="leave one out" if inputs else "name one, or a file that lists them with `manifest`",
        )
    if settings.manifest is None:
        refuse_output_inside(settings.output, inputs)
        images = find_all_images(inputs, settings.axes, FieldChoice(settings.wells, settings.fields))
    else:
        images = _images_listed(settings.manifest, settings, card)
    _refuse_unmatched(images, settings)
    if settings.mask is not None or any(isinstance(image, Slide) and image.asked.mask for image in images):
        refuse_region(settings, card)
    return images_of_shard(images, settings.shard)


def _refuse_unmatched(images: Images, settings: Settings) -> None:
    """Refuse wells and fields that no plate has, which are misspelt."""
    positions = [image.plate_position for image in images if image.plate_position is not None]
    unmatched = FieldChoice(settings.wells, settings.fields).unmatched(positions)
    if unmatched:
        raise UsageError(
            "`wells` and `fields`",
            expected="wells and fields of the plates",
            found=f"{some_of(unmatched)}, which none of them has",
            remedy="choose among those that cellseg-batch info lists",
        )


def _images_listed(manifest: Path, settings: Settings, card: Card) -> Images:
    """The images of every row of a manifest; a row without usable metadata for what it asks for refuses all."""
    images: Images = []
    lines: dict[str, int] = {}
    rows, bad = read_rows(manifest)
    refuse_output_inside(settings.output, [row.path for row in rows])
    for row in rows:
        try:
            found = _images_of(row, settings, card)
        except CellsegError as error:
            bad.append((row.line, f"{row.path}: {error.detail}"))
            continue
        images += found
        for image in found:
            first = lines.setdefault(image.identity, row.line)
            if first != row.line:
                bad.append((row.line, f"{image.name} is listed in line {first} already"))
    refuse_rows(manifest, bad)
    return images


def _images_of(row: Row, settings: Settings, card: Card) -> Images:
    images: Images = []
    for image in find_images(row.path, settings.axes, FieldChoice(settings.wells, settings.fields)):
        if isinstance(image, Slide):
            image = replace(image, asked=row.asked)
            if row.asked != Asked():
                level, _ = choose_input(image, settings, card)
                check_region(image, level.level, settings)
        images.append(image)
    return images
