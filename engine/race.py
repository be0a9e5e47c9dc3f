"""The race: every backend that loads here, timed and held against torch fp32 on real tiles; the result is kept.

It runs in a process of its own, so that its memory (torch, every network) does not stay in the run's.  It must not
know slides.
"""

from __future__ import annotations

import datetime
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.artefacts import Artefacts, Key
from cellseg_batch.engine.backends.backend import Backend
from cellseg_batch.engine.backends.choose import REFERENCE, candidates, make_backend, why_not
from cellseg_batch.engine.backends.gate import TILE, Parity, logits_of, measure_parity, real_tiles
from cellseg_batch.engine.errors import BackendError
from cellseg_batch.engine.machine import gpus, package_version, processor
from cellseg_batch.engine.models import load_model
from cellseg_batch.trainer.bundle import Bundle

_log = logging.getLogger(__name__)

_FILE = "certificate.json"
_PACKAGES = ("cellseg-batch", "torch", "openvino", "nncf", "tensorrt", "torch-tensorrt", "triton")
_ROUNDS = 5
# A candidate this much slower than the fastest is timed once; it will not win.
_HOPELESS = 3.0
# Listed always, but it wins only when it is asked for by name.
_ON_REQUEST = ("int8",)


@dataclass(frozen=True)
class Request:
    """What is to be raced.

    Attributes:
        model: a shipped model's name or a bundle's path.
        backend: a name, or auto for all.
        precision: a name, or auto for all.
        tile: side in px of the timed tiles.
        batch: tiles per call.
        threads: of the model.
        device: auto, cpu or a GPU; the first of several.
    """

    model: str
    backend: str
    precision: str
    tile: int
    batch: int
    threads: int
    device: str = "auto"


