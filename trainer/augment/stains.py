"""The colours of tissue: amounts of stain in optical density (Beer and Lambert), and pictures of them.

Pixels are (3, H, W) in [0, 1]; stains are three rows of RGB densities, each of length 1; amounts are (3, H, W).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Haematoxylin, eosin and DAB (Ruifrok & Johnston 2001, Anal. Quant. Cytol. Histol. 23:291).
REFERENCE = F.normalize(torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]]))

# Of the pixels that stains are estimated from: below this density a pixel shows glass.
_GLASS = 0.2
# Every so many pixels, and at least so many of them.
_EVERY, _FEWEST = 7, 200
# Two stains whose directions have a larger cosine than this are one.
_ALIKE = 0.98


def density_of(pixels: Tensor) -> Tensor:
    """Optical density, 0 for white."""
    return -torch.log(pixels.clamp(1 / 255, 1))


def separate(pixels: Tensor, stains: Tensor) -> Tensor:
    """How much of each stain every pixel has."""
    return torch.einsum("chw,cs->shw", density_of(pixels), torch.linalg.inv(stains))


def show(amounts: Tensor, stains: Tensor) -> Tensor:
    """The pixels that amounts of stains look like."""
    return torch.exp(-torch.einsum("shw,sc->chw", amounts, stains)).clamp(0, 1)


def find_stains(pixels: Tensor) -> Tensor:
    """The picture's own haematoxylin and eosin, and the direction that neither explains.

    The two stains are the outermost directions in the plane that holds most of the density (Macenko et al. 2009,
    10.1109/ISBI.2009.5193250).  Of a picture with less than two stains it gives the reference's.
    """
    density = density_of(pixels).flatten(1)[:, ::_EVERY].T
    density = density[density.norm(dim=1) > _GLASS]
    if len(density) < _FEWEST:
        return REFERENCE
    plane = torch.linalg.eigh(density.T @ density)[1][:, 1:].flip(1)
    plane = plane * torch.where(plane.sum(dim=0) < 0, -1.0, 1.0)
    angle = torch.atan2(density @ plane[:, 1], density @ plane[:, 0])
    ends = torch.quantile(angle, torch.tensor([0.01, 0.99]))
    first, second = F.normalize((plane @ torch.stack([ends.cos(), ends.sin()])).clamp(min=0).T)
    if first @ second > _ALIKE:
        return REFERENCE
    # Haematoxylin is the bluer of the two: it takes more of the red.
    pair = (first, second) if first[0] > second[0] else (second, first)
    return torch.stack([*pair, F.normalize(torch.linalg.cross(*pair), dim=0)])


def stain_immune(pixels: Tensor, positive: Tensor, brown: float, cytoplasm: float, blue: float) -> Tensor:
    """H&E shown as immunohistochemistry: haematoxylin as counterstain, and DAB.

    Args:
        pixels: of H&E.
        positive: (H, W), 1 where nuclei are brown.
        brown: how much DAB these have, as a share of their haematoxylin.
        cytoplasm: how much DAB there is where eosin was, as a share of it.
        blue: how much of the haematoxylin is left in the others.
    """
    haematoxylin, eosin, _ = separate(pixels, REFERENCE).clamp(min=0)
    amounts = [
        haematoxylin * blue * (1 - 0.7 * positive),
        0.1 * eosin,
        brown * positive * haematoxylin + cytoplasm * eosin,
    ]
    return show(torch.stack(amounts), REFERENCE)
