"""Training pictures: random crops and changes of appearance, what a nucleus may look like on a user's slide.

Geometry is drawn and applied per sample in one resampling (scale, rotation, flip, elastic); appearance is
drawn per sample and applied to the whole batch.  Every draw comes from the generator that the caller hands in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cellseg_batch.trainer.data.sample import Sample, normalise
from cellseg_batch.trainer.recipe import Recipe

# Optical density of haematoxylin, eosin and their residual (Ruifrok & Johnston 2001).
_STAINS = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])

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
    """

    pixels: Tensor
    labels: Tensor
    distance: Tensor


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
        pictures = [self._picture(sample, bool(one)) for sample, one in zip(samples, plain, strict=True)]
        pixels, labels, distance = (torch.stack(parts) for parts in zip(*pictures, strict=True))
        if not plain.all():
            colourful = torch.tensor([_is_colour(sample) for sample in samples])
            pixels = torch.where(plain.view(-1, 1, 1, 1), pixels, self._appearance(pixels, colourful))
        return Batch(pixels, labels, distance)

    def _uniform(self, low: float, high: float, count: int) -> Tensor:
        return torch.from_numpy(self.rng.uniform(low, high, count).astype(np.float32))

    def _log_uniform(self, low: float, high: float, count: int) -> Tensor:
        return torch.exp(self._uniform(math.log(low), math.log(high), count))

    def _chosen(self, probability: float, count: int) -> Tensor:
        return torch.from_numpy(self.rng.random(count) < probability)

    def _picture(self, sample: Sample, plain: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels (3, S, S), labels (S, S) and distance (S, S) of one picture."""
        height, width = sample.labels.shape
        y, x = self._positions(height, width, plain)
        grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)[None]
        smooth = np.concatenate(
            [normalise(sample.image, sample.bounds), sample.distance[..., None] / np.float32(255)], axis=-1
        )
        warped = F.grid_sample(
            torch.from_numpy(smooth).permute(2, 0, 1)[None], grid, padding_mode="reflection", align_corners=False
        )[0]
        ids = torch.from_numpy(sample.labels.astype(np.float32))[None, None]
        labels = F.grid_sample(ids, grid, mode="nearest", padding_mode="reflection", align_corners=False)[0, 0]
        pixels = warped[:-1] if len(warped) == 4 else warped[:1].expand(3, -1, -1)
        if not plain and self.rng.random() < self.recipe.flat:
            pixels = torch.lerp(pixels, flatten(pixels, labels.long()), float(self.rng.uniform(0.7, 1)))
        return pixels, labels.long(), warped[-1] * (labels > 0)

    def _positions(self, height: int, width: int, plain: bool) -> tuple[Tensor, Tensor]:
        """Row and column (S, S) of the image that each pixel of the picture shows; 0 is the first pixel's centre."""
        recipe, size = self.recipe, self.recipe.size
        full = not plain
        zoom = float(self._log_uniform(recipe.zoom_min, recipe.zoom_max, 1)) if full else 1.0
        angle, flip = 0.0, 1.0
        if recipe.augmentation != "none":
            flip = -1.0 if self.rng.random() < 0.5 else 1.0
            angle = math.pi / 2 * int(self.rng.integers(4))
        if full and self.rng.random() < 0.5:
            angle += float(self.rng.uniform(0, 2 * math.pi))
        steps = (torch.arange(size, dtype=torch.float32) - (size - 1) / 2) / zoom
        dy, dx = torch.meshgrid(steps, steps * flip, indexing="ij")
        if full and self.rng.random() < 0.3:
            coarse = torch.from_numpy(self.rng.normal(0, 1, (1, 2, 8, 8)).astype(np.float32))
            bend = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)[0]
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

    def _appearance(self, pixels: Tensor, colourful: Tensor) -> Tensor:
        """Change stain, colour, contrast, focus and noise of pixels (N, 3, S, S)."""
        count = len(pixels)
        every = (count, 1, 1, 1)
        stained = ~colourful & self._chosen(0.15, count)
        if stained.any():
            pixels = torch.where(stained.view(every), self._virtual_stain(pixels), pixels)
        colourful = colourful | stained
        restained = colourful & self._chosen(0.8, count)
        if restained.any():
            pixels = torch.where(restained.view(every), self._restain(pixels), pixels)
        mix = torch.eye(3) + torch.from_numpy(self.rng.normal(0, 0.12, (count, 3, 3)).astype(np.float32))
        mix = mix / mix.sum(dim=2, keepdim=True)
        mixed = torch.einsum("nij,njhw->nihw", mix, pixels)
        pixels = torch.where((colourful & self._chosen(0.5, count)).view(every), mixed, pixels)
        grey = pixels.mean(dim=1, keepdim=True).expand_as(pixels)
        pixels = torch.where(self._chosen(0.1, count).view(every), grey, pixels)

        tint = torch.from_numpy(self.rng.uniform(0.05, 1, (count, 3, 1, 1)).astype(np.float32))
        tint = tint / tint.amax(dim=1, keepdim=True)
        pixels = torch.where((~colourful & self._chosen(0.12, count)).view(every), pixels * tint, pixels)
        pixels = pixels.clamp(0, 1) ** self._log_uniform(0.55, 1.8, count).view(every)
        gain = torch.where(self._chosen(0.5, count), self._log_uniform(0.3, 1.3, count), torch.ones(count))
        offset = torch.where(self._chosen(0.3, count), self._uniform(-0.1, 0.2, count), torch.zeros(count))
        dim = pixels * gain.view(every) + offset.view(every)
        # On tissue the background is bright, so a loss of contrast is towards white.
        pixels = torch.where(colourful.view(every), 1 - (1 - pixels) * gain.view(every) - offset.view(every) / 2, dim)
        pixels = torch.where(self._chosen(0.1, count).view(every), 1 - pixels, pixels)
        soft = F.avg_pool2d(F.avg_pool2d(pixels, 3, 1, 1, count_include_pad=False), 3, 1, 1, count_include_pad=False)
        pixels = torch.where(self._chosen(0.15, count).view(every), soft, pixels)
        sigma = torch.where(self._chosen(0.3, count), self._log_uniform(0.005, 0.08, count), torch.zeros(count))
        noise = torch.from_numpy(self.rng.standard_normal(pixels.shape, dtype=np.float32))
        return (pixels + sigma.view(every) * noise).clamp(0, 1)

    def _virtual_stain(self, pixels: Tensor) -> Tensor:
        """Fluorescence shown as haematoxylin on a cloudy ground of eosin (Gareau 2009, J. Biomed. Opt. 14:034050)."""
        count, size = len(pixels), self.recipe.size
        signal = pixels.mean(dim=1, keepdim=True)
        cloud = torch.zeros(count, 1, size, size)
        for side in (6, 24, 96):
            coarse = torch.from_numpy(self.rng.normal(0, 1, (count, 1, side, side)).astype(np.float32))
            cloud = cloud + F.interpolate(coarse, size=(size, size), mode="bilinear")
        eosin = (0.5 + 0.25 * cloud).clamp(min=0) * self._uniform(0, 1, count).view(-1, 1, 1, 1) * (1 - 0.5 * signal)
        haematoxylin = signal * self._log_uniform(0.7, 1.8, count).view(-1, 1, 1, 1)
        stains = _STAINS / _STAINS.norm(dim=1, keepdim=True)
        density = haematoxylin * stains[0].view(1, 3, 1, 1) + eosin * stains[1].view(1, 3, 1, 1)
        return torch.exp(-density)

    def _restain(self, pixels: Tensor) -> Tensor:
        """Change amount and hue of each stain, in optical density (Tellez et al. 2018, 10.1109/TMI.2018.2820199)."""
        count = len(pixels)
        density = -torch.log(pixels.clamp(1 / 255, 1))
        stains = _STAINS / _STAINS.norm(dim=1, keepdim=True)
        amounts = torch.einsum("nchw,cs->nshw", density, torch.linalg.inv(stains))
        scale = torch.from_numpy(self.rng.uniform(0.6, 1.5, (count, 3, 1, 1)).astype(np.float32))
        shift = torch.from_numpy(self.rng.normal(0, 0.04, (count, 3, 1, 1)).astype(np.float32))
        hues = stains + torch.from_numpy(self.rng.normal(0, 0.08, (count, 3, 3)).astype(np.float32))
        return torch.exp(-torch.einsum("nshw,nsc->nchw", amounts * scale + shift, hues.clamp(min=0))).clamp(0, 1)


def flatten(pixels: Tensor, labels: Tensor) -> Tensor:
    """Pixels (C, H, W) with every object, and the ground, in its mean colour; ``labels`` are (H, W)."""
    ids, where = torch.unique(labels, return_inverse=True)
    where = where.flatten()
    sums = torch.zeros(len(pixels), len(ids)).index_add_(1, where, pixels.flatten(1))
    means = sums / torch.bincount(where, minlength=len(ids))
    return means[:, where].view_as(pixels)


def _is_colour(sample: Sample) -> bool:
    return bool(sample.image.shape[-1] == 3)
