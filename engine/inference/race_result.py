"""Hold the result of a race between backends: the request, a row for each candidate, and the choice among them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cellseg_batch.engine.backend_table import KNOWN_PRECISIONS
from cellseg_batch.engine.errors import BackendError
from cellseg_batch.engine.inference.backends.gate import Parity, limits_of


def may_win(precision: str, asked: str) -> bool:
    """Whether ``precision`` may be chosen when the user asked for ``asked``, a name or auto."""
    return precision == asked or (asked == "auto" and not KNOWN_PRECISIONS[precision].on_request)


@dataclass(frozen=True)
class Request:
    """Candidates and conditions of a race.

    Attributes:
        model: a shipped model's name or a bundle's path.
        backend: a name, or auto for all.
        precision: a name, or auto for all.
        tile: (height, width) in px of the timed tiles.
        batch: tiles per call.
        threads: number of CPU threads that the model uses.
        device: auto, cpu or a GPU; the first of several.
        complete: whether candidates that win only if they are asked for by name are raced too.
        short: whether only the likely winner of a CPU runs, and is held against the reference.
    """

    model: str
    backend: str
    precision: str
    tile: tuple[int, int]
    batch: int
    threads: int
    device: str = "auto"
    complete: bool = False
    short: bool = False

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Request:
        """The request from the plain values that `dataclasses.asdict` and JSON make of it."""
        return cls(**{**content, "tile": tuple(content["tile"])})


@dataclass(frozen=True)
class Candidate:
    """One row of the race.

    Attributes:
        backend, precision: names of the backend and its precision.
        missing: reason why it did not run; "" if it did.
        mpx_per_s: input pixels per second in Mpx/s, median of the rounds; 0 if it did not run.
        slowest, fastest: speed of the slowest and the fastest round in Mpx/s.
        parity: agreement with the fp32 reference; None if it did not run.
    """

    backend: str
    precision: str
    missing: str = ""
    mpx_per_s: float = 0.0
    slowest: float = 0.0
    fastest: float = 0.0
    parity: Parity | None = None

    @property
    def passed(self) -> bool:
        """Whether it passed the gate and may run slides."""
        return self.parity is not None and self.parity.within(limits_of(self.precision))

    @property
    def name(self) -> str:
        """Backend and precision."""
        return f"{self.backend} {self.precision}"


@dataclass(frozen=True)
class RaceResult:
    """The result of a race and its conditions.

    Attributes:
        request: candidates and conditions asked for.
        model_sha256: SHA-256 of the bundle.
        shape: (N, C, H, W) of the timed batches.
        processor: name of this machine's processor.
        gpus: names of this machine's GPUs, as the driver gives them.
        versions: versions of the packages that may decide the race; None for a package that is not installed.
        date: date and time in UTC.
        candidates: a row for each candidate.
    """

    request: Request
    model_sha256: str
    shape: tuple[int, int, int, int]
    processor: str
    gpus: tuple[str, ...]
    versions: dict[str, str | None]
    date: str
    candidates: tuple[Candidate, ...]

    def pick(self, backend: str, precision: str, gate: bool = True) -> Candidate:
        """Return the fastest candidate that fits the request and passes the gate.

        Args:
            backend: a name or auto.
            precision: a name or auto.
            gate: False ignores the gate.

        Raises:
            BackendError: no candidate fits; the error lists reasons and figures.
        """
        fitting = [
            row for row in self.candidates if backend in ("auto", row.backend) and may_win(row.precision, precision)
        ]
        eligible = [row for row in fitting if row.parity is not None and (row.passed or not gate)]
        if eligible:
            return max(eligible, key=lambda row: row.mpx_per_s)
        failed = [
            f"{row.name} {row.parity.text(limits_of(row.precision))}" for row in fitting if row.parity is not None
        ]
        missing = [f"{row.name}: {row.missing}" for row in fitting if row.missing]
        raise BackendError(
            f"`backend={backend}` `precision={precision}`",
            expected="a backend that can be had here and agrees with the reference in fp32",
            found="; ".join(failed + missing) or "none that this version knows",
            remedy="`gate=False` uses it all the same" if failed else "see cellseg-batch doctor, or leave both to auto",
        )

    def to_json(self) -> dict[str, Any]:
        """Return every figure as plain values, and mark the candidate that the request picks, if any, as the winner."""
        try:
            winner: Candidate | None = self.pick(self.request.backend, self.request.precision)
        except BackendError:
            winner = None
        rows = []
        for candidate in self.candidates:
            figures = asdict(candidate.parity) if candidate.parity is not None else {}
            row = {name: value for name, value in asdict(candidate).items() if name != "parity"}
            rows.append({**row, **figures, "passed": candidate.passed, "winner": candidate == winner})
        return {**asdict(self), "candidates": rows}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> RaceResult:
        """Return the result that `to_json` wrote."""
        rows = []
        for row in content["candidates"]:
            parity = Parity(**{name: row[name] for name in Parity.__dataclass_fields__}) if "flipped" in row else None
            plain = {name: row[name] for name in Candidate.__dataclass_fields__ if name != "parity"}
            rows.append(Candidate(**plain, parity=parity))
        fields = {name: tuple(content[name]) for name in ("shape", "gpus")}
        return cls(**{**content, **fields, "request": Request.from_json(content["request"]), "candidates": tuple(rows)})
