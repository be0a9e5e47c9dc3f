"""What a run keeps of a slide on disk: the manifest, a record for each finished task, the closing record.

Fields that decide pixels have no default and are compared before a run goes on with what an earlier one has begun.
Figures have defaults, so one that is added later breaks no slide that was finished before.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Generic, TypeVar

from cellseg_batch.engine.inference.normalise import Bounds
from cellseg_batch.engine.objects.seeds import InstanceRule, SeedRecord
from cellseg_batch.engine.storage.checksums import WrittenBox
from cellseg_batch.kernels.quality import Quality

Result = TypeVar("Result")

# Names of passes whose records others read.
BLOCKS, MERGE, INSTANCES = "blocks", "merge", "instances"


@dataclass(frozen=True)
class InputPixels:
    """Which pixels of the image are segmented.

    Attributes:
        dtype: numpy name of their type.
        axes: of the array.
        level: resolution, 0 is full.
        shape: of that level, along ``axes``.
        channels: indices of the channels.
    """

    dtype: str
    axes: str
    level: int
    shape: tuple[int, ...]
    channels: tuple[int, ...]


@dataclass(frozen=True)
class ModelIdentity:
    """Which weights.

    Attributes:
        name: of the card.
        sha256: of the bundle.
    """

    name: str
    sha256: str


@dataclass(frozen=True)
class BackendIdentity:
    """Which library computes the logits.

    Attributes:
        name, precision: of the backend.
        version: of the library.
    """

    name: str
    precision: str
    version: str


@dataclass(frozen=True)
class TileLattice:
    """Where tiles lie.

    Attributes:
        core: (height, width) in px.
        margin: in px.
    """

    core: tuple[int, int]
    margin: int


@dataclass(frozen=True)
class Decisions:
    """Everything that decides the pixels of an output.

    Attributes:
        input: the pixels that are read.
        model, backend: what computes them.
        downscale: by how much the image is reduced for the model.
        normalisation: pixel values that become 0 and 1.
        lattice: of the tiles.
        stitch: crop or blend.
        flat: difference of pixel values below which a tile is background; 0 computes all tiles.
        threshold: probability above which a pixel is foreground.
        probability: the probability is written too.
        instances: how logits become instances; None for a mask.
        objects: the instances are measured.
    """

    input: InputPixels
    model: ModelIdentity
    backend: BackendIdentity
    downscale: int
    normalisation: Bounds
    lattice: TileLattice
    stitch: str
    flat: float
    threshold: float
    probability: bool
    instances: InstanceRule | None
    objects: bool

    def changes(self, now: Decisions) -> list[str]:
        """What differs in ``now``, a phrase for each field."""
        pairs = ((item.name, getattr(self, item.name), getattr(now, item.name)) for item in fields(self))
        return [f"{name} was {_brief(before)}, now {_brief(after)}" for name, before, after in pairs if before != after]


@dataclass(frozen=True)
class Manifest:
    """What was settled before the first block of a slide.

    Attributes:
        decisions: what decides the pixels.
        blocks: cores of a block along y and x; a run that goes on takes them over.
        passes: name of each pass -> number of its tasks, in order.
        images: path of each output image in its store -> its folder, seen from the journal's.
        location: of the image, as a user would type it.
        software: versions of packages that decide no pixel.
    """

    STRICT: ClassVar[tuple[str, ...]] = ("decisions",)

    decisions: Decisions
    blocks: tuple[int, int]
    passes: dict[str, int]
    images: dict[str, str]
    location: str = ""
    software: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Created:
    """Outputs and scratch have been made, empty."""


@dataclass(frozen=True)
class TaskRecord(Generic[Result]):
    """A finished task of a pass.

    Attributes:
        written: what it put on disk.
        result: what later passes and the closing record need of it.
        seconds: busy seconds of each stage.
    """

    written: tuple[WrittenBox, ...]
    result: Result
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class BlockRecord:
    """A segmented block.

    Attributes:
        seeds: its seeds, for the merge; None for a mask.
        foreground: foreground pixels.
        missing: NaN in the input, taken as 0.
        skipped_tiles: tiles that showed nothing and were not computed.
    """

    seeds: SeedRecord | None
    foreground: int = 0
    missing: int = 0
    skipped_tiles: int = 0


@dataclass(frozen=True)
class MergeRecord:
    """The merged seeds of all blocks.

    Attributes:
        objects: number of objects of the slide.
    """

    objects: int


@dataclass(frozen=True)
class GrowthRecord:
    """The final labels of a block.

    Attributes:
        labelled: pixels that belong to an object.
        quality: of each measured channel; () if objects are not measured.
    """

    labelled: int
    quality: tuple[Quality, ...] = ()


@dataclass(frozen=True)
class TableRecord:
    """The table of objects.

    Attributes:
        objects: number of its rows.
    """

    objects: int


@dataclass(frozen=True)
class LevelRecord:
    """A shard of a level of the pyramid."""


@dataclass(frozen=True)
class FinishedRecord:
    """The figures of a finished slide.

    Attributes:
        foreground: foreground pixels.
        missing: NaN in the input, taken as 0.
        skipped_tiles: tiles that showed nothing and were not computed.
        objects: number of objects; None for a mask.
        unreached: foreground pixels that belong to no object.
    """

    foreground: int = 0
    missing: int = 0
    skipped_tiles: int = 0
    objects: int | None = None
    unreached: int = 0


def _brief(value: Any) -> str:
    """A field of `Decisions` for a message."""
    if is_dataclass(value):
        return ", ".join(f"{item.name} {str(getattr(value, item.name))[:60]}" for item in fields(value))
    return str(value)
