"""List the decoders, which say how the logits of a model become pixels.

A card names its decoder; `cellseg_batch.trainer.card.DECODER_OUTPUTS` has the outputs that each decoder takes.  A
decoder knows logits and kernels; it must not know backends, tiles or slides.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.objects.seeds import InstanceRule
from cellseg_batch.engine.slides.pixel_meaning import CLASSES, MASK, PixelMeaning
from cellseg_batch.kernels.hover import HoverRule, hover_rule
from cellseg_batch.kernels.instances import SeedRule, seed_rule
from cellseg_batch.kernels.stitch import logit_threshold, sigmoid
from cellseg_batch.trainer.bundle import Bundle
from cellseg_batch.trainer.card import BACKGROUND, Card

_OPACITY = 160

PixelWriter = Callable[[Any, Any, Any], Any]
"""Function that writes pixels: (logits, places or grid, out) -> (foreground pixels, NaN logits).

Logits (N, K, T_y, T_x) are those of some tiles for `crop`, with the places of their cores, and those of a whole
`TileGrid` for `blend`; ``out`` is (h, w) uint8.
"""


class Decoder:
    """Rules by which logits become pixels; unless a decoder says otherwise, the first output is the foreground's.

    A decoder is an object in `DECODERS`. Plans hold its name, as they travel between processes.

    Attributes:
        name: value of `Card.decoder`.
        mask_outputs: outputs that a mask needs, in the network's order.
    """

    name: ClassVar[str]
    mask_outputs: ClassVar[tuple[str, ...]] = ("foreground",)

    def network(self, bundle: Bundle, *, instances: bool) -> Bundle:
        """Return the model with the outputs that instances need, which are all, or with those that a mask needs."""
        return bundle if instances else bundle.with_outputs(self.mask_outputs)

    def mask_meaning(self, card: Card) -> PixelMeaning:
        """Return the meaning of the pixels of a mask of a card's model."""
        return MASK

    def probability(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the probability (N, H, W) of logits (N, K, H, W), to compare results."""
        return sigmoid(logits[:, 0])

    def mask(self, logits: NDArray[np.float32], threshold: float) -> NDArray[Any]:
        """Return the mask (N, H, W) of logits (N, K, H, W): where the probability is above ``threshold``.

        Gate and `verify-seams` compare two masks for equality; the working scale measures what is not 0.
        """
        mask: NDArray[np.bool_] = logits[:, 0] > logit_threshold(threshold)
        return mask

    def mask_writer(self, stitch: str, threshold: float, kernels: Any) -> PixelWriter:
        """Make the writer of masks.

        Args:
            stitch: crop or blend.
            threshold: probability above which a pixel is foreground.
            kernels: module with the functions of `cellseg_batch.kernels.stitch` for the arrays at hand.
        """
        write = kernels.stitch_mask if stitch == "crop" else kernels.blend_mask
        limit = logit_threshold(threshold)
        return lambda logits, where, out: write(logits, where, limit, out)

    def probability_writer(self, stitch: str, kernels: Any) -> PixelWriter:
        """Make the writer of probabilities, which counts nothing; arguments as `mask_writer`."""
        writer: PixelWriter = kernels.stitch_probability if stitch == "crop" else kernels.blend_probability
        return writer


class GrowingDecoder(Decoder, ABC):
    """Rules by which logits become the pixel codes from which instances grow."""

    def instance_rule(self, card: Card, downscale: int = 1) -> InstanceRule:
        """Return the rule for the instances of a slide that is downscaled by this factor for the model."""
        return InstanceRule(card.instances, downscale)

    def reach(self, rule: InstanceRule) -> int:
        """Return how many px around a pixel decide its code, beside those that decide its logits."""
        return 0

    @abstractmethod
    def code_writer(self, rule: InstanceRule, threshold: float, kernels: Any) -> PixelWriter:
        """Make the writer of pixel codes, from which seeds grow into instances; for `crop`.

        Args:
            rule: rule for the instances of the slide.
            threshold: probability above which a pixel is foreground.
            kernels: module with the functions of `cellseg_batch.kernels.pixel_codes` for the arrays at hand.
        """


class Mask(GrowingDecoder):
    """Takes the foreground alone; every component of the foreground is an object."""

    name: ClassVar[str] = "mask"

    def code_writer(self, rule: InstanceRule, threshold: float, kernels: Any) -> PixelWriter:
        """See `GrowingDecoder.code_writer`."""
        limit = logit_threshold(threshold)
        return lambda logits, places, out: kernels.classify_foreground(logits, places, limit, out)


class Seeds(GrowingDecoder):
    """Takes foreground, border and distance; seeds lie where distance minus border is high."""

    name: ClassVar[str] = "seeds"

    def reach(self, rule: InstanceRule) -> int:
        """See `GrowingDecoder.reach`."""
        return self._seed_rule(rule, 0.5).reach

    def code_writer(self, rule: InstanceRule, threshold: float, kernels: Any) -> PixelWriter:
        """See `GrowingDecoder.code_writer`."""
        seeds = self._seed_rule(rule, threshold)
        return lambda logits, places, out: kernels.classify_pixels(logits, places, seeds, out)

    def _seed_rule(self, rule: InstanceRule, threshold: float) -> SeedRule:
        card = rule.card
        assert card is not None
        return seed_rule(
            logit_threshold(threshold),
            card.border_weight,
            card.smoothing,
            rule.downscale,
            card.seed_level,
            card.border_level,
        )


class Hover(GrowingDecoder):
    """Takes foreground, horizontal and vertical map of HoVer-Net; seeds lie where both maps rise."""

    name: ClassVar[str] = "hover"

    def instance_rule(self, card: Card, downscale: int = 1) -> InstanceRule:
        """See `GrowingDecoder.instance_rule`."""
        return InstanceRule(None, downscale, card.hover)

    def reach(self, rule: InstanceRule) -> int:
        """See `GrowingDecoder.reach`."""
        return self._hover_rule(rule, 0.5).reach

    def code_writer(self, rule: InstanceRule, threshold: float, kernels: Any) -> PixelWriter:
        """See `GrowingDecoder.code_writer`."""
        maps = self._hover_rule(rule, threshold)
        return lambda logits, places, out: kernels.classify_maps(logits, places, maps, out)

    def _hover_rule(self, rule: InstanceRule, threshold: float) -> HoverRule:
        hover = rule.hover
        assert hover is not None
        return hover_rule(logit_threshold(threshold), rule.downscale, hover.seed_level, hover.border_level)


class StarDist(Decoder):
    """Takes an object's probability and its rays; the mask is where the probability is high, the middle of objects.

    Its instances are stars, which `stitching` collects; they do not grow.
    """

    name: ClassVar[str] = "stardist"
    mask_outputs: ClassVar[tuple[str, ...]] = ("probability",)


class Classes(GrowingDecoder):
    """Gives every pixel the number of its likeliest class; instances are the components of all classes together.

    A pixel's logit is that of its likeliest class less that of the background.
    """

    name: ClassVar[str] = "classes"
    mask_outputs: ClassVar[tuple[str, ...]] = (BACKGROUND,)

    def network(self, bundle: Bundle, *, instances: bool) -> Bundle:
        """See `Decoder.network`; a mask needs all outputs."""
        return bundle

    def mask_meaning(self, card: Card) -> PixelMeaning:
        """See `Decoder.mask_meaning`."""
        numbered = list(enumerate(card.classes, start=1))
        colours = tuple((number, (*bytes.fromhex(one.colour[1:]), _OPACITY)) for number, one in numbered)
        names = tuple((number, one.name) for number, one in numbered)
        return PixelMeaning(CLASSES, "uint8", is_label=True, colours=colours, names=names)

    def probability(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        """See `Decoder.probability`."""
        return sigmoid(_over_background(logits)[:, 0])

    def mask(self, logits: NDArray[np.float32], threshold: float) -> NDArray[Any]:
        """Return the classes (N, H, W) of logits (N, K, H, W)."""
        inside = _over_background(logits)[:, 0] > logit_threshold(threshold)
        return np.where(inside, 1 + logits[:, 1:].argmax(axis=1), 0).astype(np.uint8)

    def mask_writer(self, stitch: str, threshold: float, kernels: Any) -> PixelWriter:
        """See `Decoder.mask_writer`; only for crop."""
        limit = logit_threshold(threshold)
        return lambda logits, places, out: kernels.stitch_classes(logits, places, limit, out)

    def probability_writer(self, stitch: str, kernels: Any) -> PixelWriter:
        """See `Decoder.probability_writer`; only for crop."""
        return lambda logits, places, out: kernels.stitch_probability(_over_background(logits), places, out)

    def code_writer(self, rule: InstanceRule, threshold: float, kernels: Any) -> PixelWriter:
        """See `GrowingDecoder.code_writer`."""
        limit = logit_threshold(threshold)
        return lambda logits, places, out: kernels.classify_foreground(_over_background(logits), places, limit, out)


def _over_background(logits: Any) -> Any:
    """Logits (N, 1, H, W) of the likeliest class, less those of the background; an array, or a tensor on a GPU."""
    classes, background = logits[:, 1:], logits[:, :1]
    best = classes.max(axis=1, keepdims=True) if isinstance(logits, np.ndarray) else classes.amax(1, keepdim=True)
    return best - background


DECODERS: dict[str, Decoder] = {decoder.name: decoder for decoder in (Mask(), Seeds(), Hover(), Classes(), StarDist())}
"""Name in a card -> decoder."""
