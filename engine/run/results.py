"""Report a run, per slide and as a whole, as typed values and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from cellseg_batch.engine.slides.slide import Slide, UnreadableImage

_MEGA = 1e6


@dataclass(frozen=True)
class SlideReport:
    """The report of one image.

    Attributes:
        path: path of the image, as a user would type it.
        status: done, failed, skipped (finished by an earlier run) or held (another run is at work on it).
        reason: reason why it is not done; "" if it is.
        labels: path of the label group on disk; None if there is none.
        table: path of the table of objects; None if there is none.
        outputs: name of each output image, such as labels and probability -> its path; {} if there are none.
        shape: shape of the labels.
        level: resolution that was segmented.
        pixel_size_um: pixel size of that resolution in µm; None if it is unknown.
        blocks: number of blocks.
        tiles: number of tiles.
        skipped_tiles: number of flat tiles and tiles of glass, which are not computed.
        outside_tiles: number of tiles that are not computed because of the region.
        expansion_px: number of px by which nuclei were expanded into cells, along x; None without cells.
        region_area: number of px in the region, of a plane of the labels; None without a region.
        tissue_area: number of px that are not taken for glass, of a plane of the labels; None if no glass was left out.
        foreground_fraction: share of foreground pixels.
        classes: name of each class -> its share of the pixels; {} unless labels are classes, or objects have some.
        missing_pixels: number of NaN pixels in the input, taken as 0.
        objects: number of objects; None for a mask, which has none.
        unreached_pixels: number of foreground pixels that belong to no object, without a seed or too far from it.
        pixels: number of pixels that this run segmented.
        downscale: factor by which the image was downscaled for the model.
        channels: names of the segmented channels; indices as text for channels without a name.
        notes: remarks for the user on the image's metadata, then on its segmentation, such as on NaN pixels.
    """

    path: str
    status: str
    reason: str = ""
    labels: str | None = None
    table: str | None = None
    outputs: dict[str, str] = field(default_factory=dict)
    shape: tuple[int, ...] | None = None
    level: int | None = None
    pixel_size_um: float | None = None
    blocks: int = 0
    tiles: int = 0
    skipped_tiles: int = 0
    outside_tiles: int = 0
    expansion_px: float | None = None
    region_area: int | None = None
    tissue_area: int | None = None
    foreground_fraction: float | None = None
    classes: dict[str, float] = field(default_factory=dict)
    missing_pixels: int = 0
    objects: int | None = None
    unreached_pixels: int = 0
    pixels: int = 0
    downscale: int = 1
    channels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class EndedTask:
    """A task of a slide that is done or has failed.

    Attributes:
        slide: path of the slide, as a user would type it.
        pass_name: name of the pass over the slide, such as blocks.
        number: number of the task in its pass; in the pass blocks, that of the block.
        pixels: number of pixels of the slide that are done by it, as each pass counts for a share; 0 if it failed.
        reason: reason why it failed; "" if it is done.
    """

    slide: str
    pass_name: str
    number: int
    pixels: float
    reason: str = ""


@dataclass(frozen=True)
class PlateReport:
    """The report of a plate.

    Attributes:
        plate: path of the plate.
        folder: folder of its tables and pictures; None if they could not be made.
        wells: number of wells.
        fields: number of fields.
        failed: number of failed fields.
        reason: reason why there is no summary; "" if there is one.
    """

    plate: str
    folder: str | None
    wells: int
    fields: int
    failed: int
    reason: str = ""


@dataclass(frozen=True)
class RunReport:
    """The report of a run.

    Attributes:
        seconds: seconds from the command's start to the last journal entry, without `compile_seconds`.
        compile_seconds: seconds in which the model was chosen, compiled and warmed up.
        backend: backend that computed the largest slide; "" if nothing was computed.
        precision: its precision; "" if nothing was computed.
        short_race: whether it is the likely fastest, and not all were raced.
        tile: (height, width) of a tile in px of the largest slide; None without a slide to work on.
        margin: margin in px of the largest slide.
        batch: number of tiles per call of the model.
        block: (height, width) of a block in px of the largest slide; None without a slide to work on.
        workers: number of blocks in flight, or of worker processes.
        peak_rss_bytes: largest resident memory of a process, in bytes: the largest of the workers and the coordinator.
        planned_peak_bytes: host memory that was announced as the most that a process of the run would need, in bytes.
        stages: busy seconds of each stage, over all threads.
        slides: one entry per image.
        plates: one entry per plate, if objects were measured.
        starting_seconds: part of ``seconds`` before the search for images: importing libraries.
        images: the images themselves, in the order of ``slides``.
    """

    seconds: float
    compile_seconds: float
    backend: str
    precision: str
    short_race: bool
    tile: tuple[int, int] | None
    margin: int
    batch: int
    block: tuple[int, int] | None
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
        """``failed``, else ``held`` or ``done``, if any image is; ``skipped`` if earlier runs finished all of them."""
        states = {slide.status for slide in self.slides}
        return next((state for state in ("failed", "held", "done") if state in states), "skipped")

    @property
    def mpx_per_s(self) -> float:
        """Speed of the whole run in Mpx/s: segmented pixels per second of the run."""
        return self._pixels / _MEGA / self.seconds if self.seconds else 0.0

    @property
    def engine_mpx_per_s(self) -> float:
        """Speed of the model alone in Mpx/s: segmented pixels per busy second of the model."""
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
