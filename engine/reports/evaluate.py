"""Score models on annotated images: pixels, instances, classes and speed, by kind of image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cellseg_batch.engine.errors import trainer_errors
from cellseg_batch.engine.inference.backends.registry import REFERENCES
from cellseg_batch.engine.models import load_model
from cellseg_batch.engine.reports.sample_prediction import make_predictor
from cellseg_batch.engine.reports.scores import ImageScore, Summary, score, summarise
from cellseg_batch.trainer.card import ModelClass
from cellseg_batch.trainer.data.dataset import load_dataset
from cellseg_batch.trainer.data.sample import Problem, Sample, rescale
from cellseg_batch.trainer.plots import plot_predictions


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model on a split.

    Attributes:
        model: name or folder of the model.
        split: train, val or test.
        rescale: factor by which images and truth were magnified.
        images: one entry per image.
        summaries: kind of image -> its figures; ``all`` is always there, the kinds only if there are several.
        problems: images that could not be used.
        backend: backend and precision that computed the model.
        notes: remarks on classes that only the model or the data know.
    """

    model: str
    split: str
    rescale: float
    images: list[ImageScore]
    summaries: dict[str, Summary]
    problems: list[Problem]
    backend: str
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The scores as plain JSON values."""
        return {
            "split": self.split,
            "rescale": self.rescale,
            "backend": self.backend,
            "notes": list(self.notes),
            "summary": {kind: asdict(summary) for kind, summary in self.summaries.items()},
            "images": [asdict(image) for image in self.images],
        }


def evaluate_model(
    model: str,
    data: Path,
    split: str,
    factor: float = 1.0,
    pictures: Path | None = None,
    threads: int | None = None,
    tracked: Callable[[Sequence[Sample]], Iterable[Sample]] = iter,
) -> Evaluation:
    """Score a model on the annotated images of a split.

    Args:
        model: a shipped model's name or a bundle's folder.
        data: the annotated images, in any layout that the trainer reads.
        split: train, val or test.
        factor: magnify images and truth by this factor.
        pictures: folder for a page of pictures, named after the model; None writes no pictures.
        threads: threads of the model; None uses every core.
        tracked: passes the images through one by one, so that the caller can count them.

    Raises:
        ModelError: there is no such model.
        UsageError: the data cannot be used, or the pictures cannot be written.
        SlideError: the model takes other images.
    """
    bundle = load_model(model)
    card = bundle.card
    with trainer_errors(f"evaluate {data}"):
        dataset = load_dataset(data, card.input.normalisation, only=(split,))
    samples = [_numbered(sample, dataset.classes, card.classes) for sample in dataset.splits[split]]
    if factor != 1:
        samples = [rescale(sample, factor) for sample in samples]
    named = [one.name for one in dataset.classes]
    common = [(number, one.name) for number, one in enumerate(card.classes, start=1) if one.name in named]
    predict = make_predictor(bundle, model, threads)
    scores = [score(predict(sample), sample, common) for sample in tracked(samples)]
    kinds = sorted({image.kind for image in scores})
    by_kind = {kind: [image for image in scores if image.kind == kind] for kind in kinds if len(kinds) > 1}
    summaries = {kind: summarise(rows) for kind, rows in (by_kind | {"all": scores}).items()}
    if pictures is not None:
        shown = card.classes if card.decoder == "classes" and dataset.classes else ()

        def found_in(sample: Sample) -> Any:
            prediction = predict(sample)
            return prediction.classes if shown else prediction.labels

        with trainer_errors(f"`pictures={pictures}`"):
            pictures.mkdir(parents=True, exist_ok=True)
            plot_predictions(samples, found_in, pictures / f"{Path(model).name}.png", shown)
    return Evaluation(
        model=model,
        split=split,
        rescale=factor,
        images=scores,
        summaries=summaries,
        problems=dataset.problems,
        backend=" ".join(REFERENCES[card.format]),
        notes=_notes([one.name for one in card.classes], named),
    )


def _numbered(sample: Sample, own: Sequence[ModelClass], classes: Sequence[ModelClass]) -> Sample:
    """The sample with the numbers that its classes have in the model, and higher ones for those that it does not know.

    Args:
        sample: an annotated image.
        own: classes of the data.
        classes: classes of the model.
    """
    if sample.classes is None:
        return sample
    names = [one.name for one in classes]
    numbers = [1 + (names.index(one.name) if one.name in names else len(names)) for one in own]
    return replace(sample, classes=np.array([0, *numbers])[sample.classes])


def _notes(model: Sequence[str], data: Sequence[str]) -> tuple[str, ...]:
    """Remarks on classes that only one of both knows, if both have any."""
    if not model or not data:
        return ()
    lacking = {"the data have no class": set(model) - set(data), "the model has no class": set(data) - set(model)}
    return tuple(f"{text} {', '.join(sorted(names))}" for text, names in lacking.items() if names)
