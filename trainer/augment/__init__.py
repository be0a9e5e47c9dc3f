"""Training pictures: random crops and changes of appearance, what a nucleus may look like on a user's slide.

Geometry is drawn and applied per sample in one resampling (scale, rotation, flip, elastic); appearance is drawn per
sample, and simple changes are applied to all samples together.  Every draw comes from the generator that the caller
hands in.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from cellseg_batch.trainer.augment.blank import blank
from cellseg_batch.trainer.augment.stains import REFERENCE, find_stains, separate, show, stain_immune
from cellseg_batch.trainer.data.sample import Sample, normalise
from cellseg_batch.trainer.heads import HEADS
from cellseg_batch.trainer.recipe import Recipe

# Pictures shrunk by more than this are sampled at more points, at most so many a pixel each way: an objective shows no
# finer detail than its camera, so a picture at 20x must not be every second pixel of one at 40x.
_COARSE, _MOST_FINE = 0.75, 4
# Objects are shown at least this wide, in px: of narrower ones there is nothing to learn.
_NARROWEST = 8.0
# The smallest magnification of pictures without objects.
_LEAST_ZOOM_OF_GROUND = 0.45

# How far a crop may reach beyond its image, as a share of its side: the engine mirrors edges, so the network must have
# seen mirrored ones.
_REACH = 1 / 8


@dataclass(frozen=True)
class Batch:
    """A training batch.

    Attributes:
        pixels: (N, 3, S, S) float32 in [0, 1].
        labels: (N, S, S) int64 instance ids, 0 background.
        distance: (N, S, S) float32 distance target in [0, 1].
        classes: (N, S, S) int64 classes of the pixels, 0 background; all background where nobody told them apart.
    """

    pixels: Tensor
    labels: Tensor
    distance: Tensor
    classes: Tensor


class Augmenter:
    """Makes training pictures as a recipe says.

    Args:
        recipe: its framing, size, augmentation, zoom and share of plain pictures are used.
        rng: where every draw comes from.
    """

    def __init__(self, recipe: Recipe, rng: np.random.Generator) -> None:
        self.recipe = recipe
        self.rng = rng

    def batch(self, samples: list[Sample]) -> Batch:
        """One picture of each sample."""
        share = self.recipe.plain if self.recipe.augmentation == "full" else 1.0
        plain = self._chosen(share, len(samples))
        pictures = [self._picture(sample, bool(is_plain)) for sample, is_plain in zip(samples, plain, strict=True)]
        pixels, labels, distance, classes = (torch.stack(parts) for parts in zip(*pictures, strict=True))
        if not plain.all():
            changed = ~plain
            colourful = torch.tensor([_is_colour(sample) for sample in samples])[changed]
            pixels[changed] = self._appearance(pixels[changed], colourful, labels[changed])
        for empty in self._chosen(self.recipe.blank, len(samples)).nonzero():
            pixels[empty] = blank(self.recipe.size, self.rng, self._jpeg)
            labels[empty], distance[empty], classes[empty] = 0, 0, 0
        return Batch(pixels, labels, distance, classes)

    def _uniform(self, low: float, high: float, count: int) -> Tensor:
        return torch.from_numpy(self.rng.uniform(low, high, count).astype(np.float32))

    def _log_uniform(self, low: float, high: float, count: int) -> Tensor:
        return torch.exp(self._uniform(math.log(low), math.log(high), count))

    def _chosen(self, probability: float, count: int) -> Tensor:
        return torch.from_numpy(self.rng.random(count) < probability)

    def _normal(self, deviation: float, *shape: int) -> Tensor:
        return torch.from_numpy(self.rng.normal(0, deviation, shape).astype(np.float32))

    def _between(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def _picture(self, sample: Sample, plain: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pixels (3, S, S), labels (S, S), distance (S, S) and classes (S, S) of one picture."""
        height, width = sample.labels.shape
        zoom = 1.0 if plain else float(self._log_uniform(self._least_zoom(sample), self.recipe.zoom_max, 1))
        fine = min(math.ceil(1 / zoom), _MOST_FINE) if zoom < _COARSE else 1
        positions = torch.stack(self._positions(height, width, plain, zoom, fine))[None]

        def grid_at(positions: Tensor) -> Tensor:
            y, x = positions[0]
            return torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)[None]

        smooth = np.concatenate(
            [normalise(sample.image, sample.bounds), sample.distance[..., None] / np.float32(255)], axis=-1
        )
        sampled = F.grid_sample(
            torch.from_numpy(smooth).permute(2, 0, 1)[None],
            grid_at(positions),
            padding_mode="reflection",
            align_corners=False,
        )
        warped = (F.avg_pool2d(sampled, fine) if fine > 1 else sampled)[0]
        maps = sample.labels if sample.classes is None else np.stack([sample.labels, sample.classes])
        numbers = torch.from_numpy(maps.astype(np.float32)).view(1, -1, height, width)
        centres = grid_at(F.avg_pool2d(positions, fine) if fine > 1 else positions)
        shown = F.grid_sample(numbers, centres, mode="nearest", padding_mode="reflection", align_corners=False)[0]
        labels, classes = shown[0], shown[1] if len(shown) > 1 else torch.zeros_like(shown[0])
        pixels = warped[:-1] if len(warped) == 4 else warped[:1].expand(3, -1, -1)
        if not plain and self.rng.random() < self.recipe.flat:
            pixels = torch.lerp(pixels, flatten(pixels, labels.long()), float(self.rng.uniform(0.7, 1)))
        return pixels, labels.long(), warped[-1] * (labels > 0), classes.long()

    def _least_zoom(self, sample: Sample) -> float:
        """The recipe's smallest magnification, or the one at which this sample's objects are as narrow as is taught."""
        narrowest = _NARROWEST / sample.width if sample.width else _LEAST_ZOOM_OF_GROUND
        return min(max(self.recipe.zoom_min, narrowest), 1.0, self.recipe.zoom_max)

    def _positions(self, height: int, width: int, plain: bool, zoom: float, fine: int) -> tuple[Tensor, Tensor]:
        """Row and column of the image that each pixel of the picture shows; 0 is the first pixel's centre.

        They are (``fine`` S, ``fine`` S): a pixel has so many points each way.
        """
        recipe, size = self.recipe, self.recipe.size
        points = fine * size
        full = not plain
        angle, flip = 0.0, 1.0
        if recipe.augmentation != "none":
            flip = -1.0 if self.rng.random() < 0.5 else 1.0
            angle = math.pi / 2 * int(self.rng.integers(4))
        if full and self.rng.random() < 0.5:
            angle += float(self.rng.uniform(0, 2 * math.pi))
        steps = (torch.arange(points, dtype=torch.float32) - (points - 1) / 2) / (fine * zoom)
        dy, dx = torch.meshgrid(steps, steps * flip, indexing="ij")
        if full and self.rng.random() < 0.3:
            coarse = torch.from_numpy(self.rng.normal(0, 1, (1, 2, 8, 8)).astype(np.float32))
            bend = F.interpolate(coarse, size=(points, points), mode="bicubic", align_corners=True)[0]
            strength = float(self.rng.uniform(1, 6))
            dy, dx = dy + strength * bend[0], dx + strength * bend[1]
        cos, sin = math.cos(angle), math.sin(angle)
        dy, dx = cos * dy - sin * dx, sin * dy + cos * dx
        if recipe.framing == "resize":
            return (height - 1) / 2 + dy * height / size, (width - 1) / 2 + dx * width / size
        half = size / zoom * (1 / 2 - _REACH)
        centre_y = self.rng.uniform(min(half, height / 2), max(height - half, height / 2)) - 0.5
        centre_x = self.rng.uniform(min(half, width / 2), max(width - half, width / 2)) - 0.5
        if plain:
            # Onto whole pixels: outlines are learnt from what was drawn, not from what was interpolated.
            odd = (size - 1) / 2 % 1
            centre_y, centre_x = math.floor(centre_y) + odd, math.floor(centre_x) + odd
        return centre_y + dy, centre_x + dx

    def _appearance(self, pixels: Tensor, colourful: Tensor, labels: Tensor) -> Tensor:
        """Change stain, colour, contrast, focus and noise of pixels (N, 3, S, S); ``labels`` are (N, S, S).

        What tells classes apart is kept: no nuclei become brown, and no picture grey.
        """
        count, has_classes = len(pixels), HEADS[self.recipe.head].has_classes
        every = (count, 1, 1, 1)
        stained = ~colourful & self._chosen(0.15, count)
        if stained.any():
            pixels = torch.where(stained.view(every), self._virtual_stain(pixels), pixels)
        colourful = colourful | stained
        immune = colourful & self._chosen(0 if has_classes else 0.12, count)
        restained = colourful & ~immune & self._chosen(0.8, count)
        pixels = self._each(restained, self._restain, pixels)
        pixels = self._each(immune, self._immune, pixels, labels)
        mix = torch.eye(3) + self._normal(0.12, count, 3, 3)
        mix = mix / mix.sum(dim=2, keepdim=True)
        mixed = torch.einsum("nij,njhw->nihw", mix, pixels)
        pixels = torch.where((colourful & self._chosen(0.5, count)).view(every), mixed, pixels)
        grey = pixels.mean(dim=1, keepdim=True).expand_as(pixels)
        pixels = torch.where(self._chosen(0 if has_classes else 0.1, count).view(every), grey, pixels)

        tint = torch.from_numpy(self.rng.uniform(0.05, 1, (count, 3, 1, 1)).astype(np.float32))
        tint = tint / tint.amax(dim=1, keepdim=True)
        pixels = torch.where((~colourful & self._chosen(0.12, count)).view(every), pixels * tint, pixels)
        pixels = pixels.clamp(0, 1) ** self._log_uniform(0.55, 1.8, count).view(every)
        gain = torch.where(self._chosen(0.5, count), self._log_uniform(0.3, 1.3, count), torch.ones(count))
        # Over-exposed nuclei are even; beside something very bright the others are dim.
        gain = torch.where(~colourful & self._chosen(0.1, count), self._log_uniform(1.3, 4, count), gain)
        gain = torch.where(~colourful & self._chosen(0.1, count), self._log_uniform(0.12, 0.3, count), gain)
        offset = torch.where(self._chosen(0.3, count), self._uniform(-0.1, 0.2, count), torch.zeros(count))
        dim = pixels * gain.view(every) + offset.view(every)
        # On tissue the background is bright, so a loss of contrast is towards white.
        pixels = torch.where(colourful.view(every), 1 - (1 - pixels) * gain.view(every) - offset.view(every) / 2, dim)
        pixels = torch.where(self._chosen(0.1, count).view(every), 1 - pixels, pixels)
        pixels = self._each(self._chosen(0.2, count), self._blur, pixels)
        # A dim picture's noise is less too, or nothing would be left to see.
        sigma = torch.where(self._chosen(0.3, count), self._log_uniform(0.005, 0.08, count), torch.zeros(count))
        sigma = sigma * gain.clamp(max=1).sqrt()
        noise = torch.from_numpy(self.rng.standard_normal(pixels.shape, dtype=np.float32))
        pixels = (pixels + sigma.view(every) * noise).clamp(0, 1)
        packed = self._chosen(0.3, count) & (colourful | self._chosen(0.3, count))
        return self._each(packed, self._jpeg, pixels)

    @staticmethod
    def _each(chosen: Tensor, change: Callable[..., Tensor], pixels: Tensor, *others: Tensor) -> Tensor:
        """Pixels with those of the chosen samples changed, one after the other."""
        parts = zip(chosen, pixels, *others, strict=True)
        return torch.stack([change(picture, *rest) if pick else picture for pick, picture, *rest in parts])

    def _virtual_stain(self, pixels: Tensor) -> Tensor:
        """Fluorescence shown as haematoxylin on a cloudy ground of eosin (Gareau 2009, J. Biomed. Opt. 14:034050)."""
        count, size = len(pixels), self.recipe.size
        signal = pixels.mean(dim=1, keepdim=True)
        cloud = torch.zeros(count, 1, size, size)
        for side in (6, 24, 96):
            cloud = cloud + F.interpolate(self._normal(1, count, 1, side, side), size=(size, size), mode="bilinear")
        eosin = (0.5 + 0.25 * cloud).clamp(min=0) * self._uniform(0, 1, count).view(-1, 1, 1, 1) * (1 - 0.5 * signal)
        haematoxylin = signal * self._log_uniform(0.7, 1.8, count).view(-1, 1, 1, 1)
        density = haematoxylin * REFERENCE[0].view(1, 3, 1, 1) + eosin * REFERENCE[1].view(1, 3, 1, 1)
        return torch.exp(-density)

    def _restain(self, pixels: Tensor) -> Tensor:
        """Change amount and hue of each stain, as from another laboratory (Tellez et al. 2019, arXiv:1902.06543).

        Half of the pictures keep about their own hues, the others take about those of the reference.
        """
        own = find_stains(pixels)
        target = own
        if self.rng.random() < 0.5:
            target = torch.cat([REFERENCE[:2], own[2:]])
        hues = target + self._normal(0.08, 3, 3) * torch.tensor([[1.0], [1.0], [0.5]])
        scale = torch.cat([self._uniform(0.6, 1.6, 1), self._uniform(0.3, 1.6, 1), self._uniform(0.6, 1.4, 1)])
        shift = self._normal(0.04, 3)
        return show(separate(pixels, own) * scale.view(3, 1, 1) + shift.view(3, 1, 1), hues)

    def _immune(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Show tissue as immunohistochemistry, with a share of its nuclei brown."""
        brown = self.rng.random(int(labels.max()) + 1) < self.rng.random()
        brown[0] = False
        positive = F.avg_pool2d(torch.from_numpy(brown)[labels].float()[None, None], 3, 1, 1)[0, 0]
        cytoplasm = self._between(0, 1) if self.rng.random() < 0.5 else 0.0
        return stain_immune(pixels, positive, self._between(0.6, 2.5), cytoplasm, self._between(0.4, 1))

    def _blur(self, pixels: Tensor) -> Tensor:
        """Take a picture out of focus."""
        sigma = float(self._log_uniform(0.5, 2, 1))
        blurred: Tensor = torch.from_numpy(ndimage.gaussian_filter(pixels.numpy(), (0, sigma, sigma)))
        return blurred

    def _jpeg(self, pixels: Tensor) -> Tensor:
        """Store a picture as a scanner does, in blocks of 8 x 8 px that begin anywhere."""
        top, left = (int(start) for start in self.rng.integers(0, 8, 2))
        height, width = pixels.shape[1:]
        padded = np.pad(
            (pixels.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8), ((top, 0), (left, 0), (0, 0)), "edge"
        )
        stored = io.BytesIO()
        Image.fromarray(padded).save(stored, "jpeg", quality=int(self.rng.integers(25, 91)))
        seen = np.asarray(Image.open(stored))[top : top + height, left : left + width]
        return torch.from_numpy(seen / np.float32(255)).permute(2, 0, 1)


def flatten(pixels: Tensor, labels: Tensor) -> Tensor:
    """Pixels (C, H, W) with every object, and the ground, in its mean colour; ``labels`` are (H, W)."""
    ids, where = torch.unique(labels, return_inverse=True)
    where = where.flatten()
    sums = torch.zeros(len(pixels), len(ids)).index_add_(1, where, pixels.flatten(1))
    means = sums / torch.bincount(where, minlength=len(ids))
    return means[:, where].view_as(pixels)


def _is_colour(sample: Sample) -> bool:
    return bool(sample.image.shape[-1] == 3)
