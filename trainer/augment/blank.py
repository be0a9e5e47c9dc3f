"""Pictures of nothing: noise as empty wells and glass show it once their few grey values are stretched."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F


def blank(size: int, rng: np.random.Generator, store: Callable[[Tensor], Tensor]) -> Tensor:
    """A picture of noise (3, size, size), stretched to [0, 1] as images are.

    Args:
        size: side in px.
        rng: where every draw comes from.
        store: stores a picture with loss, as JPEG does.
    """
    channels = 3 if rng.random() < 0.5 else 1
    sigma = math.exp(rng.uniform(math.log(0.3), math.log(1.5)))
    grains = ndimage.gaussian_filter(rng.standard_normal((channels, size, size), np.float32), (0, sigma, sigma))
    grains /= grains.std()
    if rng.random() < 0.3:  # a few grains that outshine the others
        grains = np.exp(grains * rng.uniform(0.5, 1.5))
    light = torch.from_numpy(rng.normal(0, rng.uniform(0, 2), (1, 1, 3, 3)).astype(np.float32))
    shade = F.interpolate(light, size=(size, size), mode="bicubic", align_corners=True)[0]
    amplitude = math.exp(rng.uniform(math.log(0.003), math.log(0.05)))
    picture = (rng.uniform(0.05, 0.95) + amplitude * (torch.from_numpy(grains) + shade)).clamp(0, 1).expand(3, -1, -1)
    picture = store(picture) if rng.random() < 0.5 else (picture * 255).round() / 255
    low, high = np.percentile(picture.numpy(), (0.1, 99.9))
    return ((picture - float(low)) / max(float(high - low), 1 / 255)).clamp(0, 1)
