"""Check a model before its first run: what its pixels see, whether every backend agrees on it, how fast each is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cellseg_batch.engine.errors import ModelError
from cellseg_batch.engine.inference.compiled import race_every_precision
from cellseg_batch.engine.inference.onnx_footprint import measure_footprint
from cellseg_batch.engine.inference.race_result import RaceResult
from cellseg_batch.engine.machine import cores
from cellseg_batch.engine.models import load_model
from cellseg_batch.engine.reports.expected_output import Agreement, read_expected_output
from cellseg_batch.engine.settings import Settings
from cellseg_batch.trainer.bundle import Bundle
from cellseg_batch.trainer.card import ONNX, Card
from cellseg_batch.trainer.receptive_field import Footprint

_ENOUGH_OBJECTS = 100


@dataclass(frozen=True)
class ModelCheck:
    """What was found of a model.

    Attributes:
        card: the model's card.
        footprint: what its outputs see, as measured; None for tiles of a single size, and for a network of ours, whose
            training measured it.
        race_result: agreement with the reference and rate of every backend.
        agreements: of each test tensor in the bundle with what the network gives in the reference.
    """

    card: Card
    footprint: Footprint | None
    race_result: RaceResult
    agreements: tuple[Agreement, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know before the first run."""
        card, notes = self.card, [*self.card.notes]
        if self.footprint is not None and self.footprint.exact_margin is not None:
            if card.exact_margin is not None and card.exact_margin < self.footprint.exact_margin:
                notes.append(f"it sees {self.footprint.exact_margin} px, more than its card says: {card.exact_margin}")
            if card.margin < self.footprint.exact_margin:
                notes.append(f"margin {card.margin} px is below the exact margin of {self.footprint.exact_margin} px")
        most = max((row.parity.objects for row in self.race_result.candidates if row.parity is not None), default=0)
        if most < _ENOUGH_OBJECTS:
            notes.append(f"it finds {most} objects in the gate's tiles, on which agreement of backends says little")
        return tuple(notes)

    def to_json(self) -> dict[str, Any]:
        """The check as plain JSON values."""
        footprint = None if self.footprint is None else asdict(self.footprint)
        tests = [asdict(agreement) for agreement in self.agreements]
        return {"footprint": footprint, "notes": list(self.notes), "tests": tests, **self.race_result.to_json()}


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
    agreements = _agreements(bundle, threads or cores())
    return ModelCheck(card, footprint, race_every_precision(Settings(model=model, threads=threads)), agreements)


def _agreements(bundle: Bundle, threads: int) -> tuple[Agreement, ...]:
    """How the network compares with the test tensors in its bundle; () if there are none."""
    if bundle.graph is None:
        return ()
    folder = bundle.graph.parent
    try:
        expected = read_expected_output(folder)
        return () if expected is None else expected.compare(bundle, threads)
    except ValueError as error:
        raise ModelError(
            str(folder),
            expected="test tensors that go with the graph",
            found=str(error),
            cause="an incomplete copy",
            remedy="import the model again",
        ) from error
