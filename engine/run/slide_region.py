"""Settle which tiles of a slide are computed for a region, and confine blocks, masks and probabilities to it.

An object belongs to a region if its centroid lies inside, and then it is whole, so tiles around the region are computed
too.  Growth ends some px from its seed, but nothing bounds a seed; `LARGEST_OBJECT` is taken as a bound, and objects
that reach beyond what is computed are counted.  Which tiles are computed depends on the region and the lattice alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.errors import OutputError, ReadError, SlideError, UsageError
from cellseg_batch.engine.geometry import Box, Lattice, count_in_spans
from cellseg_batch.engine.inference.prediction import BlockResult
from cellseg_batch.engine.objects.seeds import InstanceRule
from cellseg_batch.engine.run.records import RegionIdentity
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.slides.ome_zarr import is_zarr_node
from cellseg_batch.engine.slides.region import Inside, Region, open_region, region_for
from cellseg_batch.engine.slides.slide import Slide
from cellseg_batch.engine.storage.paths import RemotePath
from cellseg_batch.kernels.instances import reach
from cellseg_batch.kernels.moments import HALO
from cellseg_batch.trainer.card import Card

# Side in px of the model's image of the box around an object that is sure to be whole.  Nuclei that look larger than
# half of it are shown to the model downscaled.
LARGEST_OBJECT = 256


@dataclass(frozen=True)
class SlideRegion:
    """The region of a slide.

    Attributes:
        path: file or store of the region.
        identity: what decides pixels.
        grid: number of tiles along y and x.
        tiles: a bit for each tile of a plane in raster order, whether it is computed (`numpy.packbits`).
    """

    path: Path
    identity: RegionIdentity
    grid: tuple[int, int]
    tiles: bytes

    @property
    def computed(self) -> Inside:
        """Whether each tile of a plane is computed, (rows, columns)."""
        bits = np.unpackbits(np.frombuffer(self.tiles, np.uint8), count=self.grid[0] * self.grid[1])
        return bits.astype(np.bool_).reshape(self.grid)

    def open(self, slide: Slide, level: int) -> Region:
        """Open the region, as it was when the slide was planned.

        Raises:
            ReadError: it cannot be read any more.
            OutputError: it has changed.
        """
        with of_slide(slide):
            region = open_region(self.path, slide, slide.plane_shape(level), self.identity.mask_class)
            if region.sha256 != self.identity.mask_sha256:
                region.close()
                raise OutputError(
                    str(self.path),
                    expected="the region that this run began with",
                    found="another one",
                    cause="it has been edited meanwhile",
                    remedy="put it back and run again, or use `overwrite` for the new one",
                )
            return region

    def edge(self, box: Box, lattice: Lattice, width: int) -> Inside:
        """Whether a tile that is not computed lies within ``width`` px of each pixel of a box, (h, w)."""

        def spans(axis: int, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
            """The spans of tiles around pixels ``start`` to ``stop``, each once, and the index of each pixel's."""
            pixels, core = np.arange(start, stop), lattice.core[axis]
            first = np.maximum(pixels - width, 0) // core
            last = np.minimum(pixels + width, lattice.shape[axis] - 1) // core
            different, index = np.unique([first, last + 1], axis=1, return_inverse=True)
            return different, index.ravel()

        (down, rows), (across, columns) = spans(0, box.y0, box.y1), spans(1, box.x0, box.x1)
        left_out = count_in_spans(~self.computed, (down[0], down[1]), (across[0], across[1])) > 0
        near: Inside = left_out[rows][:, columns]
        return near


@contextmanager
def of_slide(slide: Slide) -> Iterator[None]:
    """Turn an error about a region into one about its slide, whose reason names the region."""
    try:
        yield
    except SlideError as error:
        raise type(error).with_detail(slide.location, str(error)) from error


def refuse_region(settings: Settings, card: Card) -> None:
    """Refuse regions where settings or model cannot keep them.

    Raises:
        UsageError: tiles are blended, or instances are stars.
    """
    if settings.stitch == "blend":
        raise UsageError(
            "`mask`",
            expected="`stitch=crop`: tiles that fade into each other are all computed",
            found="`stitch=blend`",
            remedy="leave it out",
        )
    if settings.makes_ids and card.decoder == "stardist":
        raise UsageError(
            "`mask`",
            expected="a model whose objects grow from seeds",
            found=f"stars of {card.name}, each of which may depend on others far away",
            remedy="leave `instances` and `objects` out for a mask, or take another model",
        )


