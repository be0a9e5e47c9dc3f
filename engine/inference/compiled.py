"""Carry out ``compile``: race every backend and precision; list or clear compiled networks and races on disk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from cellseg_batch.engine.inference.race import load_or_race, request_of
from cellseg_batch.engine.inference.race_result import RaceResult
from cellseg_batch.engine.models import load_model
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.storage.cache import Artefacts, Entry

# Parts of a key that mean nothing to a reader.
_HIDDEN = ("versions", "sha256", "holds")


@dataclass(frozen=True)
class CompiledEntry:
    """A compiled network or a race result on disk.

    Attributes:
        what: kind of entry.
        model: name of the model.
        size: size in bytes.
        sound: whether every file is present and unchanged.
        made_for: everything else that it depends on, in words.
    """

    what: str
    model: str
    size: int
    sound: bool
    made_for: str


def race_every_precision(settings: Settings, tile: int | None = None, again: bool = False) -> RaceResult:
    """Race the backends that ``settings`` ask for, including those that win only if named, and keep the result.

    Args:
        settings: settings of a run.
        tile: side in px of the timed tiles; None takes the default.
        again: race even if a result is on disk.

    Raises:
        BackendError: the race's process died.
    """
    bundle = load_model(settings.model)
    request = replace(request_of(settings, bundle.card), batch=settings.batch, complete=True)
    if tile is not None:
        request = replace(request, tile=(tile, tile))
    return load_or_race(request, bundle, Artefacts(), lambda: None, again)


def list_compiled() -> tuple[Path, list[CompiledEntry]]:
    """Return the cache folder and every entry in it."""
    artefacts = Artefacts()
    return artefacts.kept, [_describe(entry) for entry in artefacts.entries()]


def clear_compiled() -> tuple[Path, int]:
    """Empty the cache folder; return it and the number of removed entries."""
    artefacts = Artefacts()
    return artefacts.kept, artefacts.clear()


def _describe(entry: Entry) -> CompiledEntry:
    made_for = {name: value for name, value in entry.key.items() if name not in ("what", "model", *_HIDDEN)}
    return CompiledEntry(
        what=str(entry.key.get("what", "?")),
        model=str(entry.key.get("model", "?")),
        size=entry.size,
        sound=entry.sound,
        made_for=", ".join(f"{name} {value}" for name, value in made_for.items()),
    )
