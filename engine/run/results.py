"""What a run did: per slide and as a whole, as values and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from cellseg_batch.engine.slides.slide import Slide, UnreadableImage

_MEGA = 1e6


@dataclass(frozen=True)
class SlideReport:
    """What became of one image.

    Attributes:
        path: the image, as a user would type it.
        status: done, failed, skipped (was finished before) or held (another run is at work on it).
        reason: why it is not done.
        labels: path of the label group on disk.
        table: path of the table of objects; None if there is none.
        shape: of the labels.
        level: which resolution was segmented.
        pixel_size_um: its pixel size, None when unknown.
        blocks: number of blocks.
        tiles: number of tiles.
        skipped_tiles: those that showed nothing and were not computed.
        foreground_fraction: share of foreground pixels.
        missing_pixels: NaN in the input, taken as 0.
        objects: number of objects; None for a mask, which has none.
        unreached_pixels: foreground that belongs to no object: without a seed, or too far from it.
        pixels: pixels that were segmented by this run.
        downscale: by how much the image was downscaled for the model.
        channels: names of those that were segmented; indices as text where they have none.
        notes: what a user should know of an image that is done, such as pixels that are no numbers.
    """

    path: str
    status: str
    reason: str = ""
    labels: str | None = None
    table: str | None = None
    shape: tuple[int, ...] | None = None
    level: int | None = None
    pixel_size_um: float | None = None
    blocks: int = 0
    tiles: int = 0
    skipped_tiles: int = 0
    foreground_fraction: float | None = None
    missing_pixels: int = 0
    objects: int | None = None
    unreached_pixels: int = 0
    pixels: int = 0
    downscale: int = 1
    channels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlateReport:
    """What became of a plate.

    Attributes:
        plate: where it lies.
        folder: of its tables and pictures, None where they could not be made.
        wells, fields, failed: how many there are, and how many fields of them failed.
        reason: why there is no summary.
    """

    plate: str
    folder: str | None
    wells: int
    fields: int
    failed: int
    reason: str = ""


@dataclass(frozen=True)
class RunReport:
    """What a run did.

    Attributes:
        seconds: from the command's start to the last journal entry, without `compile_seconds`.
        compile_seconds: choosing, compiling and warming up the model.
        backend, precision, tile, margin, batch, block, workers: what was used; the largest where slides differ.
        peak_rss_bytes: largest resident memory of the process.
        planned_peak_bytes: what was announced before the first block.
        stages: busy seconds of each stage, over all threads.
        slides: one entry per image.
        plates: one entry per plate, if objects were measured.
        starting_seconds: of all seconds, those before images were looked for: importing libraries.
        images: the images themselves, in the order of ``slides``.
    """

    seconds: float
    compile_seconds: float
    backend: str
    precision: str
    tile: tuple[int, int]
    margin: int
    batch: int
    block: tuple[int, int]
    workers: int
    peak_rss_bytes: int
    planned_peak_bytes: int
    stages: dict[str, float]
    slides: list[SlideReport] = field(default_factory=list)
    plates: list[PlateReport] = field(default_factory=list)
    starting_seconds: float = 0.0
    images: tuple[Slide | UnreadableImage, ...] = field(default=(), repr=False)

    @property
    def status(self) -> str:
        """``failed`` or ``held`` if any image is, in this order; ``skipped`` if all were done before; else ``done``."""
        states = {slide.status for slide in self.slides}
        return next((state for state in ("failed", "held", "done") if state in states), "skipped")

    @property
    def mpx_per_s(self) -> float:
        """Pixels of the slides per second of the whole run, in Mpx/s."""
        return self._pixels / _MEGA / self.seconds if self.seconds else 0.0

    @property
    def engine_mpx_per_s(self) -> float:
        """Pixels of the slides per busy second of the model alone, in Mpx/s."""
        busy = self.stages.get("model", 0.0)
        return self._pixels / _MEGA / busy if busy else 0.0

    @property
    def _pixels(self) -> int:
        return sum(slide.pixels for slide in self.slides)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        content = asdict(replace(self, images=()))
        del content["images"]
        slides = content.pop("slides")
        rates = {"mpx_per_s": self.mpx_per_s, "engine_mpx_per_s": self.engine_mpx_per_s}
        return {"status": self.status, **rates, **content, "slides": slides}
