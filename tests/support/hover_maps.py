"""Maps as HoVer-Net would predict them, drawn from nuclei that are known, and how well nuclei come back."""

import numpy as np
from scipy import ndimage

from cellseg_batch.trainer.metrics import instance_overlaps


def crowded_nuclei(height, width, count, seed=0):
    """True labels (H, W) int32 of up to ``count`` ellipses 12 to 28 px across, most of which touch others."""
    rng = np.random.default_rng(seed)
    labels, nearest = np.zeros((height, width), np.int32), np.full((height, width), np.inf)
    centres, radii = np.zeros((0, 2)), np.zeros(0)
    for _ in range(20 * count):
        centre, axes, angle = rng.uniform((0, 0), (height, width)), rng.uniform(6, 14, 2), rng.uniform(0, np.pi)
        axes[1] = np.clip(axes[1], 0.65 * axes[0], axes[0] / 0.65)
        radius = np.sqrt(axes.prod())
        if (np.hypot(*(centres - centre).T) < 0.9 * (radii + radius)).any():
            continue
        centres, radii = np.vstack([centres, centre]), np.append(radii, radius)
        (y0, x0), (y1, x1) = (
            np.maximum(centre - 16, 0).astype(int),
            np.minimum(centre + 17, (height, width)).astype(int),
        )
        y, x = np.mgrid[y0:y1, x0:x1] - centre[:, None, None]
        along, across = np.cos(angle) * y + np.sin(angle) * x, np.cos(angle) * x - np.sin(angle) * y
        distance = np.hypot(along / axes[0], across / axes[1])
        inside = (distance < 1) & (distance < nearest[y0:y1, x0:x1])
        labels[y0:y1, x0:x1][inside], nearest[y0:y1, x0:x1][inside] = len(radii), distance[inside]
        if len(radii) == count:
            break
    return labels


def draw_maps(labels, seed=0, noise=0.1):
    """Logit of the foreground, horizontal and vertical map (3, H, W) float32 of true labels, blurred and noisy."""
    rng = np.random.default_rng(seed)
    maps = np.zeros((3, *labels.shape))
    maps[0] = np.where(labels, 4, -4)
    for number, box in enumerate(ndimage.find_objects(labels), 1):
        if box is None:
            continue
        inside = labels[box] == number
        centre = ndimage.center_of_mass(inside)
        for axis in (0, 1):
            offsets = np.nonzero(inside)[axis] - centre[axis]
            ends = np.where(offsets < 0, -offsets.min(), offsets.max())
            maps[2 - axis][box][inside] = offsets / np.maximum(ends, 1)
    blurred = ndimage.gaussian_filter(maps, (0, 0.7, 0.7))
    grain = ndimage.gaussian_filter(rng.normal(size=maps.shape), (0, 1, 1))
    amplitude = np.array([10, 1, 1])[:, None, None] * noise
    return (blurred + amplitude * grain / grain.std()).astype(np.float32)


def f1_of(labels, others, core):
    """F1 at an IoU of 0.5 of two label images, over the objects of each that touch no edge of a core (h, w)."""
    y, x = np.indices(labels.shape)
    edge = (y % core[0] % (core[0] - 1) == 0) | (x % core[1] % (core[1] - 1) == 0)
    ious, shares = instance_overlaps(labels, others).ious, []
    for image, axis in ((labels, 1), (others, 0)):
        whole = np.setdiff1d(image, image[edge])
        shares.append(np.mean((ious > 0.5).any(axis)[whole[whole > 0] - 1]))
    return 2 * np.prod(shares) / sum(shares)