def region_path(slide: Slide, settings: Settings) -> Path | None:
    """The absolute path of a slide's region: its own, else that of the settings; None if it has none.

    Raises:
        ReadError: it does not exist.
    """
    path = slide.asked.mask or settings.mask
    if path is None:
        return None
    path = path if isinstance(path, RemotePath) else path.absolute()
    if path.is_file() or is_zarr_node(path):
        return path
    with of_slide(slide):
        if path.is_dir():
            return region_for(path, slide)
        raise ReadError(
            str(path),
            expected="the region of an image, or a folder of regions",
            found="nothing",
            remedy="check the path",
        )


def check_region(slide: Slide, level: int, settings: Settings) -> None:
    """Read the region of a slide, if it has one, but draw nothing of it.

    Raises:
        ReadError: it cannot be read, or lies outside the slide.
    """
    path = region_path(slide, settings)
    if path is not None:
        with of_slide(slide):
            open_region(path, slide, slide.plane_shape(level), settings.mask_class).close()


def reach_of(rule: InstanceRule | None) -> int:
    """How many px around a region are computed: for instances, so that those whose centroid lies inside are whole.

    Beside the object, its growth needs the seeds around it, and these as many pixels as make them count.
    """
    if rule is None:
        return 0
    return largest_object(rule) + reach(rule.steps) + HALO + rule.smallest_seed


def largest_object(rule: InstanceRule) -> int:
    """Side in px of the slide of the box around an object that is sure to be whole."""
    return LARGEST_OBJECT * rule.downscale


def settle_region(slide: Slide, level: int, lattice: Lattice, reach: int, settings: Settings) -> SlideRegion | None:
    """Settle the region of a slide; None if it has none.

    Args:
        slide: the image.
        level: level that is processed.
        lattice: tiles of the level.
        reach: how many px around the region are computed.
        settings: settings of the run.

    Raises:
        ReadError: the region cannot be read, or no pixel of the slide lies in it.
    """
    path = region_path(slide, settings)
    if path is None:
        return None
    with of_slide(slide), open_region(path, slide, lattice.shape, settings.mask_class) as region:
        area, tiles = _survey(region, lattice, reach)
        if not area:
            raise ReadError(
                str(path),
                expected=f"at least one pixel of level {level} inside",
                found="none",
                cause="a label image of zeros, or outlines thinner than a pixel",
                remedy="draw the region again, or leave this image out",
            )
        identity = RegionIdentity(region.sha256, settings.mask_class, area, reach)
    return SlideRegion(path, identity, lattice.grid, np.packbits(tiles).tobytes())


def _survey(region: Region, lattice: Lattice, reach: int) -> tuple[int, Inside]:
    """The number of pixels in a region, and whether each tile (rows, columns) has some within ``reach`` px."""
    rows, columns = lattice.grid
    (height, width), area = lattice.core, 0
    tiles = np.zeros(lattice.grid, np.bool_)
    for row in range(rows):
        for column in range(columns):
            core = lattice.tile_at(row, column).core
            inside = region.inside(core)
            count = int(np.count_nonzero(inside))
            if not count:
                continue
            area += count
            y, x = (np.flatnonzero(inside.any(axis=axis)) for axis in (1, 0))
            top, bottom = core.y0 + y[0] - reach, core.y0 + y[-1] + reach
            left, right = core.x0 + x[0] - reach, core.x0 + x[-1] + reach
            near_rows = slice(max(0, top // height), bottom // height + 1)
            tiles[near_rows, max(0, left // width) : right // width + 1] = True
    return area, tiles


def cut(result: BlockResult, inside: Inside) -> BlockResult:
    """The result of a block without what lies outside the region.

    Args:
        result: mask, or classes, of the block.
        inside: (h, w), whether each pixel lies in the region.
    """
    mask = result.mask * inside
    probability = None if result.probability is None else result.probability * inside
    return replace(result, mask=mask, probability=probability, foreground=int(np.count_nonzero(mask)))
