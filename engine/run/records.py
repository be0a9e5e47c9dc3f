"""Define the records that a run keeps on disk: a slide's manifest, a record of each finished task, the closing record.

Fields that decide pixels have no default; they are compared before a run continues the output of an earlier run.
Figures have defaults, so a figure that is added later breaks no finished slide.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Any, ClassVar, Generic, TypeVar

from msgspec import Meta

from cellseg_batch.engine.geometry import BlockGrid, Lattice
from cellseg_batch.engine.inference.normalise import Bounds
from cellseg_batch.engine.objects.cells import CellRule
from cellseg_batch.engine.objects.classes import ClassRule
from cellseg_batch.engine.objects.seeds import InstanceRule, SeedRecord
from cellseg_batch.engine.objects.stars import StarRule
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.slides.slide import fits_axes
from cellseg_batch.engine.storage.checksums import WrittenBox
from cellseg_batch.engine.storage.records import Count, Positive
from cellseg_batch.kernels.quality import Quality

Result = TypeVar("Result")

# Names of passes; those of the pyramid are levels/1, levels/2 and so on.
BLOCKS, MERGE, INSTANCES, TABLE, LEVELS = "blocks", "merge", "instances", "table", "levels"
CENTROIDS, KEPT = "centroids", "kept"
# Rough times of passes, for the progress that the user sees; nothing else depends on them.
_WEIGHTS, _SHORT = {BLOCKS: 100.0, CENTROIDS: 12.0, INSTANCES: 12.0}, 2.0
# Field of a decision -> the settings that it follows from; other fields have the name of theirs, or follow from none.
_SETTING_OF = {
    "channels": ("channel",),
    "core": ("tile",),
    "flat": ("skip_background",),
    "outputs": ("probability", "tissue", "expand"),
    "region": ("mask",),
    "mask_sha256": ("mask",),
    "tissue_tiles": ("skip_background",),
    "cells": ("expand",),
    "distance": ("expand",),
}


@dataclass(frozen=True)
class InputPixels:
    """The pixels of the image that are segmented.

    Attributes:
        dtype: numpy name of their type.
        axes: axes of the array.
        level: resolution; 0 is full.
        shape: shape of that level, along ``axes``.
        channels: indices of the channels.
        pixel_size: µm per px of that level, by which objects are measured; None if it is unknown.
    """

    dtype: str
    axes: str
    level: Count
    shape: tuple[Positive, ...]
    channels: tuple[Count, ...]
    pixel_size: float | None

    def __post_init__(self) -> None:
        """Refuse axes that do not belong to the shape.

        Raises:
            ValueError: they do not.
        """
        if not fits_axes(self.axes, len(self.shape)):
            raise ValueError(f"axes {self.axes} of shape {self.shape}")

    @property
    def plane_shape(self) -> tuple[int, int]:
        """(height, width) in px."""
        return self.shape[self.axes.index("y")], self.shape[self.axes.index("x")]

    @property
    def planes(self) -> int:
        """Number of t/z planes."""
        return math.prod(length for axis, length in zip(self.axes, self.shape, strict=True) if axis in "tz")


@dataclass(frozen=True)
class ModelIdentity:
    """The model that computes the logits.

    Attributes:
        name: name in the model's card.
        sha256: hash of the bundle.
    """

    name: str
    sha256: str


@dataclass(frozen=True)
class BackendIdentity:
    """The library that computes the logits.

    Attributes:
        name: name of the backend.
        precision: precision of the backend.
        version: version of the library.
    """

    name: str
    precision: str
    version: str


@dataclass(frozen=True)
class TileLattice:
    """The lattice of tiles.

    Attributes:
        core: (height, width) of a core in px.
        margin: margin in px.
    """

    core: tuple[Positive, Positive]
    margin: Count


@dataclass(frozen=True)
class RegionIdentity:
    """The region to which a slide is confined.

    Attributes:
        mask_sha256: hash of the outlines or labels, wherever they are stored.
        mask_class: name of the class whose outlines are taken; None for all.
        area: number of px inside, of a plane of the processed level.
        reach: px around it that are computed, so that objects are whole.
    """

    mask_sha256: str
    mask_class: str | None
    area: Positive
    reach: Count


@dataclass(frozen=True)
class TissueTiles:
    """The tiles of a slide on glass that are computed.

    Attributes:
        level: level from which tissue was told from glass.
        area: number of px that are not taken for glass, of a plane of the processed level.
        tiles: a bit for each tile of a plane in raster order (`numpy.packbits`); base64 in the file.
    """

    level: Count
    area: Count
    tiles: bytes


@dataclass(frozen=True)
class Decisions:
    """All decisions that determine the pixels of an output.

    Attributes:
        input: the pixels that are read.
        model: the model that computes the logits.
        backend: the library that computes them.
        downscale: factor by which the image is downscaled for the model.
        normalisation: pixel values that become 0 and 1.
        lattice: lattice of the tiles.
        stitch: crop or blend.
        flat: difference of pixel values below which a tile is background; 0 computes all tiles.
        threshold: probability above which a pixel is foreground.
        decoder: name of the decoder by which logits become masks and instances.
        outputs: names of the images that are written.
        instances: numbers by which logits become instances by growth; None for a mask, or if they are stars.
        stars: numbers by which logits become stars; None for a mask, or if instances grow.
        objects: whether the instances are measured.
        classes: class map by which the measured instances get classes; None for none.
        region: region to which the output is confined; None for the whole slide.
        tissue_tiles: the tiles that are computed of a slide on glass; None if glass is not looked for, or not found.
        cells: rule by which the instances are expanded into cells; None for no cells.
    """

    input: InputPixels
    model: ModelIdentity
    backend: BackendIdentity
    downscale: Positive
    normalisation: Bounds
    lattice: TileLattice
    stitch: str
    flat: float
    threshold: float
    decoder: str
    outputs: tuple[str, ...]
    instances: InstanceRule | None
    stars: StarRule | None
    objects: bool
    classes: ClassRule | None
    region: RegionIdentity | None
    tissue_tiles: TissueTiles | None
    cells: CellRule | None

    def changes(self, now: Decisions) -> list[str]:
        """The differences between these decisions and ``now``, one phrase each; settings are in backticks."""
        return list(_changes(self, now))


@dataclass(frozen=True)
class Manifest:
    """The plan of a slide, as settled before its first block.

    Attributes:
        decisions: decisions that determine the pixels.
        blocks: number of cores of a block along y and x; a later run that continues takes them over.
        passes: name of each pass -> number of its tasks, in order.
        images: path of each output image in its store -> its folder, relative to the journal's.
        location: path of the input image, as a user would type it.
        mask: path of the region; "" if there is none.
        software: versions of packages that decide no pixel.
        input_files: hash of sizes and times of some files of the input (`files_state`), before a block was read.
    """

    STRICT: ClassVar[tuple[str, ...]] = ("decisions",)

    decisions: Decisions
    blocks: tuple[Positive, Positive]
    passes: dict[str, Positive]
    images: Annotated[dict[str, str], Meta(min_length=1)]
    location: str = ""
    mask: str = ""
    software: dict[str, str] = field(default_factory=dict)
    input_files: str = ""

    def __post_init__(self) -> None:
        """Refuse passes that do not belong to the blocks.

        Raises:
            ValueError: they do not.
        """
        if self.passes.get(BLOCKS) != len(self.grid):
            raise ValueError(f"{self.passes.get(BLOCKS, 'no')} tasks of {BLOCKS} for {len(self.grid)} blocks")

    @property
    def grid(self) -> BlockGrid:
        """The blocks of the slide; those of a blended one read further than these."""
        pixels, lattice = self.decisions.input, self.decisions.lattice
        return BlockGrid(Lattice(pixels.plane_shape, lattice.core, lattice.margin), self.blocks, pixels.planes)


@dataclass(frozen=True)
class TaskRecord(Generic[Result]):
    """A finished task of a pass.

    Attributes:
        written: boxes of pixels that it put on disk.
        result: its result, for later passes and the closing record.
        seconds: busy seconds of each stage.
    """

    written: tuple[WrittenBox, ...]
    result: Result
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class BlockRecord:
    """A segmented block.

    Attributes:
        seeds: its seeds, for the merge; None where nothing grows.
        foreground: number of foreground pixels.
        missing: number of NaN pixels in the input, taken as 0.
        skipped_tiles: number of flat tiles and tiles of glass, which are not computed.
        infinite: number of pixels in the input that are infinite in float32.
        input_pixels: checksum of some rows of the input (`pixels_state`); None for a block that was not read.
        classes: number of pixels of each class; () for labels that are none.
        outside_tiles: number of tiles that are not computed because of the region.
    """

    seeds: SeedRecord | None
    foreground: Count = 0
    missing: Count = 0
    skipped_tiles: Count = 0
    infinite: Count = 0
    input_pixels: Count | None = 0
    classes: tuple[Count, ...] = ()
    outside_tiles: Count = 0


@dataclass(frozen=True)
class MergeRecord:
    """The merged seeds or stars of all blocks.

    Attributes:
        objects: number of objects of the slide.
        cut_rays: number of stars among them with a ray that was cut to the longest one allowed.
    """

    objects: Count
    cut_rays: Count = 0


@dataclass(frozen=True)
class CentroidRecord:
    """The sums of a block's objects that make their centroids, which are in the scratch."""


