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
_DIGITS = 8


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
    made_for = {name: _words(value) for name, value in entry.key.items() if name not in ("what", "model", *_HIDDEN)}
    # The networks of a model differ in their outputs: those of a mask, and of instances.
    made_for = {"network": str(entry.key.get("sha256", "?"))[:_DIGITS], **made_for}
    return CompiledEntry(
        what=str(entry.key.get("what", "?")),
        model=str(entry.key.get("model", "?")),
        size=entry.size,
        sound=entry.sound,
        made_for=", ".join(f"{name.replace('_', ' ')} {value}" for name, value in made_for.items() if value),
    )


def _words(value: object) -> str:
    """A part of a key in words; "" for an empty list."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return (" x " if all(isinstance(part, int) for part in value) else " and ").join(map(str, value))
    return str(value)
