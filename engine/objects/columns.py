"""Define the columns of the table of objects, one entry per column, in the order of the table.

All code that writes, exports or summarises tables takes names, units and types from this module.  A figure means the
same as the property of that name in scikit-image (``measure.regionprops``).  Lengths come in px of the segmented level
and in µm, both from the corner of that level.

To add a column, add an entry to `COLUMNS`.  If no moment gives its value, first add a moment to
`cellseg_batch.kernels.moments_columns` and to the kernels that sum it up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cellseg_batch.engine.objects.moment_files import Objects
from cellseg_batch.kernels import moments
from cellseg_batch.kernels import moments_columns as m

TEXT = pa.dictionary(pa.int32(), pa.string())
INT, INDEX, FLOAT, FLAG = pa.int64(), pa.int32(), pa.float64(), pa.bool_()

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Origin:
    """The image that the objects of a table lie in.

    Attributes:
        slide, well, field: names of the three; well and field are "" outside of plates.
        shape: shape (..., h, w) of the label image.
        plane_axes: names of its leading axes, out of t and z.
        pixel_size_um: µm per px of the label image; None if unknown.
        channels: names of the measured channels.
        classes: names of the classes that objects may have.
        cells: whether the objects are nuclei of cells.
    """

    slide: str
    well: str
    field: str
    shape: tuple[int, ...]
    plane_axes: str
    pixel_size_um: float | None
    channels: tuple[str, ...]
    classes: tuple[str, ...] = ()
    cells: bool = False


@dataclass(frozen=True)
class Measured:
    """Input for computing the values of a column.

    Attributes:
        origin: the image.
        objects: moments of the objects; behind those of the channels are those of a channel for each class, which is 1
            in the pixels of the class.
        channel: index of the channel, for a column per channel.
    """

    origin: Origin
    objects: Objects
    channel: int = 0

    def moment(self, number: int) -> Floats:
        """Values (n,) of a moment, by its number in `cellseg_batch.kernels.moments_columns`."""
        return self.objects.rows[:, number]

    def channel_moment(self, number: int) -> Floats:
        """Values (n,) of a moment of the channel: LOW, HIGH, SUM or SQUARES."""
        return self.moment(m.CHANNELS + m.PER_CHANNEL * self.channel + number)

    def cell_moment(self, number: int) -> Floats:
        """Values (n,) of a moment of the cells."""
        assert self.objects.cells is not None
        return self.objects.cells[:, number]

    @property
    def ring_area(self) -> Floats:
        """Number (n,) of pixels of the ring of each cell."""
        return self.cell_moment(m.AREA) - self.moment(m.AREA)

    @property
    def ring_mean(self) -> Floats:
        """Mean (n,) of the channel over the ring of each cell; NaN without a ring."""
        light = self.cell_moment(m.CHANNELS + m.PER_CHANNEL * self.channel + m.SUM) - self.channel_moment(m.SUM)
        return np.divide(light, self.ring_area, out=np.full_like(light, np.nan), where=self.ring_area > 0)

    @cached_property
    def class_pixels(self) -> Floats:
        """Number (n, classes) of pixels of each class."""
        first = m.CHANNELS + m.PER_CHANNEL * len(self.origin.channels) + m.SUM
        return self.objects.rows[:, first :: m.PER_CHANNEL]

    @cached_property
    def ellipse(self) -> tuple[Floats, Floats, Floats]:
        """Major axis and minor axis in px, and eccentricity, each (n,)."""
        return moments.axes(self.objects.rows)


@dataclass(frozen=True)
class Column:
    """A column of the table, or a column for each channel.

    Attributes:
        name: name of the column; if it is per channel, the part before ``_<channel>``.
        unit: unit of the values; "" if they have none, or have the unit of the pixel values.
        type: type in Parquet.
        compute: function that gives the values, one for each object, as an array that can be cast to ``type``.
        is_measurement: the column measures the object; the other columns identify and locate it.
        per_channel: the table has such a column for every measured channel.
        needs_pixel_size: the values are null if the pixel size is unknown.
        needs_classes: tables of objects without classes lack the column.
        needs_cells: tables of objects without cells lack the column.
    """

    name: str
    unit: str
    type: pa.DataType
    compute: Callable[[Measured], Any]
    is_measurement: bool = True
    per_channel: bool = False
    needs_pixel_size: bool = False
    needs_classes: bool = False
    needs_cells: bool = False

    def name_for(self, channel: str) -> str:
        """Name in the table of this column for ``channel``."""
        return f"{self.name}_{channel}"

    def values(self, measured: Measured) -> pa.Array:
        """Compute the values, one for each object."""
        if self.needs_pixel_size and measured.origin.pixel_size_um is None:
            return pa.nulls(len(measured.objects.ids), self.type)
        return pa.array(self.compute(measured)).cast(self.type)


@dataclass(frozen=True)
class TableField:
    """A column of a table with certain channels.

    Attributes:
        name: name in the table.
        column: entry of the column.
        channel: index of its channel; 0 if the column is not per channel.
    """

    name: str
    column: Column
    channel: int = 0


def table_fields(channels: Sequence[str], classes: bool, cells: bool) -> list[TableField]:
    """Fields of a table of objects in order; a group of neighbouring columns per channel is repeated per channel.

    Args:
        channels: names of the measured channels.
        classes: whether the objects have classes.
        cells: whether the objects have cells.
    """
    fields: list[TableField] = []
    present = (column for column in COLUMNS if classes >= column.needs_classes and cells >= column.needs_cells)
    for per_channel, group in groupby(present, key=lambda column: column.per_channel):
        columns = list(group)
        if per_channel:
            fields += (
                TableField(column.name_for(channel), column, index)
                for index, channel in enumerate(channels)
                for column in columns
            )
        else:
            fields += (TableField(column.name, column) for column in columns)
    return fields


def table_schema(origin: Origin) -> pa.Schema:
    """Schema of the table of an image's objects; the metadata of each field hold its ``unit``."""
    return pa.schema(
        pa.field(field.name, field.column.type, metadata={"unit": field.column.unit})
        for field in table_fields(origin.channels, bool(origin.classes), origin.cells)
    )


