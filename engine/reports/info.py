"""List the images that a path holds and how a run would cut each; none of their pixels is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cellseg_batch.engine.errors import SlideError
from cellseg_batch.engine.geometry import lay_blocks
from cellseg_batch.engine.inference.tissue import look_level, may_have_glass
from cellseg_batch.engine.models import load_model
from cellseg_batch.engine.run.slide_plan import lay_lattice
from cellseg_batch.engine.run.slide_region import SlideRegion, settle_region
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.slides.discover import find_all_images
from cellseg_batch.engine.slides.level_and_channels import ChannelChoice, LevelChoice, choose_channels, choose_level
from cellseg_batch.engine.slides.slide import Slide, UnreadableImage
from cellseg_batch.trainer.card import Card


@dataclass(frozen=True)
class Cut:
    """The level, channels, blocks and tiles with which a run would process an image.

    Attributes:
        slide: the image.
        level, channels: level and channels to segment, with the reasons.
        blocks, tiles: numbers of blocks and tiles, over all planes.
        tile: (height, width) of each tile in px.
        region: region to which a mask would be confined; None for the whole image.
        glass_level: level in which a run would look for glass; None if it would not look.
    """

    slide: Slide
    level: LevelChoice
    channels: ChannelChoice
    blocks: int
    tiles: int
    tile: tuple[int, int]
    region: SlideRegion | None
    glass_level: int | None


@dataclass(frozen=True)
class ImageInfo:
    """Metadata of one image; a field that is unknown because the image cannot be used is None.

    Attributes:
        path: the image, as a user would type it.
        series: number of the image in its file; None for formats whose files hold a single image.
        axes: order of the axes, of the letters t c z y x.
        shape: shape of the full resolution, in the order of the axes.
        levels: shape of every resolution, full resolution first.
        dtype: numpy name of the pixel type.
        channels: names of the channels; indices as text if they have no names.
        rgb: the channels are red, green, blue.
        pixel_size_um: µm per px of full resolution along x; None if the metadata do not say.
        reason: why the image cannot be segmented as asked; "" if it can.
        notes: remarks on what the metadata say and what is left out.
        cut: how a run would cut the image; None if it cannot be segmented.
    """

    path: str
    series: int | None = None
    axes: str | None = None
    shape: tuple[int, ...] | None = None
    levels: tuple[tuple[int, ...], ...] | None = None
    dtype: str | None = None
    channels: tuple[str, ...] | None = None
    rgb: bool | None = None
    pixel_size_um: float | None = None
    reason: str = ""
    notes: tuple[str, ...] = ()
    cut: Cut | None = None


@dataclass(frozen=True)
class Info:
    """Every image below the inputs."""

    images: tuple[ImageInfo, ...]

    @property
    def refused(self) -> list[ImageInfo]:
        """The images that cannot be segmented as asked."""
        return [image for image in self.images if image.reason]

    def to_json(self) -> dict[str, Any]:
        """The images as plain JSON values, without their `Cut`."""
        rows = [asdict(replace(image, cut=None)) for image in self.images]
        return {"images": [{name: value for name, value in row.items() if name != "cut"} for row in rows]}


def list_images(inputs: list[Path], settings: Settings) -> Info:
    """List every image below ``inputs``, and how a run of ``settings`` would cut it.

    Raises:
        UsageError: there is no image, or no model of that name.
    """
    card = load_model(settings.model).card
    images = find_all_images(inputs, settings.axes)
    return Info(tuple(_describe(image, settings, card) for image in images))


def _describe(image: Slide | UnreadableImage, settings: Settings, card: Card) -> ImageInfo:
    if isinstance(image, UnreadableImage):
        return ImageInfo(image.path, reason=image.reason)
    info = ImageInfo(
        path=image.location,
        series=image.series,
        axes=image.axes,
        shape=image.levels[0].shape,
        levels=tuple(level.shape for level in image.levels),
        dtype=image.dtype,
        channels=image.channel_names(range(image.extent("c", 0))),
        rgb=image.rgb,
        pixel_size_um=image.pixel_size_um(0),
        notes=image.notes,
    )
    try:
        return replace(info, cut=_cut(image, settings, card))
    except SlideError as error:
        return replace(info, reason=error.detail)


def _cut(slide: Slide, settings: Settings, card: Card) -> Cut:
    level = choose_level(slide, settings.level, settings.pixel_size, card.input.pixel_size_um)
    channels = choose_channels(slide, settings.channel, card.input.channels)
    lattice = lay_lattice(slide.plane_shape(level.level), settings, card)
    grid = lay_blocks(lattice, settings.block_side(), slide.planes(level.level))
    rows, columns = lattice.grid
    region = settle_region(slide, level.level, lattice, 0, settings)
    glass_level = look_level(slide, level.level) if settings.skips_background and may_have_glass(slide) else None
    return Cut(slide, level, channels, len(grid), rows * columns * grid.planes, lattice.tile, region, glass_level)
