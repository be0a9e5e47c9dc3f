"""Score models on annotated images: pixels, instances and speed, by kind of image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cellseg_batch.engine.errors import trainer_errors
from cellseg_batch.engine.models import build_torch_network, load_model
from cellseg_batch.trainer.data.dataset import load_dataset
from cellseg_batch.trainer.data.sample import Problem, Sample
from cellseg_batch.trainer.evaluate import ImageScore, Summary, evaluate, rescale, summarise
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
    """

    model: str
    split: str
    rescale: float
    images: list[ImageScore]
    summaries: dict[str, Summary]
    problems: list[Problem]

    def to_json(self) -> dict[str, Any]:
        """The scores as plain JSON values."""
        return {
            "split": self.split,
            "rescale": self.rescale,
            "summary": {kind: asdict(summary) for kind, summary in self.summaries.items()},
            "images": [asdict(score) for score in self.images],
        }


def evaluate_model(
    model: str,
    data: Path,
    split: str,
    factor: float = 1.0,
    pictures: Path | None = None,
    tracked: Callable[[Sequence[Sample]], Iterable[Sample]] = iter,
) -> Evaluation:
    """Score a model on the annotated images of a split.

    Args:
        model: a shipped model's name or a bundle's folder.
        data: the annotated images, in any layout that the trainer reads.
        split: train, val or test.
        factor: magnify images and truth by this factor.
        pictures: folder for a page of pictures, named after the model; None writes no pictures.
        tracked: passes the images through one by one, so that the caller can count them.

    Raises:
        ModelError: there is no such model.
        UsageError: the data cannot be used, or the pictures cannot be written.
    """
    bundle = load_model(model)
    with trainer_errors(f"evaluate {data}"):
        dataset = load_dataset(data, bundle.card.input.normalisation, only=(split,))
    samples = dataset.splits[split]
    if factor != 1:
        samples = [rescale(sample, factor) for sample in samples]
    scores = evaluate(bundle, build_torch_network(bundle), tracked(samples))
    kinds = sorted({score.kind for score in scores})
    by_kind = {kind: [score for score in scores if score.kind == kind] for kind in kinds if len(kinds) > 1}
    summaries = {kind: summarise(rows) for kind, rows in (by_kind | {"all": scores}).items()}
    if pictures is not None:
        with trainer_errors(f"`pictures={pictures}`"):
            pictures.mkdir(parents=True, exist_ok=True)
            plot_predictions(bundle, samples, pictures / f"{Path(model).name}.png")
    return Evaluation(model, split, factor, scores, summaries, dataset.problems)
