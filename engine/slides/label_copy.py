"""Copy a label image, as it was segmented, into a store of its own with a pyramid of halves.

Axes of length 1 are left out. Memory does not grow with the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from cellseg_batch.engine.errors import ReadError
from cellseg_batch.engine.slides.convert_layout import lay_out_image
from cellseg_batch.engine.slides.label_layout import Layout
from cellseg_batch.engine.slides.reader import SlideReader
from cellseg_batch.engine.slides.slide import Slide
from cellseg_batch.engine.slides.writer import ImageWriter

Value = TypeVar("Value")


def lay_out_copy(labels: Slide) -> Layout:
    """Lay out the storage of a copy of ``labels``, a label image as `open_written` opens it.

    Raises:
        ReadError: the labels have channels.
    """
    if labels.extent("c", 0) > 1:
        raise ReadError(
            labels.location,
            expected="labels of a single channel",
            found=f"{labels.extent('c', 0)} channels",
            remedy="name labels that cellseg-batch has written",
        )
    layout = lay_out_image(labels)
    kept = [i for i, axis in enumerate(layout.axes) if axis in "yx" or layout.shapes[0][i] > 1]

    def of(values: Sequence[Value]) -> tuple[Value, ...]:
        return tuple(values[i] for i in kept)

    return replace(
        layout,
        axes="".join(of(layout.axes)),
        shapes=tuple(map(of, layout.shapes)),
        datasets=tuple((of(scale), of(translation)) for scale, translation in layout.datasets),
        units=of(layout.units),
    )


def copy_labels(labels: Slide, writer: ImageWriter) -> None:
    """Copy the pixels of ``labels`` into the empty arrays of ``writer``, whose layout is that of `lay_out_copy`.

    A pixel of a coarser level is the nearest one of the next finer level.

    Raises:
        ReadError: the labels cannot be read.
        OutputError: the copy cannot be written.
    """
    layout = writer.layout
    with SlideReader(labels, 0, (0,)) as reader:
        for number in range(layout.shard_count(0)):
            plane, box = layout.shard_box(0, number)
            writer.write(0, plane, box, reader.read(plane, box)[0])
    for level in range(1, len(layout.shapes)):
        for number in range(layout.shard_count(level)):
            writer.build_level(level, *layout.shard_box(level, number))
