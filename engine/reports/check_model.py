"""Check a model before its first run: what its pixels see, whether every backend agrees on it, how fast each is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cellseg_batch.engine.inference.compiled import race_every_precision
from cellseg_batch.engine.inference.onnx_footprint import Footprint, measure_footprint
from cellseg_batch.engine.inference.race_result import RaceResult
from cellseg_batch.engine.machine import cores
from cellseg_batch.engine.models import load_model
from cellseg_batch.engine.settings import Settings
from cellseg_batch.trainer.card import ONNX, Card


@dataclass(frozen=True)
class ModelCheck:
    """What was found of a model.

    Attributes:
        card: the model's card.
        footprint: what its outputs see, as measured; None for tiles of a single size, and for a network of ours, whose
            training measured it.
        race_result: agreement with the reference and rate of every backend.
    """

    card: Card
    footprint: Footprint | None
    race_result: RaceResult

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know before the first run."""
        card, notes = self.card, []
        if self.footprint is not None and self.footprint.reason:
            notes.append(
                f"{self.footprint.reason}, so that tiled and untiled results differ; it runs with the margin of "
                f"{card.margin} px, and verify-seams says what the seams cost"
            )
        if card.input.size.fixed:
            notes.append(f"it takes tiles of {card.input.size.fixed} px alone, so that no margin is exact")
        elif self.footprint is not None and self.footprint.exact_margin is not None:
            if (card.exact_margin or 0) < self.footprint.exact_margin:
                notes.append(f"it sees {self.footprint.exact_margin} px, more than its card says: {card.exact_margin}")
            if card.margin < self.footprint.exact_margin:
                notes.append(f"margin {card.margin} px is below the exact margin of {self.footprint.exact_margin} px")
        if card.input.normalisation.per_tile:
            notes.append("it was trained on tiles normalised each for itself; it gets the slide's normalisation")
        return tuple(notes)

    def to_json(self) -> dict[str, Any]:
        """The check as plain JSON values."""
        footprint = None if self.footprint is None else asdict(self.footprint)
        return {"footprint": footprint, "notes": list(self.notes), **self.race_result.to_json()}


def check_model(model: str, threads: int | None = None) -> ModelCheck:
    """Check a model on this machine.

    Args:
        model: a shipped model's name or a bundle's folder.
        threads: threads of the model; None uses every core.

    Raises:
        ModelError: there is no such model.
        BackendError: the reference cannot run here, or the process of the race died.
    """
    bundle = load_model(model)
    card = bundle.card
    measured = card.format == ONNX and not card.input.size.fixed
    footprint = measure_footprint(bundle, threads or cores()) if measured else None
    return ModelCheck(card, footprint, race_every_precision(Settings(model=model, threads=threads)))
