"""The bottleneck of a run in one sentence, from figures alone."""

from __future__ import annotations

from dataclasses import dataclass

from cellseg_batch.engine.profiling.timeline import IDLE, on_device

_ENOUGH = 0.8
"""A device that is busy for this share of the time is the bottleneck: to free the rest gains 1.25x at most."""

_ADVICE = {
    "model": "a faster model would help: `precision=int8`, or a GPU",
    "write": "more blocks in flight (`workers`), or another disk for `output`, would help",
    "pyramid": "a faster disk for `output` would help: every level of the labels is written too",
    IDLE: "larger blocks (`block`) would help, as would fewer and larger images",
}


@dataclass(frozen=True)
class StageUse:
    """One stage of the sample's run.

    Attributes:
        stage: its name.
        busy: seconds, over all threads.
        occupancy: share of the sample's time in which it is busy.
        share: of a long run's time that it would account for; together with the scheduler's 1.
        mpx_per_s: pixels per second in which it is busy.
        alone_mpx_per_s: the same with nothing else going on; None where it was not measured.
        gb_per_s: bytes that it must move at least per such second, in GB/s; None where that says nothing.
    """

    stage: str
    busy: float
    occupancy: float
    share: float
    mpx_per_s: float
    alone_mpx_per_s: float | None
    gb_per_s: float | None

    @property
    def of_ceiling(self) -> float | None:
        """Its speed as a share of that on its own."""
        return None if self.alone_mpx_per_s is None else self.mpx_per_s / self.alone_mpx_per_s


def find_bottleneck(shares: dict[str, float]) -> str:
    """The stage that limits the run: on the device if that is rarely idle, else what it mostly waits for."""
    device = {stage: share for stage, share in shares.items() if on_device(stage)}
    others = {stage: share for stage, share in shares.items() if not on_device(stage)}
    limiting = device if sum(device.values()) >= _ENOUGH or not others else others
    return max(limiting, key=lambda stage: limiting[stage])


def say(bottleneck: str, shares: dict[str, float], uses: dict[str, StageUse], remedy: str) -> str:
    """The verdict.

    Args:
        bottleneck: what `find_bottleneck` gave.
        shares: of a long run's time, by stage.
        uses: of the stages, by name.
        remedy: what was found to help, with its figures; "" for the usual advice.
    """
    device = sum(share for stage, share in shares.items() if on_device(stage))
    remedy = remedy or _ADVICE.get(bottleneck, "")
    if on_device(bottleneck):
        use = uses[bottleneck]
        speed = f" and runs at {use.of_ceiling:.0%} of its speed alone" if use.of_ceiling is not None else ""
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
