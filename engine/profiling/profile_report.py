"""Report a profile as JSON and as a chart."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cellseg_batch.engine.profiling.bottleneck import StageUse
from cellseg_batch.engine.stage_clock import Interval


@dataclass(frozen=True)
class Trial:
    """A remedy that was tried on a copy of the sample.

    Attributes:
        cause: cause of slow reading: chunks, codec, store or format.
        remedy: the change that was made, in words.
        predicted: predicted speed-up of the sample's run, from the speed of each stage alone.
        measured: measured speed-up.
    """

    cause: str
    remedy: str
    predicted: float
    measured: float

    @property
    def text(self) -> str:
        """The trial in words."""
        return f"{self.remedy} would help: {self.predicted:.2g}x predicted, {self.measured:.2g}x measured on a copy"


@dataclass(frozen=True)
class Profile:
    """Profile of a run of the sample, stage by stage.

    Attributes:
        slides: number of images in the sample.
        megapixels: Mpx of the sample.
        backend, precision, workers: backend, precision and blocks in flight of the run.
        mpx_per_s: rate of the run end to end, in Mpx/s.
        engine_mpx_per_s: rate of the model while it was busy, in Mpx/s.
        first_read_mpx_per_s: rate of the first read of the sample, alone, in Mpx/s; low if a cache was cold.
        memory_gb_per_s: GB/s that a thread copies, read and written bytes both counted.
        stages: stages that were busy, in the order in which they first ended.
        shares: stage -> share of a long run's time, the scheduler included.
        bottleneck: the stage that limits the run.
        verdict: a sentence on the bottleneck and its remedy.
        trial: trial of a remedy; None if none was tried.
        gpu: utilisation in % and energy in J; empty without a GPU.
        intervals: times at which each stage was busy.
    """

    slides: int
    megapixels: float
    backend: str
    precision: str
    workers: int
    mpx_per_s: float
    engine_mpx_per_s: float
    first_read_mpx_per_s: float
    memory_gb_per_s: float
    stages: list[StageUse]
    shares: dict[str, float]
    bottleneck: str
    verdict: str
    trial: Trial | None
    gpu: dict[str, float]
    intervals: list[Interval] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """The profile as plain JSON values, without the intervals."""
        content = asdict(self)
        content.pop("intervals")
        return content


def draw_profile(profile: Profile, file: Path) -> None:
    """Write a horizontal bar chart of each stage's occupancy as PNG, with its speed in the run and alone."""
    from matplotlib.figure import Figure

    names = [use.stage for use in profile.stages][::-1]
    figure = Figure(figsize=(8, 1 + 0.45 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(names, [100 * use.occupancy for use in profile.stages][::-1], color="#4878a8")
    axes.bar_label(bars, [_speed(use) for use in profile.stages][::-1], padding=4, fontsize=8)
    axes.set_xlim(0, 140)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("% of the time that the stage is busy")
    axes.set_title(
        f"{profile.bottleneck}-bound: {profile.mpx_per_s:.1f} Mpx/s end to end, {profile.engine_mpx_per_s:.1f} in the "
        f"model ({profile.backend} {profile.precision})",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)


def _speed(use: StageUse) -> str:
    alone = "" if use.share_of_alone is None else f", {use.share_of_alone:.0%} of alone"
    return f"{use.mpx_per_s:.3g} Mpx/s{alone}"
