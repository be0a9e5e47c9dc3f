"""Write any readable image as OME-Zarr 0.5, in memory that does not grow with the image.

A conversion keeps a journal of its shards, like a segmentation, so a killed conversion goes on where it stopped. Until
the conversion is complete, the target has a mark instead of image metadata, so that nothing takes it for a whole image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import zarr
from yaozarrs import v05

from cellseg_batch.engine.errors import CellsegError, OutputError, UsageError, writing_to
from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.scheduling.scheduler import TaskGroup, ThreadPool, Workflow, run_workflows
from cellseg_batch.engine.scheduling.signals import Stop
from cellseg_batch.engine.slides.convert_layout import channel_count, channel_groups, halve, lay_out_image
from cellseg_batch.engine.slides.discover import find_images, journals_of
from cellseg_batch.engine.slides.formats import format_of
from cellseg_batch.engine.slides.label_layout import Layout, multiscale
from cellseg_batch.engine.slides.ome_zarr import OUTPUT_MARK
from cellseg_batch.engine.slides.reader import SlideReader
from cellseg_batch.engine.slides.slide import Slide, UnreadableImage
from cellseg_batch.engine.slides.writer import ImageWriter
from cellseg_batch.engine.storage.journal import Journal, sweep_partials
from cellseg_batch.engine.storage.lock import LOCK_SUFFIX, BusyError, Locks
from cellseg_batch.engine.storage.paths import printable, zarr_store

_COLOURS = ("0000FF", "00FF00", "FF0000", "FF00FF", "00FFFF", "FFFF00")


@dataclass(frozen=True)
class Conversion:
    """Result of converting an image.

    Attributes:
        source: location of the image.
        target: group that the image is written to.
        status: done, skipped (finished already), failed or held (another process converts the image).
        reason: why the image is not done; "" if it is.
        shapes: shape of each level.
    """

    source: str
    target: str
    status: str
    reason: str = ""
    shapes: tuple[tuple[int, ...], ...] = ()


def convert(
    source: Path,
    target: Path,
    *,
    axes: str | None,
    workers: int,
    overwrite: bool,
    found: Callable[[int], None],
    advanced: Callable[[int], None],
    stop: Stop | None = None,
) -> Iterator[Conversion]:
    """Write every image below ``source`` to the store ``target``.

    A single image goes to the root of the store; several images go to groups of their names.

    Args:
        source: a file, a folder of files, or a zarr store of plain arrays.
        target: a store; its name ends in ``.zarr``.
        axes: order of the axes of arrays and TIFFs that do not name theirs.
        workers: number of shards in flight.
        overwrite: replace whatever lies at the target.
        found: called once with the number of pixels of all images, over all channels and planes.
        advanced: called with the number of pixels that have been written since the last call.
        stop: asks the conversion to end early.

    Raises:
        UsageError: there is no image, or the target is no possible store.
        Stopped: ``stop`` asked the conversion to end.
    """
    _refuse_target(source, target)
    images = find_images(source, axes)
    found(sum(math.prod(image.levels[0].shape) for image in images if isinstance(image, Slide)))
    paths = [image.name.partition("/")[2] if len(images) > 1 else "" for image in images]
    pairs = zip(images, paths, strict=True)
    locks = Locks()
    workflows = (_workflow(image, target, path, overwrite, advanced, locks) for image, path in pairs)
    try:
        yield from run_workflows(workflows, ThreadPool(workers), stop)
    finally:
        locks.close()


def _refuse_target(source: Path, target: Path) -> None:
    if target.suffix != ".zarr":
        raise UsageError(str(target), expected="a name that ends in .zarr", found=target.name, remedy="add .zarr to it")
    if target.resolve().is_relative_to(source.resolve()):
        raise UsageError(
            str(target), expected="a store outside the source", found=f"one inside {source}", remedy="choose another"
        )


def _workflow(
    image: Slide | UnreadableImage,
    store: Path,
    path: str,
    overwrite: bool,
    advanced: Callable[[int], None],
    locks: Locks,
) -> Workflow[Conversion]:
    """Convert an image. An error that concerns this image alone is in the result."""
    target = str(store / path)
    if isinstance(image, UnreadableImage):
        return Conversion(image.path, target, "failed", image.reason)
    if image.holds_labels:
        reason = f"it is {format_of(image).describe(image)} already; segment it as it is"
        return Conversion(image.location, target, "failed", reason)
    layout = lay_out_image(image)
    journal = Journal(journals_of(store) / path / "convert")
    copy = _Copy(image, ImageWriter(store, path, layout), journal)
    lock = journal.folder.with_name(journal.folder.name + LOCK_SUFFIX)
    try:
        with locks.hold(lock):
            finished = copy.begin(overwrite)
            if not finished:
                yield from copy.passes(advanced)
                locks.check(lock)
                copy.complete()
        return Conversion(image.location, target, "skipped" if finished else "done", shapes=layout.shapes)
    except BusyError as error:
        return Conversion(image.location, target, "held", error.detail)
    except CellsegError as error:
        return Conversion(image.location, target, "failed", error.detail)


@dataclass(frozen=True)
class ConversionManifest:
    """Input and layout of a conversion; they must be the same when an unfinished conversion goes on.

    Attributes:
        location: location of the image.
        bytes: size of its file in bytes.
        changed: time of the last change of the file, in ns of POSIX time.
        shape: shape of its full resolution.
        dtype: numpy name of the pixel type.
        shards: (height, width) in px of the box that a task writes, by level.
    """

    location: str
    bytes: int
    changed: int
    shape: tuple[int, ...]
    dtype: str
    shards: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Done:
    """Record of a finished task or conversion; it holds no figures."""


@dataclass(frozen=True)
class _Copy:
    """Conversion of an image."""

    slide: Slide
    writer: ImageWriter
    journal: Journal

    @property
    def layout(self) -> Layout:
        return self.writer.layout

    def begin(self, overwrite: bool) -> bool:
        """Create the empty image, or continue an unfinished one; returns whether the image is finished already.

        Raises:
            OutputError: something else lies at the target.
        """
        status, folder = self.slide.store.stat(), self.writer.folder
        earlier = self.journal.manifest(ConversionManifest)
        manifest = ConversionManifest(
            location=self.slide.location,
            bytes=status.st_size,
            changed=status.st_mtime_ns,
            shape=self.slide.levels[0].shape,
            dtype=self.slide.dtype,
            shards=self.layout.shards,
        )
        if folder.exists() and not overwrite:
            if earlier != manifest:
                raise OutputError(
                    str(folder),
                    expected="nothing of that name, or a conversion of the same file",
                    found="something else" if earlier is None else f"a conversion of {earlier.location} as it was then",
                    remedy="choose another name, or `overwrite` to replace it",
                )
            if self.journal.is_finished or self.journal.numbers("blocks"):
                for left_behind in (folder, self.journal.folder):
                    sweep_partials(left_behind)
                return self.journal.is_finished
        self.journal.start(manifest)
        self.writer.create_empty({OUTPUT_MARK: {"kind": "unfinished conversion"}})
        return False

    def passes(self, advanced: Callable[[int], None]) -> Workflow[None]:
        """Yield the tasks that copy the pixels, then those that build level after level."""
        with ExitStack() as stack:
            readers = [stack.enter_context(SlideReader(self.slide, 0, group)) for group in channel_groups(self.slide)]
            count = self.slide.planes(0) * self._shards_of_a_plane
            yield TaskGroup(partial(self._copy, readers), self.journal.missing("blocks", count), advanced)
        for level in range(1, len(self.layout.shapes)):
            count = self.layout.shard_count(level)
            yield TaskGroup(
                partial(self._build_level, level), self.journal.missing(f"levels/{level}", count), lambda _: None
            )

    def complete(self) -> None:
        """Replace the mark of the group by the metadata of an image: its levels and channels.

        Raises:
            OutputError: the store cannot be written.
        """
        writer = self.writer
        name = printable(writer.path.rpartition("/")[2] or writer.store.stem)
        image = v05.Image(
            version="0.5",
            multiscales=[multiscale(self.layout, name)],
            omero=v05.Omero(channels=[self._describe(channel) for channel in range(channel_count(self.slide))]),
        )
        with writing_to(writer.folder, "a store"):
            group = zarr.open_group(zarr_store(writer.store), path=writer.path, mode="r+", use_consolidated=False)
            group.attrs.put({"ome": image.model_dump(mode="json", by_alias=True, exclude_none=True)})
        self.journal.finish(Done())

    @property
    def _shards_of_a_plane(self) -> int:
        return self.layout.shard_count(0) // math.prod(self.layout.shapes[0][:-2])

    def _copy(self, readers: list[SlideReader], number: int) -> int:
        """Copy a shard of all channels of a t/z plane; returns the number of pixels copied."""
        plane, shard = divmod(number, self._shards_of_a_plane)
        box = self.layout.shard_box(0, shard)[1]
        for reader in readers:
            for channel, pixels in zip(reader.channels, reader.read(plane, box), strict=True):
                self.writer.write(0, self._plane(plane, channel), box, pixels)
        self.journal.record("blocks", number, Done())
        return box.area * channel_count(self.slide)

    def _build_level(self, level: int, number: int) -> None:
        """Average a shard of a level from the next finer level."""
        plane, box = self.layout.shard_box(level, number)
        finer, coarser = self.layout.shapes[level - 1][-2:], self.layout.shapes[level][-2:]
        y, x = (1 if big == small else 2 for big, small in zip(finer, coarser, strict=True))
        window = self.writer.read(level - 1, plane, Box(box.y0 * y, box.x0 * x, box.y1 * y, box.x1 * x))
        self.writer.write(level, plane, box, halve(window, box.shape))
        self.journal.record(f"levels/{level}", number, Done())

    def _plane(self, plane: int, channel: int) -> int:
        """Number of a plane among the planes over t, c and z.

        Args:
            plane: number of the plane over t and z.
            channel: index of the channel.
        """
        index = {**self.slide.plane_index(0, plane), "c": channel}
        leading = [index[axis] for axis in self.layout.axes[:-2]]
        return int(np.ravel_multi_index(leading, self.layout.shapes[0][:-2])) if leading else 0

    def _describe(self, channel: int) -> v05.OmeroChannel:
        """Metadata of a channel: name, colour, and the range of its coarsest level as the display window."""
        slide, level = self.slide, len(self.layout.shapes) - 1
        start, end = 0.0, 255.0
        if not (slide.rgb and slide.dtype == "uint8"):
            whole = Box(0, 0, *self.layout.shapes[level][-2:])
            pixels = self.writer.read(level, self._plane(slide.planes(0) // 2, channel), whole).astype(np.float64)
            shown = pixels[np.isfinite(pixels)]
            start, end = (float(shown.min()), float(shown.max())) if shown.size else (0.0, 1.0)
        window = v05.OmeroWindow(start=start, end=end, min=start, max=end)
        if slide.rgb and channel < 3:
            return v05.OmeroChannel(label="RGB"[channel], color=("FF0000", "00FF00", "0000FF")[channel], window=window)
        label = slide.channels[channel] if channel < len(slide.channels) else f"channel {channel}"
        colour = _COLOURS[channel % len(_COLOURS)] if channel_count(slide) > 1 else "FFFFFF"
        return v05.OmeroChannel(label=label, color=colour, window=window)