@dataclass(frozen=True)
class Candidate:
    """One row of the race.

    Attributes:
        backend, precision: what ran.
        missing: why it did not run; "" if it did.
        mpx_per_s: pixels of its input per second, median of the rounds, in Mpx/s; 0 if it did not run.
        slowest, fastest: of the rounds, Mpx/s.
        parity: against torch fp32; None if it did not run.
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
        """Whether the gate lets it run slides."""
        return self.parity is not None and self.parity.passed

    @property
    def name(self) -> str:
        """Backend and precision."""
        return f"{self.backend} {self.precision}"


@dataclass(frozen=True)
class Certificate:
    """A race's result.

    Attributes:
        request: what was raced.
        model_sha256: of the bundle.
        shape: (N, C, H, W) of the timed batches.
        processor: of this machine.
        versions: of the packages that may decide it; None for what is not installed.
        date: in UTC.
        candidates: every row.
    """

    request: Request
    model_sha256: str
    shape: tuple[int, int, int, int]
    processor: str
    versions: dict[str, str | None]
    date: str
    candidates: tuple[Candidate, ...]

    def pick(self, backend: str, precision: str, gate: bool = True) -> Candidate:
        """The fastest candidate that fits what was asked for and passes the gate.

        Args:
            backend: a name or auto.
            precision: a name or auto.
            gate: False takes the fastest whatever its figures.

        Raises:
            BackendError: there is none; the reasons and figures are in it.
        """
        fitting = [
            one
            for one in self.candidates
            if backend in ("auto", one.backend)
            and (precision == one.precision or (precision == "auto" and one.precision not in _ON_REQUEST))
        ]
        able = [one for one in fitting if one.parity is not None and (one.passed or not gate)]
        if able:
            return max(able, key=lambda one: one.mpx_per_s)
        failed = [f"{one.name} {one.parity.text}" for one in fitting if one.parity is not None]
        missing = [f"{one.name}: {one.missing}" for one in fitting if one.missing]
        raise BackendError(
            f"--backend {backend} --precision {precision}",
            expected="a backend that can be had here and agrees with torch fp32",
            found="; ".join(failed + missing) or "none that this version knows",
            remedy="--no-gate uses it all the same" if failed else "see cellseg-batch doctor, or leave both to auto",
        )

    def to_json(self) -> dict[str, Any]:
        """Every figure, as plain values; one candidate at most is the winner of an open race."""
        try:
            winner: Candidate | None = self.pick(self.request.backend, self.request.precision)
        except BackendError:
            winner = None
        rows = []
        for one in self.candidates:
            figures = asdict(one.parity) if one.parity is not None else {}
            row = {name: value for name, value in asdict(one).items() if name != "parity"}
            rows.append({**row, **figures, "passed": one.passed, "winner": one == winner})
        return {**asdict(self), "candidates": rows}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Certificate:
        """The certificate that `to_json` wrote."""
        rows = []
        for row in content["candidates"]:
            parity = Parity(**{name: row[name] for name in Parity.__dataclass_fields__}) if "flipped" in row else None
            plain = {name: row[name] for name in Candidate.__dataclass_fields__ if name != "parity"}
            rows.append(Candidate(**plain, parity=parity))
        fields = {**content, "request": Request(**content["request"]), "shape": tuple(content["shape"])}
        return cls(**{**fields, "candidates": tuple(rows)})


def certify(
    request: Request, bundle: Bundle, artefacts: Artefacts, started: Callable[[], None], again: bool = False
) -> Certificate:
    """The kept result of this race on this machine; run now, in a process of its own, when there is none.

    Args:
        request: what to race.
        bundle: the model that the request names.
        artefacts: where results and compiled networks are kept.
        started: called if a race is run.
        again: race even if there is a result, which is replaced.

    Raises:
        BackendError: the race's process died.
    """
    key = _key(request, bundle)
    if again:
        artefacts.drop(key)
    folder = artefacts.find(key)
    if folder is None:
        started()
        folder = artefacts.get(key, lambda partial: _race_elsewhere(request, artefacts, partial))
    return Certificate.from_json(json.loads((folder / _FILE).read_text()))


def race(request: Request, bundle: Bundle, artefacts: Artefacts) -> Certificate:
    """Run the race here and now: build, gate and time every candidate, all taking turns."""
    threshold = bundle.card.threshold
    tiles = real_tiles("gate", bundle.card.channels)
    reference = make_backend(bundle, *REFERENCE, request.threads, artefacts)
    expected = _gate_logits(reference, tiles)
    stride = bundle.card.total_stride
    side = max(1, request.tile // stride) * stride
    shape = (request.batch, bundle.card.channels, side, side)
    rows: dict[tuple[str, str], Candidate] = {}
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    parities: dict[tuple[str, str], Parity] = {}
    batch = _fill(shape, tiles)
    gpu = "cuda:0" if request.device in ("auto", "cpu") else request.device
    for name in candidates(request.backend, request.precision, request.device):
        missing = why_not(*name)
        if not missing:
            try:
                backend = reference
                if name != REFERENCE:
                    backend = make_backend(bundle, *name, request.threads, artefacts, gpu)
                logits = expected if name == REFERENCE else _gate_logits(backend, tiles)
                parities[name] = measure_parity(logits, expected, threshold)
                model = backend.compile(shape)
                model(batch)
                # A GPU's copies overlap its work in a run.
                calls[name] = getattr(model, "repeat", None) or partial(model, batch)
                continue
            except Exception as error:  # a network that this library cannot take; another one may
                _log.debug("%s cannot run the model", name, exc_info=True)
                missing = f"cannot run the model ({type(error).__name__}: {error})"
        rows[name] = Candidate(*name, missing=missing)
    megapixels = request.batch * side * side / 1e6
    for name, seconds in time_in_turns(calls).items():
        rates = [megapixels / one for one in seconds]
        rows[name] = Candidate(*name, "", median(rates), min(rates), max(rates), parities[name])
    certificate = Certificate(
        request=request,
        model_sha256=bundle.sha256,
        shape=shape,
        processor=processor(),
        versions=_versions(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        candidates=tuple(sorted(rows.values(), key=lambda one: -one.mpx_per_s)),
    )
    with suppress(BackendError):  # nobody won; who asks for the result is told why
        winner = certificate.pick(request.backend, request.precision)
        # Made here and kept, so that a run need not load torch to show the model a slide shrunk.
        for factor in bundle.card.shrink:
            make_backend(bundle.shrunk(int(factor)), winner.backend, winner.precision, request.threads, artefacts)
    return certificate


def time_in_turns(calls: dict[tuple[str, str], Callable[[], object]]) -> dict[tuple[str, str], list[float]]:
    """Seconds of each call in each round after a warm-up, all taking turns; the hopeless drop out after the first."""
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            best = min((min(times) for times in seconds.values() if times), default=float("inf"))
            if seconds[name] and min(seconds[name]) > _HOPELESS * best:
                continue
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _gate_logits(backend: Backend, tiles: NDArray[np.float32]) -> NDArray[np.float32]:
    return logits_of(backend.compile((1, *tiles.shape[1:])), tiles)


def _fill(shape: tuple[int, int, int, int], tiles: NDArray[np.float32]) -> NDArray[np.float32]:
    """A batch of ``shape`` laid out with real tiles."""
    batch = np.empty(shape, np.float32)
    corners = [(image, y, x) for image in batch for y in range(0, shape[2], TILE) for x in range(0, shape[3], TILE)]
    for number, (image, y, x) in enumerate(corners):
        place = image[:, y : y + TILE, x : x + TILE]
        place[...] = tiles[number % len(tiles)][:, : place.shape[1], : place.shape[2]]
    return batch


def _race_elsewhere(request: Request, artefacts: Artefacts, folder: Path) -> None:
    command = [sys.executable, "-m", __name__, json.dumps(asdict(request)), str(artefacts.folder), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackendError(
            f"race of {request.model}",
            expected="a process that times every backend",
            found=f"exit {done.returncode}: {(done.stderr.strip() or 'no message').splitlines()[-1]}",
            cause="too little memory, or a library that crashes when it is loaded",
            remedy="name a --backend and --precision; cellseg-batch compile --debug shows more",
        )


def _key(request: Request, bundle: Bundle) -> Key:
    raced = {name: value for name, value in asdict(request).items() if name != "model"}
    return {
        "what": "race",
        "model": bundle.card.name,
        "sha256": bundle.sha256,
        "threshold": bundle.card.threshold,
        "processor": processor(),
        "gpus": gpus(),
        "versions": _versions(),
        **raced,
    }


def _versions() -> dict[str, str | None]:
    return {package: package_version(package) for package in _PACKAGES}


def main() -> None:
    """Entry point of the race's own process: request as JSON, folder of the artefacts, folder for the result."""
    asked, cache, folder = sys.argv[1:]
    request = Request(**json.loads(asked))
    certificate = race(request, load_model(request.model), Artefacts(Path(cache)))
    (Path(folder) / _FILE).write_text(json.dumps(certificate.to_json(), indent=2) + "\n")


if __name__ == "__main__":
    main()