def _name(attribute: str) -> Column:
    """Make the column of a name of the image, which is the same for all its objects."""

    def compute(measured: Measured) -> pa.Array:
        indices = np.zeros(len(measured.objects.ids), np.int32)
        return pa.DictionaryArray.from_arrays(indices, pa.array([getattr(measured.origin, attribute)]))

    return Column(attribute, "", TEXT, compute, is_measurement=False)


def _plane_index(axis: str) -> Column:
    """Make the column of the object's plane index along t or z; 0 in images without this axis."""

    def compute(measured: Measured) -> NDArray[np.int64]:
        planes, origin = measured.objects.planes, measured.origin
        if axis not in origin.plane_axes:
            return np.zeros(len(planes), np.int64)
        return np.unravel_index(planes, origin.shape[:-2])[origin.plane_axes.index(axis)]

    return Column(axis, "", INDEX, compute, is_measurement=False)


def _bound(name: str, moment: int) -> Column:
    """Make the column of a side of the bounding box."""
    return Column(name, "px", INT, lambda measured: measured.moment(moment), is_measurement=False)


def _in_um(columns: Iterable[Column]) -> tuple[Column, ...]:
    """Make columns of the same lengths in µm."""

    def in_um(column: Column) -> Column:
        def compute(measured: Measured) -> Floats:
            lengths: Floats = column.compute(measured) * measured.origin.pixel_size_um
            return lengths

        name = f"{column.name}_um"
        return replace(column, name=name, unit="µm", type=FLOAT, compute=compute, needs_pixel_size=True)

    return tuple(map(in_um, columns))


def _mean(measured: Measured) -> Floats:
    return measured.channel_moment(m.SUM) / measured.moment(m.AREA)


def _standard_deviation(measured: Measured) -> Floats:
    variance = measured.channel_moment(m.SQUARES) / measured.moment(m.AREA) - _mean(measured) ** 2
    # Rounding can make the variance negative.
    return np.sqrt(np.maximum(variance, 0))


def _in_um2(areas: Column) -> Column:
    """Make a column of the same areas in µm²."""

    def compute(measured: Measured) -> Floats:
        assert measured.origin.pixel_size_um is not None
        in_um2: Floats = areas.compute(measured) * measured.origin.pixel_size_um**2
        return in_um2

    return replace(areas, name=f"{areas.name}_um2", unit="µm²", type=FLOAT, compute=compute, needs_pixel_size=True)


def _touches_border(measured: Measured) -> NDArray[np.bool_]:
    height, width = measured.origin.shape[-2:]
    at_start = (measured.moment(m.TOP) == 0) | (measured.moment(m.LEFT) == 0)
    at_end = (measured.moment(m.BOTTOM) == height) | (measured.moment(m.RIGHT) == width)
    touches: NDArray[np.bool_] = at_start | at_end
    return touches


def _cell_mean(measured: Measured) -> Floats:
    light = measured.cell_moment(m.CHANNELS + m.PER_CHANNEL * measured.channel + m.SUM)
    mean: Floats = light / measured.cell_moment(m.AREA)
    return mean


def _ring_mean(measured: Measured) -> pa.Array:
    """The mean of the ring; null without a ring, as of a nucleus between others."""
    return pa.array(measured.ring_mean, mask=measured.ring_area == 0)


