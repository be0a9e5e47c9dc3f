"""Find the bottleneck of a run and describe it in a sentence, from figures alone."""

from __future__ import annotations

from dataclasses import dataclass

from cellseg_batch.engine.profiling.timeline import IDLE, on_device

_ENOUGH = 0.8
"""A device that is busy for this share of the time is the bottleneck: removing its idle time gains 1.25x at most."""

_COARSE = 0.1
"""Seconds below which a stage's speed says nothing: caches, and the steps of the clock, make up most of it."""

_ADVICE = {
    "model": "a faster model would help, or a GPU; cellseg-batch compile races every precision of this one",
    "write": "more blocks in flight (`workers`), or another disk for `output`, would help",
    "pyramid": "a faster disk for `output` would help: every level of the labels is written too",
    IDLE: "larger blocks (`block`) would help, as would fewer and larger images",
}


@dataclass(frozen=True)
class StageUse:
    """Figures of a stage in the run of the sample.

    Attributes:
        stage: name of the stage.
        busy: seconds in which the stage is busy, summed over all threads.
        occupancy: share of the sample's time in which the stage is busy on at least one thread.
        share: share of a long run's time that the stage would account for; all shares and the scheduler's sum to 1.
        mpx_per_s: Mpx per second of occupancy.
        alone_mpx_per_s: Mpx/s of the stage with nothing else going on; None if it was not measured.
        gb_per_s: least amount of data that the stage moves per second of occupancy, in GB/s; None if unknown.
    """

    stage: str
    busy: float
    occupancy: float
    share: float
    mpx_per_s: float
    alone_mpx_per_s: float | None
    gb_per_s: float | None

    @property
    def share_of_alone(self) -> float | None:
        """Speed of the stage as a share of its speed alone; None if that was not measured, or not for long enough."""
        if self.alone_mpx_per_s is None or self.busy < _COARSE:
            return None
        return self.mpx_per_s / self.alone_mpx_per_s


def find_bottleneck(shares: dict[str, float]) -> str:
    """Find the stage that limits the run: the largest on the device if that is rarely idle, else the largest elsewhere.

    Args:
        shares: stage -> share of a long run's time.
    """
    device = {stage: share for stage, share in shares.items() if on_device(stage)}
    others = {stage: share for stage, share in shares.items() if not on_device(stage)}
    limiting = device if sum(device.values()) >= _ENOUGH or not others else others
    return max(limiting, key=lambda stage: limiting[stage])


def describe_bottleneck(bottleneck: str, shares: dict[str, float], uses: dict[str, StageUse], remedy: str) -> str:
    """Describe the bottleneck and its remedy in a sentence.

    Args:
        bottleneck: stage from `find_bottleneck`.
        shares: stage -> share of a long run's time.
        uses: stage -> its figures.
        remedy: a remedy that was tried, with its figures; "" gives the usual advice.
    """
    device = sum(share for stage, share in shares.items() if on_device(stage))
    remedy = remedy or _ADVICE.get(bottleneck, "")
    if on_device(bottleneck):
        use = uses[bottleneck]
        speed = f" and runs at {use.share_of_alone:.0%} of its speed alone" if use.share_of_alone is not None else ""
        elsewhere = f"at most {1 / device:.2f}x to gain elsewhere"
        text = f"{bottleneck}-bound: the {bottleneck} stage is busy {use.share:.0%} of the time{speed}; {elsewhere}"
    else:
        waits = f"the model waits {1 - device:.0%} of the time, {shares[bottleneck]:.0%} for "
        use_of = uses.get(bottleneck)
        rate = f", which does {use_of.mpx_per_s:.3g} Mpx/s" if use_of is not None else ""
        text = f"{bottleneck}-bound: {waits}{_WHAT.get(bottleneck, bottleneck)}{rate}"
    return f"{text}; {remedy}" if remedy else text


_WHAT = {
    "read": "reading",
    "upload": "copies to the GPU",
    "write": "writing",
    "pyramid": "the pyramid",
    IDLE: "planning and scheduling",
}
