"""Plan a slide before its first block: settle its resolution, channels, lattice and normalisation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from cellseg_batch.engine.backend_table import KNOWN_BACKENDS
from cellseg_batch.engine.errors import SlideError, UsageError
from cellseg_batch.engine.geometry import (
    Block,
    BlockGrid,
    Lattice,
    fit_lattice,
    fit_squares,
    lay_blocks,
    lay_fixed,
    nearly_cheapest,
    square_lattices,
)
from cellseg_batch.engine.inference.backends.protocol import Shape
from cellseg_batch.engine.inference.background import flat_limit
from cellseg_batch.engine.inference.decoders import DECODERS, GrowingDecoder
from cellseg_batch.engine.inference.normalise import Bounds
from cellseg_batch.engine.inference.prediction import PredictionRule
from cellseg_batch.engine.inference.tissue import Tissue
from cellseg_batch.engine.objects.cells import CellRule, cell_rule
from cellseg_batch.engine.objects.classes import ClassRule, class_rule
from cellseg_batch.engine.objects.seeds import InstanceRule
from cellseg_batch.engine.objects.stars import StarRule
from cellseg_batch.engine.run.output_images import OutputImage, output_images
from cellseg_batch.engine.run.output_paths import OutputPaths
from cellseg_batch.engine.run.records import (
    BackendIdentity,
    Decisions,
    InputPixels,
    ModelIdentity,
    TileLattice,
    TissueTiles,
)
from cellseg_batch.engine.run.slide_region import SlideRegion, reach_of, settle_region
from cellseg_batch.engine.run.slide_tissue import TileMap, as_map, remarks, settle_tiles
from cellseg_batch.engine.settings import TILE, Settings
from cellseg_batch.engine.slides.label_layout import Layout, lay_out
from cellseg_batch.engine.slides.level_and_channels import ChannelChoice, LevelChoice, choose_channels, choose_level
from cellseg_batch.engine.slides.pixel_meaning import PROBABILITY, TISSUE
from cellseg_batch.engine.slides.reader import SlideReader
from cellseg_batch.engine.slides.slide import Slide
from cellseg_batch.kernels.instances import reach
from cellseg_batch.kernels.moments import HALO
from cellseg_batch.trainer.card import Card


@dataclass(frozen=True)
class SlidePlan:
    """The plan by which one slide is processed.

    Attributes:
        slide: the image.
        paths: paths of its output.
        level: the resolution, and why it was chosen.
        channels: the channels, and why they were chosen.
        grid: the blocks, with the lattice of tiles.
        bounds: pixel values that normalisation maps to 0 and 1.
        threshold: probability above which a pixel is foreground.
        shape: (N, C, T_y, T_x) of every batch.
        decoder: name of the model's decoder.
        outputs: the images that are written, the labels first.
        downscale: factor by which the image is downscaled for the model.
        stitch: crop or blend.
        flat: difference of pixel values below which a tile is background and not computed; 0 computes all.
        instances: rule by which logits become instances by growth; None for a mask, or if they are stars.
        stars: rule by which logits become stars; None for a mask, or if instances grow.
        output_grid: px between two points of the network's output.
        objects: whether to measure the instances.
        classes: class map by which the instances get classes; None if there is none, or they are not measured.
        notes: remarks on the model and on cells for the user.
        region: region to which the output is confined; None for the whole slide.
        tissue: the tiles that are computed of a slide on glass; None if glass is not looked for, or not found.
        cells: rule by which the instances are expanded into cells; None for no cells.
    """

    slide: Slide
    paths: OutputPaths
    level: LevelChoice
    channels: ChannelChoice
    grid: BlockGrid
    bounds: Bounds
    threshold: float
    shape: Shape
    decoder: str
    outputs: tuple[OutputImage, ...]
    downscale: int = 1
    stitch: str = "crop"
    flat: float = 0.0
    instances: InstanceRule | None = None
    stars: StarRule | None = None
    output_grid: int = 1
    objects: bool = False
    classes: ClassRule | None = None
    notes: tuple[str, ...] = ()
    region: SlideRegion | None = None
    tissue: TissueTiles | None = None
    cells: CellRule | None = None

    @property
    def pixels(self) -> int:
        """Number of pixels of all planes."""
        height, width = self.grid.lattice.shape
        return height * width * self.grid.planes

    @property
    def makes_ids(self) -> bool:
        """Whether every object gets an id of its own."""
        return self.instances is not None or self.stars is not None

    @property
    def frame(self) -> int | None:
        """Width in px of the frame around a block that growth needs; None where nothing grows."""
        return None if self.instances is None else reach(self.instances.steps) + HALO * self.objects

    @property
    def spread(self) -> int:
        """Width in px of the surroundings of a block whose labels its cells need; 0 without cells."""
        return 0 if self.cells is None else self.cells.reach

    @property
    def needs_probability(self) -> bool:
        """Whether blocks need the probability, to write it or to measure objects."""
        return self.objects or any(output.meaning == PROBABILITY for output in self.outputs)

    @property
    def images_of_bytes(self) -> int:
        """Number of uint8 images that the prediction of a block makes."""
        return 1 + self.needs_probability + (self.classes is not None)

    @property
    def layout(self) -> Layout:
        """Levels, chunks and shards of the output images, which differ in the type of their pixels alone."""
        return lay_out(self.slide, self.level.level, self.grid, self.paths.zarr_format)

    @property
    def tiles(self) -> int:
        """Number of tiles of all planes."""
        rows, columns = self.grid.lattice.grid
        return rows * columns * self.grid.planes

    @cached_property
    def computed_tiles(self) -> TileMap | None:
        """Whether each tile of a plane, (rows, columns), is in the region and no glass; None if all tiles are."""
        maps = [] if self.region is None else [self.region.computed]
        maps += [] if self.tissue is None else [as_map(self.tissue, self.grid.lattice)]
        return np.logical_and.reduce(maps) if maps else None

    @property
    def computed_pixels(self) -> int:
        """Number of pixels of all planes that are not left out because of region or glass."""
        computed = self.computed_tiles
        if computed is None:
            return self.pixels
        cores = (self.grid.lattice.tile_at(*index).core for index in np.argwhere(computed).tolist())
        return sum(core.area for core in cores) * self.grid.planes

    def inside(self, block: Block) -> Block:
        """A block without the tiles that are not computed because of the region."""
        return block if self.region is None else block.with_tiles(self.region.computed, self.grid.lattice)

    def computed(self, block: Block) -> Block:
        """A block without the tiles that are not computed because of region or glass."""
        computed = self.computed_tiles
        return block if computed is None else block.with_tiles(computed, self.grid.lattice)

    def with_region(self, settings: Settings) -> SlidePlan:
        """The plan with the region that the settings name for the slide; the lattice is settled before.

        Raises:
            ReadError: it cannot be read, or lies outside the slide.
        """
        # A cell that is whole needs all nuclei that are as near to its pixels as its own.
        reach = reach_of(self.instances) + 2 * self.spread
        region = settle_region(self.slide, self.level.level, self.grid.lattice, reach, settings)
        return replace(self, region=region)

    def with_tissue(self, tissue: Tissue | None) -> SlidePlan:
        """The plan with the tiles that show tissue; lattice and region are settled before."""
        if tissue is None:
            return replace(self, tissue=None)
        inside = None if self.region is None else self.region.computed
        return replace(self, tissue=settle_tiles(tissue, self.grid.lattice, inside))

    def with_cores(self, core: tuple[int, int]) -> SlidePlan:
        """The plan with a lattice of other cores, of (height, width) in px."""
        lattice = replace(self.grid.lattice, core=core)
        return replace(self, grid=replace(self.grid, lattice=lattice), shape=(*self.shape[:2], *lattice.tile))

    def with_blocks(self, side: int) -> SlidePlan:
        """The plan with blocks of about ``side`` px."""
        return replace(self, grid=lay_blocks(self.grid.lattice, side, self.grid.planes, self.grid.ring))

    def decisions(self, model: ModelIdentity, backend: BackendIdentity) -> Decisions:
        """The decisions that determine the pixels of the output."""
        slide, lattice, level = self.slide, self.grid.lattice, self.level.level
        return Decisions(
            input=InputPixels(
                slide.dtype,
                slide.axes,
                level,
                slide.levels[level].shape,
                self.channels.indices,
                self.level.pixel_size_um,
            ),
            model=model,
            backend=backend,
            downscale=self.downscale,
            normalisation=self.bounds,
            lattice=TileLattice(lattice.core, lattice.margin),
            stitch=self.stitch,
            flat=self.flat,
            threshold=self.threshold,
            decoder=self.decoder,
            outputs=tuple(output.name for output in self.outputs),
            instances=self.instances,
            stars=self.stars,
            objects=self.objects,
            classes=self.classes,
            region=None if self.region is None else self.region.identity,
            tissue_tiles=self.tissue,
            cells=self.cells,
        )

    @property
    def remarks_on_tissue(self) -> tuple[str, ...]:
        """Remarks for the user on how tissue was found."""
        if self.tissue is None:
            asked = any(output.meaning == TISSUE for output in self.outputs)
            return ("no glass found, so all of it counts as tissue",) * asked
        return remarks(self.slide, self.level.level, self.tissue)

    @property
    def prediction(self) -> PredictionRule:
        """The rule by which the pixels of blocks become masks."""
        return PredictionRule(
            lattice=self.grid.lattice,
            shape=self.shape,
            dtype=self.slide.dtype,
            bounds=self.bounds,
            threshold=self.threshold,
            probability=self.needs_probability,
            stitch=self.stitch,
            downscale=self.downscale,
            decoder=DECODERS[self.decoder],
            instances=self.instances,
            classes=self.classes,
            stars=self.stars,
            grid=self.output_grid,
        )


def pick_margin(settings: Settings, card: Card, downscale: int = 1) -> int:
    """The margin in px: that of the settings, else the card's.

    If instances are made, ``exact`` adds the decoder's reach to the network's, in whole strides, and so does a model
    that gives nothing close to a tile's edge.

    Args:
        settings: settings of the run.
        card: card of the model, for images that are downscaled by ``downscale``.
        downscale: factor by which the image is downscaled for the model.

    Raises:
        UsageError: the network has no reach of its own, or gives nothing so close to a tile's edge.
    """
    decoder, stride, crop = DECODERS[card.decoder], card.total_stride, card.output.crop
    reach = 0
    if settings.makes_ids and isinstance(decoder, GrowingDecoder):
        reach = decoder.reach(decoder.instance_rule(card, downscale))
    least = crop + reach if crop else 0
    if settings.margin is None:
        return max(card.margin, -(-least // stride) * stride)
    if settings.margin == "exact" and card.exact_margin is None:
        raise UsageError(
            "`margin=exact`",
            expected=f"a model whose pixels see a bounded part of a tile, unlike {card.name}",
            found="no exact margin in its card",
            cause="the network sees the whole tile, or takes tiles of a single size",
            remedy=f"use the card's own `margin={card.margin}`, or a larger one",
        )
    exact = (card.exact_margin or 0) + -(-reach // stride) * stride
    margin = int(settings.margin if settings.margin != "exact" else exact)
    if margin < least:
        raise UsageError(
            "`margin`",
            expected=f"at least {least} px, which the model {card.name} gives no result for or its decoder looks at",
            found=f"{margin}",
            remedy=f"use `margin={max(card.margin, -(-least // stride) * stride)}`",
        )
    return margin


def lay_lattice(
    shape: tuple[int, int],
    settings: Settings,
    card: Card,
    backend: str | None = None,
    downscale: int = 1,
    tissue: Tissue | None = None,
) -> Lattice:
    """The lattice of tiles over a plane: of few shapes for a backend whose compiling takes long, else fitted.

    Where glass is left out, smaller squares compute less of it and more margins.  Unless the settings say how large
    tiles are, the lattice is that of the squares which compute the least, or the fitted one if it computes still less.

    Args:
        shape: (height, width) of the plane in px.
        settings: settings of the run.
        card: card of the model, for images that are downscaled by ``downscale``.
        backend: name of the backend that computes the slide; None if none is chosen yet: then that of the settings.
        downscale: factor by which the image is downscaled for the model.
        tissue: tissue of the slide; None if all of it may be tissue.

    Raises:
        UsageError: tile and margin do not go together, or the model does not take such batches.
    """
    if card.input.batch not in (None, settings.batch):
        raise UsageError(
            "`batch`",
            expected=f"{card.input.batch}, the only batch that the graph of {card.name} takes",
            found=f"{settings.batch}",
            remedy=f"use `batch={card.input.batch}`, or export the model with a dynamic batch",
        )
    margin, size = pick_margin(settings, card, downscale), card.input.size
    if size.fixed:
        return lay_fixed(shape, settings.tile or size.fixed, size.fixed, margin, card.total_stride)
    entry = KNOWN_BACKENDS.get(backend or settings.backend)
    lay = fit_squares if entry is not None and entry.eager else fit_lattice
    how = shape, settings.tile or TILE, margin, card.total_stride, size.min
    fitted = lay(*how)
    if tissue is None or settings.tile is not None:
        return fitted
    return nearly_cheapest([*square_lattices(*how), fitted], tissue.cost)[0]


def choose_input(slide: Slide, settings: Settings, card: Card) -> tuple[LevelChoice, ChannelChoice]:
    """Choose the level and the channels of a slide by its metadata alone.

    Raises:
        SlideError: the slide has no such level or channel, or has channels that the model cannot take.
    """
    level = choose_level(slide, settings.level, settings.pixel_size, card.input.pixel_size_um)
    channels = choose_channels(slide, settings.channel, card.input.channels)
    if len(channels.indices) not in (1, card.input.count):
        counts = "1 channel" if card.input.count == 1 else f"1 or {card.input.count} channels"
        raise SlideError(
            slide.location,
            expected=f"an image of {counts} for the model {card.name}",
            found=f"{len(channels.indices)} ({channels.reason})",
            remedy="choose one with `channel`",
        )
    return level, channels


def input_pixels(slide: Slide, settings: Settings, card: Card) -> int:
    """Number of pixels of all planes of the level that the model is to see.

    Raises:
        SlideError: see `choose_input`.
    """
    level = choose_input(slide, settings, card)[0].level
    return math.prod(slide.plane_shape(level)) * slide.planes(level)


def open_reader(slide: Slide, settings: Settings, card: Card) -> SlideReader:
    """Open the level and the channels of a slide that the model is to see.

    Raises:
        SlideError: see `choose_input`.
        ReadError: the level cannot be opened.
    """
    level, channels = choose_input(slide, settings, card)
    return SlideReader(slide, level.level, channels.indices)


def _cells(slide: Slide, level: LevelChoice, settings: Settings) -> CellRule | None:
    """The rule by which nuclei are expanded into cells.

    Raises:
        SlideError: they would be expanded by less than a pixel.
    """
    if settings.expand is None:
        return None
    is_stated = settings.pixel_size is not None or slide.asked.pixel_size is not None
    aspect = 1.0 if is_stated else slide.pixel_aspect(level.level)
    rule = cell_rule(settings.expand, level.pixel_size_um, aspect)
    if rule.distance < min(1.0, rule.aspect):
        raise SlideError(
            slide.location,
            expected="`expand` of a pixel or more",
            found=f"{rule.distance:.2g} px of level {level.level}",
            remedy="use more, or a level of higher resolution: `level`",
        )
    return rule


def plan_slide(slide: Slide, paths: OutputPaths, settings: Settings, card: Card, bounds: Bounds) -> SlidePlan:
    """Settle level, channels, lattice and blocks of a slide.

    Args:
        slide: the image.
        paths: paths of its output.
        settings: settings of the run.
        card: card of the model.
        bounds: pixel values that normalisation maps to 0 and 1.

    Raises:
        SlideError: see `choose_input`; or nuclei would be expanded by less than a pixel.
        UsageError: tile and margin do not go together.
    """
    level, channels = choose_input(slide, settings, card)
    cells = _cells(slide, level, settings)
    if settings.stitch == "blend" and not pick_margin(settings, card):
        raise UsageError(
            "`stitch=blend`",
            expected="tiles that overlap",
            found="a margin of 0 px",
            remedy=f"use `margin={card.total_stride}` or more, or `stitch=crop`",
        )
    if settings.stitch == "blend" and card.decoder == "classes":
        raise UsageError(
            "`stitch=blend`",
            expected="a model of one foreground",
            found=f"the classes of {card.name}",
            remedy="use `stitch=crop`",
        )
    lattice = lay_lattice(slide.plane_shape(level.level), settings, card)
    planes = slide.planes(level.level)
    flat = flat_limit(bounds, card.input.normalisation) if settings.skips_background else 0.0
    decoder, instances, stars = DECODERS[card.decoder], None, None
    if settings.makes_ids and isinstance(decoder, GrowingDecoder):
        instances = decoder.instance_rule(card)
    elif settings.makes_ids:
        stars = StarRule(card.stardist, len(card.decoded) - 1, card.grid)
    return SlidePlan(
        slide=slide,
        paths=paths,
        level=level,
        channels=channels,
        grid=lay_blocks(lattice, settings.block_side(), planes, ring=settings.stitch == "blend"),
        bounds=bounds,
        threshold=settings.threshold if settings.threshold is not None else card.threshold,
        shape=(settings.batch, card.input.count, *lattice.tile),
        decoder=card.decoder,
        outputs=output_images(paths, settings, card),
        stitch=settings.stitch,
        flat=flat,
        instances=instances,
        stars=stars,
        output_grid=card.grid,
        objects=settings.objects,
        classes=class_rule(card) if settings.objects else None,
        notes=card.notes + (() if cells is None else cells.notes),
        cells=cells,
    )