def _intensity_ratio(measured: Measured) -> pa.Array:
    """The mean of the nucleus divided by that of the ring; null without a ring, or if that is 0."""
    ring = measured.ring_mean
    has_ratio = (measured.ring_area > 0) & (ring != 0)
    return pa.array(np.divide(_mean(measured), ring, out=np.zeros_like(ring), where=has_ratio), mask=~has_ratio)


def _class(measured: Measured) -> pa.Array:
    """The class that most of an object's pixels are of, the first of equal ones; null if they are of none."""
    pixels = measured.class_pixels
    indices = pa.array(pixels.argmax(axis=1).astype(np.int32), mask=pixels.max(axis=1) == 0)
    return pa.DictionaryArray.from_arrays(indices, pa.array(measured.origin.classes))


ID = Column("id", "", INT, lambda measured: measured.objects.ids, is_measurement=False)
SLIDE = _name("slide")
NAMES = (SLIDE, _name("well"), _name("field"))
PLANE = (_plane_index("t"), _plane_index("z"))
CENTROID = (
    Column(
        "centroid_y",
        "px",
        FLOAT,
        lambda measured: measured.moment(m.TOP) + measured.moment(m.SUM_Y) / measured.moment(m.AREA),
        is_measurement=False,
    ),
    Column(
        "centroid_x",
        "px",
        FLOAT,
        lambda measured: measured.moment(m.LEFT) + measured.moment(m.SUM_X) / measured.moment(m.AREA),
        is_measurement=False,
    ),
)
CENTROID_UM = _in_um(CENTROID)
BOX = (_bound("bbox_y0", m.TOP), _bound("bbox_x0", m.LEFT), _bound("bbox_y1", m.BOTTOM), _bound("bbox_x1", m.RIGHT))
AREA = Column("area", "px", INT, lambda measured: measured.moment(m.AREA))
PERIMETER = Column("perimeter", "px", FLOAT, lambda measured: moments.perimeter(measured.objects.rows))
AXIS_MAJOR = Column("axis_major", "px", FLOAT, lambda measured: measured.ellipse[0])
AXIS_MINOR = Column("axis_minor", "px", FLOAT, lambda measured: measured.ellipse[1])
INTENSITY_MEAN = Column("intensity_mean", "", FLOAT, _mean, per_channel=True)
CLASS = Column("class", "", TEXT, _class, is_measurement=False, needs_classes=True)
TOUCHES_BORDER = Column("touches_border", "", FLAG, _touches_border, is_measurement=False)

CELL_AREA = Column("cell_area", "px", INT, lambda measured: measured.cell_moment(m.AREA), needs_cells=True)
RING_AREA = Column("ring_area", "px", INT, lambda measured: measured.ring_area, needs_cells=True)
# Beside these, the columns of the nucleus are those of every object.
OF_CELLS = (
    CELL_AREA,
    _in_um2(CELL_AREA),
    RING_AREA,
    _in_um2(RING_AREA),
    Column(
        "nucleus_cell_area_ratio",
        "",
        FLOAT,
        lambda measured: measured.moment(m.AREA) / measured.cell_moment(m.AREA),
        needs_cells=True,
    ),
    Column("cell_intensity_mean", "", FLOAT, _cell_mean, per_channel=True, needs_cells=True),
    Column("ring_intensity_mean", "", FLOAT, _ring_mean, per_channel=True, needs_cells=True),
    Column("nucleus_ring_intensity_ratio", "", FLOAT, _intensity_ratio, per_channel=True, needs_cells=True),
)

COLUMNS: tuple[Column, ...] = (
    ID,
    *NAMES,
    *PLANE,
    *CENTROID,
    *CENTROID_UM,
    *BOX,
    *_in_um(BOX),
    AREA,
    _in_um2(AREA),
    PERIMETER,
    *_in_um([PERIMETER]),
    AXIS_MAJOR,
    *_in_um([AXIS_MAJOR]),
    AXIS_MINOR,
    *_in_um([AXIS_MINOR]),
    Column("eccentricity", "", FLOAT, lambda measured: measured.ellipse[2]),
    INTENSITY_MEAN,
    Column("intensity_min", "", FLOAT, lambda measured: measured.channel_moment(m.LOW), per_channel=True),
    Column("intensity_max", "", FLOAT, lambda measured: measured.channel_moment(m.HIGH), per_channel=True),
    Column("intensity_std", "", FLOAT, _standard_deviation, per_channel=True),
    Column("intensity_sum", "", FLOAT, lambda measured: measured.channel_moment(m.SUM), per_channel=True),
    Column(
        "mean_probability",
        "",
        FLOAT,
        lambda measured: measured.moment(m.PROBABILITY) / (255 * measured.moment(m.AREA)),
    ),
    CLASS,
    Column(
        "class_share",
        "",
        FLOAT,
        lambda measured: measured.class_pixels.max(axis=1) / measured.moment(m.AREA),
        needs_classes=True,
    ),
    TOUCHES_BORDER,
    *OF_CELLS,
)
