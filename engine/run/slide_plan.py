"""Everything about one slide that is settled before its first block, and the manifest that keeps it.

A resumed run must make the same plan or is refused with the reason, so that another machine, another model or
other settings cannot change a half-finished output.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from typing import Any

from cellseg_batch.engine.errors import OutputError, SlideError, UsageError
from cellseg_batch.engine.geometry import BlockGrid, fit_lattice, lay_blocks
from cellseg_batch.engine.inference.backends.protocol import Backend, Shape
from cellseg_batch.engine.inference.background import flat_limit
from cellseg_batch.engine.inference.normalise import Bounds, sample_slide, settle_bounds
from cellseg_batch.engine.objects.seeds import InstanceRule, instance_rule
from cellseg_batch.engine.run.output_paths import Place
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.slides.level_and_channels import ChannelChoice, LevelChoice, choose_channels, choose_level
from cellseg_batch.engine.slides.slide import Slide
from cellseg_batch.kernels.instances import reach
from cellseg_batch.kernels.moments import HALO
from cellseg_batch.trainer.bundle import Bundle, Card

# Fields of a manifest that a later run need not repeat: blocks and bounds are taken over from it, a store may be
# moved, and libraries other than the backend's do not decide a pixel.
_FREE = ("location", "blocks", "normalisation", "software")


@dataclass(frozen=True)
class SlidePlan:
    """How one slide is processed.

    Attributes:
        slide: the image.
        place: where its output goes.
        level: which resolution, and why.
        channels: which channels, and why.
        grid: the blocks, and through them the lattice of tiles.
        bounds: of the normalisation.
        threshold: probability above which a pixel is foreground.
        shape: (N, C, T_y, T_x) of every batch.
        probability: also write the probability.
        downscale: by how much the image is downscaled for the model.
        stitch: crop or blend.
        flat: difference of pixel values below which a tile is background and not computed; 0 computes all.
        instances: how logits become instances; None for a mask.
        objects: measure the instances.
    """

    slide: Slide
    place: Place
    level: LevelChoice
    channels: ChannelChoice
    grid: BlockGrid
    bounds: Bounds
    threshold: float
    shape: Shape
    probability: bool
    downscale: int = 1
    stitch: str = "crop"
    flat: float = 0.0
    instances: InstanceRule | None = None
    objects: bool = False

    @property
    def pixels(self) -> int:
        """Pixels of all planes."""
        height, width = self.grid.lattice.shape
        return height * width * self.grid.planes

    @property
    def frame(self) -> int | None:
        """px around a block that instances need; None for a mask."""
        return None if self.instances is None else reach(self.instances.steps) + HALO * self.objects

    @property
    def needs_probability(self) -> bool:
        """Whether blocks are to come with the probability: it is written, or objects are measured in it."""
        return self.probability or self.objects

    @property
    def tiles(self) -> int:
        """Tiles of all planes."""
        rows, columns = self.grid.lattice.grid
        return rows * columns * self.grid.planes

    def manifest(self, bundle: Bundle, backend: Backend) -> dict[str, Any]:
        """What decides the output, as plain JSON values."""
        slide, lattice = self.slide, self.grid.lattice
        return {
            "location": slide.location,
            "slide": {
                "dtype": slide.dtype,
                "axes": slide.axes,
                "level": self.level.level,
                "shape": list(slide.levels[self.level.level].shape),
                "channels": list(self.channels.indices),
            },
            "model": {"name": bundle.card.name, "sha256": bundle.sha256},
            "backend": {"name": backend.name, "precision": backend.precision, "version": backend.version},
            "downscale": self.downscale,
            "stitch": self.stitch,
            "flat": self.flat,
            "lattice": {"core": list(lattice.core), "margin": lattice.margin},
            "normalisation": asdict(self.bounds),
            "threshold": self.threshold,
            "probability": self.probability,
            "instances": None if self.instances is None else self.instances.manifest(),
            "objects": self.objects,
            "blocks": list(self.grid.cores),
            "software": _software(),
        }


@dataclass(frozen=True)
class SlideJob:
    """All that any worker process needs to know to work on a slide; small, and no pixels.

    Attributes:
        plan: how the slide is processed.
        backend: name, precision and version of the library that computes it.
        block_bytes: host memory that one block holds at most.
        room_bytes: host memory that all blocks in flight of one process may hold; None is no limit.
        workers: blocks in flight in one process.
        peak_bytes: host memory that the process will need at most.
        done: pixels that are on disk already.
    """

    plan: SlidePlan
    backend: tuple[str, str, str]
    block_bytes: int
    room_bytes: int | None
    workers: int
    peak_bytes: int
    done: int


def pick_margin(settings: Settings, card: Card) -> int:
    """The margin in px: the one asked for, the network's own reach for ``exact``, else the card's."""
    if settings.margin is None:
        return card.margin
    return card.exact_margin if settings.margin == "exact" else int(settings.margin)


def plan_slide(
    slide: Slide, place: Place, settings: Settings, card: Card, begun: dict[str, Any] | None = None
) -> SlidePlan:
    """Settle level, channels, lattice, blocks and normalisation of a slide.

    Args:
        slide: the image.
        place: where its output goes.
        settings: what was asked for.
        card: of the model.
        begun: manifest of an unfinished run of this slide, whose normalisation is kept.

    Raises:
        SlideError: the slide has no such level or channel, or the model does not take it, or it cannot be read.
        UsageError: tile and margin do not go together.
    """
    level = choose_level(slide, settings.level, settings.pixel_size, card.pixel_size_um)
    channels = choose_channels(slide, settings.channel)
    if len(channels.indices) not in (1, card.channels):
        raise SlideError(
            slide.location,
            expected=f"an image of 1 or {card.channels} channels for the model {card.name}",
            found=f"{len(channels.indices)} ({channels.reason})",
            remedy="choose one with --channel",
        )
    unknown = begun is None and card.normalisation.rule != "fixed"
    sample = sample_slide(slide, channels.indices, level.level) if unknown else []
    bounds = settle_bounds(sample, card.normalisation) if begun is None else Bounds(**begun["normalisation"])
    margin = pick_margin(settings, card)
    if settings.stitch == "blend" and not margin:
        raise UsageError(
            "--stitch blend",
            expected="tiles that overlap",
            found="a margin of 0 px",
            remedy=f"use --margin {card.total_stride} or more, or --stitch crop",
        )
    lattice = fit_lattice(slide.plane_shape(level.level), settings.tile, margin, card.total_stride)
    # To be blended, a tile needs the logits of its neighbours.
    skips = settings.skip_background == "auto" and settings.stitch == "crop"
    flat = flat_limit(bounds, card.normalisation) if skips else 0.0
    return SlidePlan(
        slide=slide,
        place=place,
        level=level,
        channels=channels,
        grid=lay_blocks(lattice, settings.block, slide.planes(level.level), ring=settings.stitch == "blend"),
        bounds=bounds,
        threshold=settings.threshold if settings.threshold is not None else card.threshold,
        shape=(settings.batch, card.channels, *lattice.tile),
        probability=settings.probability,
        stitch=settings.stitch,
        flat=flat,
        instances=instance_rule(card) if settings.instances or settings.objects else None,
        objects=settings.objects,
    )


def adopt_manifest(plan: SlidePlan, started: dict[str, Any], manifest: dict[str, Any], finished: bool) -> SlidePlan:
    """The plan of a run that goes on with what ``started`` has begun: the same pixels, its blocks.

    Args:
        plan: of this run.
        started: manifest of the earlier run.
        manifest: of this run.
        finished: nothing is left to compute, so the backend's version does not matter.

    Raises:
        OutputError: the two would not give the same pixels.
    """
    if finished:
        manifest = {**manifest, "backend": {**manifest["backend"], "version": started["backend"]["version"]}}
    changed = [
        f"{field} was {_brief(started.get(field))}, now {_brief(value)}"
        for field, value in manifest.items()
        if field not in _FREE and started.get(field) != value
    ]
    if changed:
        raise OutputError(
            str(plan.place.labels_folder),
            expected="the settings that these labels were begun with",
            found="; ".join(changed),
            remedy="use the same settings, another --name, or --overwrite to begin anew",
        )
    rows, columns = started["blocks"]
    return replace(plan, grid=replace(plan.grid, cores=(rows, columns)))


@cache
def _software() -> dict[str, str]:
    return {name: version(name) for name in ("cellseg-batch", "zarr", "numpy")}


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {str(item)[:60]}" for key, item in value.items())
    return str(value)
