"""Predict annotated images, for scores: a network of ours in one pass over the whole image, a graph by a run.

The plain network in torch fp32, mirrored at the image's edges, is what a training made, and what a run comes close to.
Of a graph there is no such network, and stars are decoded by the engine alone: it segments the image as a run would,
with the reference backend.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numpy.typing import NDArray
from skimage.segmentation import relabel_sequential

from cellseg_batch.engine.errors import ModelError, SlideError
from cellseg_batch.engine.inference.backends.registry import REFERENCES
from cellseg_batch.engine.inference.decoders import DECODERS
from cellseg_batch.engine.inference.model_pool import ModelPool
from cellseg_batch.engine.models import build_torch_network
from cellseg_batch.engine.objects.classes import class_rule
from cellseg_batch.engine.objects.columns import CLASS
from cellseg_batch.engine.objects.table import read_batches
from cellseg_batch.engine.run.campaign import Unheard, run_images
from cellseg_batch.engine.run.results import SlideReport
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.slides.arrays import HeldArray
from cellseg_batch.kernels.classes import write_classes
from cellseg_batch.trainer import decode
from cellseg_batch.trainer.bundle import Bundle
from cellseg_batch.trainer.card import Card
from cellseg_batch.trainer.data.sample import Sample
from cellseg_batch.trainer.decode import decode_instances, foreground_mask
from cellseg_batch.trainer.metrics import majority_classes
from cellseg_batch.trainer.scale import pick_downscale

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Prediction:
    """What a model finds in an image.

    Attributes:
        mask: (H, W) bool.
        labels: (H, W) contiguous ids, 0 for background.
        classes: (H, W) class of each pixel, 0 for background; None for models that tell no classes of pixels.
        class_of_object: (n,) class of object 1, 2, ..., n, 0 for none; None for models without classes.
        seconds: seconds that the network took.
        downscale: factor by which the image was downscaled for the model.
    """

    mask: NDArray[np.bool_]
    labels: NDArray[np.integer]
    classes: NDArray[np.uint8] | None
    class_of_object: NDArray[np.integer] | None
    seconds: float
    downscale: int


Predictor = Callable[[Sample], Prediction]


def make_predictor(bundle: Bundle, model: str, threads: int | None = None) -> Predictor:
    """Make the function that predicts samples.

    Args:
        bundle: the model.
        model: its name or folder.
        threads: threads of the model; None uses every core.

    Raises:
        ModelError: the bundle's network cannot be built, or the model takes other images than pictures.
        BackendError: the reference backend cannot run here.
    """
    roles = bundle.card.input.channels
    if len(roles) > 1:
        raise ModelError(
            f"evaluate {model}",
            expected="a model of one channel or of rgb, as annotated images are pictures",
            found=f"one of {', '.join(roles)}",
            remedy="segment the images with run, and look at the labels with preview",
        )
    if bundle.graph is not None or bundle.card.decoder not in decode.DECODERS:
        return _Engine(bundle, model, threads)
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    return partial(predict_in_one_pass, bundle, build_torch_network(bundle))


def predict_in_one_pass(bundle: Bundle, network: nn.Module, sample: Sample) -> Prediction:
    """Predict a sample with the plain network in float32.

    Args:
        bundle: the model.
        network: the bundle's network, in evaluation mode.
        sample: the image.
    """
    card = bundle.card
    start = time.perf_counter()
    downscale, logits = predict_sample(network, sample, bundle)
    seconds = time.perf_counter() - start
    labels = decode_instances(logits, card.decoder, card.threshold, card.rule, downscale)
    mask = foreground_mask(logits, card.decoder, card.threshold)
    rule = class_rule(card)
    if rule is None:
        return Prediction(mask, labels, None, None, seconds, downscale)
    codes = np.zeros(mask.shape, np.uint8)
    write_classes(logits[None], np.array([[0, 0, 0, 0, *mask.shape]]), rule.first, rule.background, codes)
    classes = np.where(mask, codes, 0).astype(np.uint8) if _tells_pixels(card) else None
    of_object = majority_classes(labels, codes, len(rule.names))
    return Prediction(mask, labels, classes, of_object, seconds, downscale)


def predict_sample(network: nn.Module, sample: Sample, bundle: Bundle) -> tuple[int, NDArray[np.float32]]:
    """Choose the factor by which a sample is downscaled, by the rule of the bundle's card, and predict its logits.

    Returns:
        (factor, logits (K, H, W) at the size of the sample).
    """
    from cellseg_batch.trainer.predict import predict_logits
    from cellseg_batch.trainer.unet import Downscaled

    card = bundle.card

    @cache
    def logits_at(factor: int) -> NDArray[np.float32]:
        downscaled = network if factor == 1 else Downscaled(factor, network)
        stride, margin = factor * card.total_stride, factor * card.margin
        return predict_logits(downscaled, sample.pixels, stride, "fp32", margin).numpy()

    def masks_at(factor: int) -> list[NDArray[np.bool_]]:
        pixels = logits_at(factor)[:, factor // 2 :: factor, factor // 2 :: factor]
        return [foreground_mask(pixels, card.decoder, card.threshold)]

    downscale = pick_downscale(card.downscale, masks_at)
    return downscale, logits_at(downscale)


class _Engine:
    """Predicts samples by runs: one for the mask, or the classes of pixels, and one for the objects.

    Args:
        bundle: the model.
        model: its name or folder.
        threads: threads of the model.
    """

    def __init__(self, bundle: Bundle, model: str, threads: int | None) -> None:
        backend, precision = REFERENCES[bundle.card.format]
        masks = Settings(model=model, backend=backend, precision=precision, threads=threads)
        objects = replace(masks, objects=True)
        self._card = bundle.card
        self._masks = masks, ModelPool(bundle, masks)
        self._objects = objects, ModelPool(bundle, objects, choice=self._masks[1].choice)

    def __call__(self, sample: Sample) -> Prediction:
        """Predict a sample.

        Raises:
            SlideError: the model takes other images.
        """
        pixels = sample.image if sample.image.shape[-1] > 1 else sample.image[..., 0]
        with HeldArray(pixels) as held, tempfile.TemporaryDirectory(prefix="cellseg-evaluate-") as folder:
            slide = replace(held, name=sample.name, rgb=pixels.ndim == 3)

            def run(settings: Settings, model_pool: ModelPool, name: str) -> tuple[SlideReport, float]:
                settings = replace(settings, output=Path(folder), name=name, channel=0 if pixels.ndim == 2 else None)
                report = run_images([slide], settings, Unheard(), model_pool=model_pool)
                (outcome,) = report.slides
                if outcome.status != "done":
                    raise SlideError.with_detail(sample.name, outcome.reason)
                return outcome, report.stages.get("model", 0.0)

            drawn, seconds = run(*self._masks, "mask")
            found, _ = run(*self._objects, "objects")
            drawn_labels, ids = _labels_of(drawn), relabel_sequential(_labels_of(found))[0]
            of_object = None
            if class_rule(self._card) is not None:
                assert found.table is not None
                of_object = _classes_in(Path(found.table), [one.name for one in self._card.classes])
        return Prediction(
            # The mask of stars is the middle of objects.
            mask=(ids if self._card.decoder == "stardist" else drawn_labels) > 0,
            labels=ids,
            classes=drawn_labels if _tells_pixels(self._card) else None,
            class_of_object=of_object,
            seconds=seconds,
            downscale=found.downscale,
        )


def _tells_pixels(card: Card) -> bool:
    """Whether a card's model tells the class of every pixel, and not only of objects."""
    return bool(DECODERS[card.decoder].mask_meaning(card).names)


def _labels_of(report: SlideReport) -> NDArray[Any]:
    return np.asarray(zarr.open_array(f"{report.labels}/0", mode="r")[...])


def _classes_in(table: Path, names: list[str]) -> NDArray[np.integer]:
    """Number of the class of each object of a table, in the order of their ids; 0 for none."""
    found = [name for batch in read_batches(table, [CLASS.name]) for name in batch[CLASS.name].to_pylist()]
    return np.array([0 if name is None else 1 + names.index(name) for name in found], np.int64)
