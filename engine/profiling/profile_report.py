"""What a profile found: as JSON and as a chart."""

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
        cause: what makes the slide read slowly: chunks, codec, store or format.
        remedy: what was changed.
        predicted: by how much the sample would run faster, from the speed of each stage alone.
        measured: by how much it did.
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
    """A sample's run, stage by stage.

    Attributes:
        slides: images in the sample.
        megapixels: of them.
        backend, precision, workers: of the run.
        mpx_per_s: end to end, in Mpx/s.
        engine_mpx_per_s: of the model alone while it was busy.
        first_read_mpx_per_s: reading as the sample was found, with nothing else going on; low where a cache was cold.
        memory_gb_per_s: that one thread copies, bytes read and written.
        stages: that did anything, in the order in which they first ended.
        shares: of a long run's time, by stage, and the scheduler's.
        bottleneck: the stage that limits the run.
        verdict: one sentence.
        trial: of what should help, where it can be tried.
        gpu: utilisation in % and energy in J; empty without a GPU.
        intervals: when each stage was busy.
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
    """Write a horizontal bar chart of the stages' occupancy as PNG, with their speed and that alone."""
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
    alone = "" if use.of_ceiling is None else f", {use.of_ceiling:.0%} of alone"
    return f"{use.mpx_per_s:.3g} Mpx/s{alone}"
