"""Choose the backend that computes the slides of a run: the requested one, or the winner of the race."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from cellseg_batch.engine.errors import BackendError
from cellseg_batch.engine.inference.backends.registry import REFERENCES, candidates, demand_format
from cellseg_batch.engine.inference.race import likely_winner, load_or_race, request_of
from cellseg_batch.engine.inference.race_result import RaceResult
from cellseg_batch.engine.machine import cores
from cellseg_batch.engine.models import load_model, shipped_models
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.storage.cache import Artefacts
from cellseg_batch.trainer.bundle import Bundle

# From here on the fastest backend saves more time than racing all of them takes.
_MANY_PIXELS = 500e6


@dataclass(frozen=True)
class Choice:
    """The backend of every slide of a run; a resumed slide goes on with the backend that it began with.

    Attributes:
        backend, precision: names of the backend and its precision.
        race_result: result of the race that it won; None if there was nothing to choose.
    """

    backend: str
    precision: str
    race_result: RaceResult | None

    @property
    def is_likely(self) -> bool:
        """Whether it is the likely winner of a race that not all have run."""
        return self.race_result is not None and self.race_result.request.short


def choose(
    settings: Settings, bundle: Bundle, racing: Callable[[], None] = lambda: None, pixels: float = math.inf
) -> Choice:
    """Choose the fastest backend that fits the settings and passes the gate.

    For few pixels the likely winner is taken, if it passes the gate: a race of all would take longer than it saves.

    Args:
        settings: settings with model, backend, precision and threads.
        bundle: the model.
        racing: called before a race is run, which happens if this machine has no result for this model.
        pixels: number of pixels that there are to segment.

    Raises:
        BackendError: no backend fits the settings.
    """
    demand_format(settings.backend, bundle)
    fitting = candidates(bundle.card.format, settings.backend, settings.precision, settings.device)
    if fitting == [REFERENCES[bundle.card.format]] or (len(fitting) == 1 and not settings.gate):
        return Choice(*fitting[0], None)  # a single candidate and no gate to pass: nothing to race
    request = request_of(settings, bundle.card)
    if pixels < _MANY_PIXELS and likely_winner(request, bundle) is not None:
        result = load_or_race(replace(request, short=True), bundle, Artefacts(), racing)
        with suppress(BackendError):
            best = result.pick(settings.backend, settings.precision, settings.gate)
            return Choice(best.backend, best.precision, result)
    result = load_or_race(request, bundle, Artefacts(), racing)
    best = result.pick(settings.backend, settings.precision, settings.gate)
    return Choice(best.backend, best.precision, result)


def choose_backend(settings: Settings, pixels: float) -> Choice:
    """Run `choose` as a task in a worker process."""
    return choose(settings, load_model(settings.model), pixels=pixels)


def settings_elsewhere(settings: Settings) -> Settings:
    """Return the settings for a worker process: the model's path is absolute, and local workers share the cores."""
    model = settings.model if settings.model in shipped_models() else str(Path(settings.model).resolve())
    if settings.scheduler != "processes":
        return replace(settings, model=model)
    threads = settings.threads or max(1, cores() // settings.workers)
    device = "cuda" if settings.device.startswith("cuda") else settings.device  # each process sees only one GPU
    return replace(settings, model=model, threads=threads, device=device)