@dataclass(frozen=True)
class KeptRecord:
    """The objects whose centroids lie in the region.

    Attributes:
        objects: number of these objects.
        cut: number of objects, kept or not, of which parts far from the region were not computed.
    """

    objects: Count
    cut: Count = 0


@dataclass(frozen=True)
class GrowthRecord:
    """The final labels of a block.

    Attributes:
        labelled: number of pixels that belong to an object.
        quality: quality of each measured channel; () if objects are not measured.
        classes: number of these pixels that are of each class; () if objects get no classes.
        in_cells: number of pixels that belong to a cell; 0 if there are none.
    """

    labelled: Count
    quality: tuple[Quality, ...] = ()
    classes: tuple[Count, ...] = ()
    in_cells: Count = 0


@dataclass(frozen=True)
class TableRecord:
    """The table of objects.

    Attributes:
        objects: number of its rows.
    """

    objects: Count


@dataclass(frozen=True)
class LevelRecord:
    """A shard of a level of the pyramid."""


# Part of the journal, up to its first slash -> type of its records.
_RECORDS: dict[str, Any] = {
    BLOCKS: TaskRecord[BlockRecord],
    MERGE: TaskRecord[MergeRecord],
    CENTROIDS: TaskRecord[CentroidRecord],
    KEPT: TaskRecord[KeptRecord],
    INSTANCES: TaskRecord[GrowthRecord],
    TABLE: TaskRecord[TableRecord],
    LEVELS: TaskRecord[LevelRecord],
}


