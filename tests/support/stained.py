"""Pictures that look like H&E on glass, and scans of them: ragged tissue, lone nuclei, dust, noise, JPEG."""

import io
from dataclasses import dataclass
from functools import cache

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

GLASS = (243, 240, 242)
_STROMA, _NUCLEUS = (226, 176, 204), (104, 74, 146)


@dataclass(frozen=True)
class Stained:
    """A picture, and what is in it.

    Attributes:
        pixels: (H, W, 3) uint8.
        tissue: (H, W), whether each pixel lies in a piece of tissue.
        nuclei: (n, 3) centre (y, x) and radius of each nucleus in px.
    """

    pixels: NDArray[np.uint8]
    tissue: NDArray[np.bool_]
    nuclei: NDArray[np.float64]


def ragged(side, pieces, share, seed=0):
    """Whether each pixel (side, side) lies in one of some ragged pieces, which have about that share of the area."""
    rng = np.random.default_rng(seed)
    inside = np.zeros((side, side), bool)
    across = int(np.ceil(np.sqrt(pieces)))
    y, x = np.mgrid[:side, :side].astype(np.float32)
    for number in range(pieces):
        centre_y, centre_x = ((part + rng.uniform(0.45, 0.55)) * side / across for part in divmod(number, across))
        angle, wobble = np.arctan2(y - centre_y, x - centre_x), 1.0
        for waves in range(1, 8):
            wobble = wobble + rng.normal(0, 0.07) * np.cos(waves * angle + rng.uniform(0, 7))
        inside |= np.hypot(y - centre_y, x - centre_x) < wobble * np.sqrt(share / pieces / np.pi) * side
    return inside


def stained(side, pieces=2, share=0.1, lone=6, dust=8, seed=0):
    """A `Stained` picture of ``side`` px with so many lone nuclei and grains of dust on the glass."""
    rng = np.random.default_rng(seed)
    tissue = ragged(side, pieces, share, seed) if pieces else np.zeros((side, side), bool)
    pixels = np.empty((side, side, 3), np.float32)
    pixels[:] = GLASS
    pixels[tissue] = _STROMA
    pixels += rng.normal(0, 1.5, pixels.shape) + tissue[..., None] * rng.normal(0, 8, (side, side, 1))
    places = rng.uniform(16, side - 16, (side * side // 1500, 2))
    in_tissue = tissue[tuple(places.astype(int).T)]
    nuclei = [(*place, rng.uniform(4, 7)) for place in [*places[in_tissue], *places[~in_tissue][:lone]]]
    grains = [(*place, rng.uniform(1, 5)) for place in places[~in_tissue][lone : lone + dust]]
    for spots, colour in ((nuclei, np.array(_NUCLEUS)), (grains, np.array(GLASS) * 0.4)):
        for y, x, radius in spots:
            window = np.s_[int(y) - 9 : int(y) + 10, int(x) - 9 : int(x) + 10]
            rows, columns = np.ogrid[window]
            pixels[window][np.hypot(rows - y, columns - x) <= radius] = colour
    stream = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=75)
    return Stained(np.asarray(Image.open(stream)), tissue, np.array(nuclei).reshape(-1, 3))


def write_scan(path, pixels, factors=(1, 4), low=None):
    """Write (H, W, 3) pixels as a tiled TIFF of 0.5 µm/px with levels so many times smaller; returns ``path``.

    Args:
        path: the file.
        pixels: pixels of any dtype.
        factors: how many times smaller each level is.
        low: pixels that the lower levels show instead.
    """
    with tifffile.TiffWriter(path) as tiff:
        for factor in factors:
            shown = pixels if low is None or factor == 1 else low
            side = [length // factor for length in shown.shape[:2]]
            parts = shown[: side[0] * factor, : side[1] * factor].reshape(side[0], factor, side[1], factor, -1)
            tiff.write(
                parts.mean(axis=(1, 3)).astype(pixels.dtype),
                photometric="rgb",
                tile=(256, 256),
                compression="deflate",
                resolution=(20_000 / factor, 20_000 / factor),
                resolutionunit="CENTIMETER",
                subifds=len(factors) - 1 if factor == 1 else 0,
                subfiletype=int(factor > 1),
                extrasamples=["unassalpha"] if shown.shape[2] == 4 else None,
            )
    return path


def write_whole_slide(path, cells, tissue, glass, lone=(), seed=0):
    """Write a JPEG-compressed slide of 0.5 µm/px with levels 1, 4 and 16 times smaller; returns ``path``.

    Tiles that show one picture alone are encoded once, so a slide of 32768 px takes seconds.

    Args:
        path: the TIFF.
        cells: (n, n) whether each square of 32 px is tissue.
        tissue, glass: pictures (512, 512, 3) to choose from.
        lone: (row, column) of tiles that show the last picture of ``glass`` instead of another one of them.
        seed: of the choice.
    """
    side, per_tile = 512, 16
    count = len(cells) // per_tile
    rng = np.random.default_rng(seed)
    choices = rng.integers(0, len(tissue), (count, count)), rng.integers(0, len(glass) - 1, (count, count))
    choices[1][tuple(np.array(lone, int).reshape(-1, 2).T)] = len(glass) - 1

    def tile(row, column, factor):
        inside = cells[row * per_tile : (row + 1) * per_tile, column * per_tile : (column + 1) * per_tile]
        kinds = [int(one[row, column]) for one in choices]
        if inside.all() or not inside.any():
            return plain(bool(inside.all()), kinds[not inside.all()], factor)
        chosen = np.kron(inside, np.ones((32, 32), bool))[..., None]
        return smaller(np.where(chosen, tissue[kinds[0]], glass[kinds[1]]), factor)

    @cache
    def plain(is_tissue, kind, factor):
        return smaller((tissue if is_tissue else glass)[kind], factor)

    def smaller(pixels, factor):
        return pixels.reshape(side // factor, factor, side // factor, factor, 3).mean(axis=(1, 3)).astype(np.uint8)

    @cache
    def encoded(is_tissue, kind):
        return encode(plain(is_tissue, kind, 1))

    def encode(pixels):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", quality=75)
        return stream.getvalue()

    def tiles(factor):
        for top in range(0, count, factor):
            for left in range(0, count, factor):
                inside = cells[top * per_tile : (top + 1) * per_tile, left * per_tile : (left + 1) * per_tile]
                if factor == 1 and (inside.all() or not inside.any()):
                    yield encoded(bool(inside.all()), int(choices[not inside.all()][top, left]))
                    continue
                parts = [[tile(top + y, left + x, factor) for x in range(factor)] for y in range(factor)]
                yield encode(np.concatenate([np.concatenate(row, axis=1) for row in parts]))

    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for factor in (1, 4, 16):
            tiff.write(
                tiles(factor),
                shape=(count * side // factor, count * side // factor, 3),
                dtype="uint8",
                photometric="ycbcr",
                subsampling=(2, 2),
                compression="jpeg",
                tile=(side, side),
                resolution=(20_000 / factor, 20_000 / factor),
                resolutionunit="CENTIMETER",
                subifds=2 if factor == 1 else 0,
                subfiletype=int(factor > 1),
            )
    return path
