"""Which backend computes the slides of a run: the one asked for, or the winner of the race."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from cellseg_batch.engine.inference.backends.registry import REFERENCE, candidates
from cellseg_batch.engine.inference.race import load_or_race, request_of
from cellseg_batch.engine.inference.race_result import RaceResult
from cellseg_batch.engine.machine import cores
from cellseg_batch.engine.models import load_model, shipped_models
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.storage.cache import Artefacts
from cellseg_batch.trainer.bundle import Bundle


@dataclass(frozen=True)
class Choice:
    """The backend of every slide that was not begun with another one.

    Attributes:
        backend, precision: its name.
        race_result: of the race that it won; None if there was nothing to choose.
    """

    backend: str
    precision: str
    race_result: RaceResult | None


def choose(settings: Settings, bundle: Bundle, racing: Callable[[], None] = lambda: None) -> Choice:
    """The fastest backend that does what was asked and passes the gate.

    Args:
        settings: say which model, backend, precision and threads.
        bundle: the model.
        racing: called if no race of this model is known on this machine yet, before it is run.

    Raises:
        BackendError: no backend can do what was asked.
    """
    fitting = candidates(settings.backend, settings.precision, settings.device)
    if fitting == [REFERENCE] or (len(fitting) == 1 and not settings.gate):
        return Choice(*fitting[0], None)  # nothing to compare with anything
    result = load_or_race(request_of(settings, bundle.card), bundle, Artefacts(), racing)
    best = result.pick(settings.backend, settings.precision, settings.gate)
    return Choice(best.backend, best.precision, result)


def choose_backend(settings: Settings) -> Choice:
    """`choose`, as a task for a worker process."""
    return choose(settings, load_model(settings.model))


def settings_elsewhere(settings: Settings) -> Settings:
    """The settings as a worker process needs them: no path depends on its folder, and workers share the cores here."""
    model = settings.model if settings.model in shipped_models() else str(Path(settings.model).resolve())
    if settings.scheduler != "processes":
        return replace(settings, model=model)
    threads = settings.threads or max(1, cores() // settings.workers)
    device = "cuda" if settings.device.startswith("cuda") else settings.device  # each process sees one only
    return replace(settings, model=model, threads=threads, device=device)
