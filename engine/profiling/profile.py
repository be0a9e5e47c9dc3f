"""Profile a slide: run a sample, measure each stage alone, name the bottleneck, and try a remedy."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from cellseg_batch.engine.errors import SlideError, UsageError
from cellseg_batch.engine.inference.model_pool import ModelPool
from cellseg_batch.engine.models import load_model
from cellseg_batch.engine.profiling.bottleneck import StageUse, describe_bottleneck, find_bottleneck
from cellseg_batch.engine.profiling.gpu_meter import GpuMeter
from cellseg_batch.engine.profiling.isolated_stages import (
    Alone,
    first_read,
    measure_alone,
    memory_bandwidth,
    opened_alone,
)
from cellseg_batch.engine.profiling.profile_report import Profile, Trial
from cellseg_batch.engine.profiling.read_experiment import ReadRemedy, copy_slide, find_read_remedy
from cellseg_batch.engine.profiling.sample import take_sample
from cellseg_batch.engine.profiling.timeline import busy_seconds, occupied, predict_seconds, shares, wall_seconds
from cellseg_batch.engine.run.campaign import Observer, run_images
from cellseg_batch.engine.run.open_slide import OpenSlide
from cellseg_batch.engine.run.results import RunReport
from cellseg_batch.engine.run.slide_plan import input_pixels
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.slides.slide import Slide
from cellseg_batch.engine.stage_clock import Interval, StageClock
from cellseg_batch.engine.storage.paths import RemotePath


@dataclass(frozen=True)
class _Sampled:
    """Report and intervals of a run of the sample."""

    report: RunReport
    intervals: list[Interval]

    @property
    def seconds(self) -> float:
        return wall_seconds(self.intervals)

    @property
    def pixels(self) -> int:
        return sum(slide.pixels for slide in self.report.slides)


def profile_slide(path: Path, settings: Settings, observer: Observer) -> Profile:
    """Profile a run of ``settings`` on a sample of the images below ``path``; labels go to a temporary folder.

    The temporary folder lies in the output folder of the settings, so that writes go to the disk that a run would use.

    Raises:
        UsageError: there is no image, the output is no local folder, or nothing can be run as asked.
        SlideError: the sample cannot be processed.
    """
    if isinstance(settings.output, RemotePath):
        raise UsageError(
            "`output`",
            expected="a folder of this machine, or none",
            found=str(settings.output),
            cause="what the sample writes is temporary, which object stores do not know",
            remedy="copy a slide's result by hand to see how fast the store takes it",
        )
    bundle = load_model(settings.model)
    sample = take_sample(path, settings, bundle.card.input.pixel_size_um)
    if settings.output is not None:
        settings.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="cellseg-profile-", dir=settings.output) as name:
        folder = Path(name)
        pixels = sum(input_pixels(slide, settings, bundle.card) for slide in sample)
        model_pool = ModelPool(bundle, settings, observer.racing, pixels=pixels)
        with opened_alone(sample[0], settings, model_pool, folder / "alone") as slide:
            plan = slide.plan
            first = first_read(slide, list(plan.grid))
            with GpuMeter() as meter:
                run = _run(sample, replace(settings, output=folder / "run"), observer)
            alone = measure_alone(slide, list(plan.grid), first)
        stage_shares = shares(run.intervals, run.report.workers)
        uses = _uses(run, stage_shares, slide, alone)
        bottleneck = find_bottleneck(stage_shares)
        trial = None
        if bottleneck == "read":
            read_remedy = find_read_remedy(sample[0], plan.level.level, plan.channels.indices, folder / "part")
            if read_remedy is not None:
                trial = _try(read_remedy, sample, slide, settings, run, alone, folder, observer)
    remedy = trial.text if trial is not None else ""
    report = run.report
    return Profile(
        slides=len(sample),
        megapixels=run.pixels / 1e6,
        backend=report.backend,
        precision=report.precision,
        workers=report.workers,
        mpx_per_s=run.pixels / 1e6 / run.seconds,
        engine_mpx_per_s=report.engine_mpx_per_s,
        first_read_mpx_per_s=plan.pixels / 1e6 / first,
        memory_gb_per_s=memory_bandwidth() / 1e9,
        stages=list(uses.values()),
        shares=stage_shares,
        bottleneck=bottleneck,
        verdict=describe_bottleneck(bottleneck, stage_shares, uses, remedy),
        trial=trial,
        gpu=meter.figures,
        intervals=run.intervals,
    )


def _run(images: list[Slide], settings: Settings, observer: Observer) -> _Sampled:
    clock = StageClock(keep_intervals=True)
    report = run_images(images, settings, observer, clock)
    for slide in report.slides:
        if slide.status == "failed":
            raise SlideError(slide.path, expected="a sample that can be run", found=slide.reason, remedy="see above")
    return _Sampled(report, clock.intervals)


def _uses(run: _Sampled, stage_shares: dict[str, float], slide: OpenSlide, alone: Alone) -> dict[str, StageUse]:
    """Stage -> its figures, for each stage that was busy."""
    uses = {}
    for stage, seconds in busy_seconds(run.intervals).items():
        active = occupied(interval for interval in run.intervals if interval.stage == stage)
        alone_seconds = alone.seconds.get(stage)
        uses[stage] = StageUse(
            stage=stage,
            busy=seconds,
            occupancy=active / run.seconds,
            share=stage_shares[stage],
            mpx_per_s=run.pixels / 1e6 / active,
            alone_mpx_per_s=slide.plan.pixels / 1e6 / alone_seconds if alone_seconds else None,
            gb_per_s=_bytes_moved(stage, slide, alone) * run.pixels / slide.plan.pixels / 1e9 / active or None,
        )
    return uses


def _bytes_moved(stage: str, slide: OpenSlide, alone: Alone) -> int:
    """Least number of bytes that a stage moves for the blocks that were measured alone; 0 if unknown."""
    plan = slide.plan
    tiles = plan.tiles * plan.grid.lattice.tile[0] * plan.grid.lattice.tile[1]
    return {
        "read": alone.read_bytes,
        "gather": 2 * tiles * alone.read_bytes // sum(block.read_box.area for block in plan.grid),
        "stitch": (4 + 1) * plan.pixels,
        "write": alone.written_bytes,
    }.get(stage, 0)


def _try(
    read_remedy: ReadRemedy,
    sample: list[Slide],
    slide: OpenSlide,
    settings: Settings,
    run: _Sampled,
    alone: Alone,
    folder: Path,
    observer: Observer,
) -> Trial:
    """Predict the gain of a remedy for slow reading, then measure it on a copy of the sample."""
    blocks = sum(report.blocks for report in run.report.slides)
    per_block = 1 / len(slide.plan.grid)
    device = sum(seconds for stage, seconds in alone.seconds.items() if stage not in ("read", "write")) * per_block
    write = busy_seconds(run.intervals)["write"] / blocks
    read = mean(block.read_box.area for block in slide.plan.grid) / read_remedy.pixels_per_s
    predicted = predict_seconds(blocks, run.report.workers, read, device, write)
    predicted += occupied(interval for interval in run.intervals if interval.stage == "pyramid")
    level = slide.plan.level.level
    copies = [
        copy_slide(image, level, folder / "copies" / f"{number}.zarr", read_remedy.storage)
        for number, image in enumerate(sample)
    ]
    # A copy begins at the level that is processed.
    measured = _run(copies, replace(settings, output=folder / "again", level=0), observer)
    return Trial(read_remedy.cause, read_remedy.text, run.seconds / predicted, run.seconds / measured.seconds)