def record_of(part: str) -> type[TaskRecord[Any]]:
    """Type of the records of a pass, by the name that a manifest has for the pass."""
    kind: type[TaskRecord[Any]] = _RECORDS.get(part.partition("/")[0], TaskRecord[Any])
    return kind


@dataclass(frozen=True)
class ClassRecord:
    """A class of a slide's foreground.

    Attributes:
        name: its name.
        colour: its colour, ``#rrggbb``.
        pixels: number of pixels that are of it.
    """

    name: str
    colour: str
    pixels: Count


@dataclass(frozen=True)
class FinishedRecord:
    """The figures of a finished slide.

    Attributes:
        foreground: number of foreground pixels.
        missing: number of NaN pixels in the input, taken as 0.
        skipped_tiles: number of flat tiles and tiles of glass, which are not computed.
        objects: number of objects; None for a mask.
        unreached: number of foreground pixels that belong to no object.
        infinite: number of pixels in the input that are infinite in float32.
        cut_rays: number of objects with a ray that was cut to the longest one allowed.
        classes: the classes of labels that are classes, or of measured objects; () if there are none.
        outside_tiles: number of tiles that are not computed because of the region.
        cut_objects: number of objects of which parts far from the region were not computed.
    """

    foreground: Count = 0
    missing: Count = 0
    skipped_tiles: Count = 0
    objects: Count | None = None
    unreached: Count = 0
    infinite: Count = 0
    cut_rays: Count = 0
    classes: tuple[ClassRecord, ...] = ()
    outside_tiles: Count = 0
    cut_objects: Count = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks for the user on pixel values and rays that were not taken as they are."""
        counts = {
            "NaN pixels taken as 0": self.missing,
            "infinite pixels, or beyond 3.4e38": self.infinite,
            "objects with rays cut to the longest that the model's card allows": self.cut_rays,
            "objects too large to be computed whole around the region; their part there says whether they are in it": (
                self.cut_objects
            ),
        }
        return tuple(f"{count} {pixels}" for pixels, count in counts.items() if count)


def shares_of(passes: Iterable[str]) -> dict[str, float]:
    """Name of each of a slide's passes -> its rough share of the slide's time; 1 in all."""
    weights = {name: _WEIGHTS.get(name, _SHORT) for name in passes}
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def _changes(before: Any, now: Any, *path: str) -> Iterator[str]:
    """Describe the differences between two values, dataclasses field by field; ``path`` leads to the values."""
    if is_dataclass(before) and type(before) is type(now):
        for item in fields(before):
            yield from _changes(getattr(before, item.name), getattr(now, item.name), *path, item.name)
    elif before != now:
        words = _short if path[-1].endswith("sha256") else _words
        yield f"{_subject(path)} was {words(before)}, now {words(now)}"


def _subject(path: tuple[str, ...]) -> str:
    """The setting that is a decision, in backticks, or the names that lead to the decision, with its settings."""
    name = path[-2] if path[-1] == "name" else path[-1]
    if hasattr(Settings, name):
        return f"`{name}`"
    settings = " or ".join(f"`{setting}`" for setting in _SETTING_OF.get(name, ()))
    return " ".join(path) + (f" ({settings})" if settings else "")


def _short(sha256: str) -> str:
    """The first digits of a hash, which tell two apart in a message."""
    return f"{sha256[:12]}..."


def _words(value: Any) -> str:
    """The text of a decision in a message; what may be left out, such as instances, is on or off."""
    if value is None or value is False:
        return "off"
    if value is True or is_dataclass(value):
        return "on"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
