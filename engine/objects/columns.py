"""The columns of the table of objects: one entry each, in the order of the table.

Everything that writes, exports or summarises tables takes names, units and types from here.  Figures are scikit-image's
of the same name (``measure.regionprops``).  Lengths come in px of the segmented level and in µm, both from the corner
of that level.

To add a column, add an entry to `COLUMNS`.  If no moment gives its value, first add one to
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
    """Which image the objects of a table lie in.

    Attributes:
        slide, well, field: names; the last two are "" outside of plates.
        shape: (..., h, w) of the label image.
        plane_axes: which of t and z its leading axes are.
        pixel_size_um: of the label image, None when unknown.
        channels: names of the measured channels.
    """

    slide: str
    well: str
    field: str
    shape: tuple[int, ...]
    plane_axes: str
    pixel_size_um: float | None
    channels: tuple[str, ...]


@dataclass(frozen=True)
class Measured:
    """What the values of a column are computed from.

    Attributes:
        origin: the image.
        objects: their moments.
        channel: index of the channel that a column per channel is about.
    """

    origin: Origin
    objects: Objects
    channel: int = 0

    def moment(self, number: int) -> Floats:
        """A moment of every object, by its number in `cellseg_batch.kernels.moments_columns`."""
        return self.objects.rows[:, number]

    def channel_moment(self, number: int) -> Floats:
        """The same for a moment of the channel: LOW, HIGH, SUM or SQUARES."""
        return self.moment(m.CHANNELS + m.PER_CHANNEL * self.channel + number)

    @cached_property
    def ellipse(self) -> tuple[Floats, Floats, Floats]:
        """Major axis, minor axis and eccentricity of every object."""
        return moments.axes(self.objects.rows)


@dataclass(frozen=True)
class Column:
    """A column of the table, or one for each channel.

    Attributes:
        name: of the column; of a column per channel, what comes before ``_<channel>``.
        unit: "" if it has none, or that of the pixel values.
        type: in Parquet.
        compute: the values, one for each object, as an array that can be cast to ``type``.
        is_measurement: it measures the object; others say which object it is and where it lies.
        per_channel: every measured channel has one.
        needs_pixel_size: it is null where the pixel size is unknown.
    """

    name: str
    unit: str
    type: pa.DataType
    compute: Callable[[Measured], Any]
    is_measurement: bool = True
    per_channel: bool = False
    needs_pixel_size: bool = False

    def name_for(self, channel: str) -> str:
        """Name in the table of a column per channel."""
        return f"{self.name}_{channel}"

    def values(self, measured: Measured) -> pa.Array:
        """The values, one for each object."""
        if self.needs_pixel_size and measured.origin.pixel_size_um is None:
            return pa.nulls(len(measured.objects.ids), self.type)
        return pa.array(self.compute(measured)).cast(self.type)


@dataclass(frozen=True)
class TableField:
    """A column as it stands in a table with certain channels.

    Attributes:
        name: in the table.
        column: its entry.
        channel: index of its channel; 0 if it is about none.
    """

    name: str
    column: Column
    channel: int = 0


def table_fields(channels: Sequence[str]) -> list[TableField]:
    """The fields of a table of objects in order; neighbouring columns per channel come channel by channel."""
    fields: list[TableField] = []
    for per_channel, group in groupby(COLUMNS, key=lambda column: column.per_channel):
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


def table_schema(channels: Sequence[str]) -> pa.Schema:
    """Names and types; each field's metadata hold its ``unit``."""
    return pa.schema(
        pa.field(field.name, field.column.type, metadata={"unit": field.column.unit})
        for field in table_fields(channels)
    )


def _name(attribute: str) -> Column:
    """A name of the image."""

    def compute(measured: Measured) -> pa.Array:
        indices = np.zeros(len(measured.objects.ids), np.int32)
        return pa.DictionaryArray.from_arrays(indices, pa.array([getattr(measured.origin, attribute)]))

    return Column(attribute, "", TEXT, compute, is_measurement=False)


def _plane_index(axis: str) -> Column:
    """Index of the object's plane along t or z; 0 in images without this axis."""

    def compute(measured: Measured) -> NDArray[np.int64]:
        planes, origin = measured.objects.planes, measured.origin
        if axis not in origin.plane_axes:
            return np.zeros(len(planes), np.int64)
        return np.unravel_index(planes, origin.shape[:-2])[origin.plane_axes.index(axis)]

    return Column(axis, "", INDEX, compute, is_measurement=False)


def _bound(name: str, moment: int) -> Column:
    """A side of the bounding box."""
    return Column(name, "px", INT, lambda measured: measured.moment(moment), is_measurement=False)


def _in_um(columns: Iterable[Column]) -> tuple[Column, ...]:
    """The same lengths in µm."""

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
    # Rounding can take it below 0.
    return np.sqrt(np.maximum(variance, 0))


def _area_um2(measured: Measured) -> Floats:
    assert measured.origin.pixel_size_um is not None
    return measured.moment(m.AREA) * measured.origin.pixel_size_um**2


def _touches_border(measured: Measured) -> NDArray[np.bool_]:
    height, width = measured.origin.shape[-2:]
    at_start = (measured.moment(m.TOP) == 0) | (measured.moment(m.LEFT) == 0)
    at_end = (measured.moment(m.BOTTOM) == height) | (measured.moment(m.RIGHT) == width)
    touches: NDArray[np.bool_] = at_start | at_end
    return touches


ID = Column("id", "", INT, lambda measured: measured.objects.ids, is_measurement=False)
NAMES = (_name("slide"), _name("well"), _name("field"))
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
TOUCHES_BORDER = Column("touches_border", "", FLAG, _touches_border, is_measurement=False)

COLUMNS: tuple[Column, ...] = (
    ID,
    *NAMES,
    *PLANE,
    *CENTROID,
    *CENTROID_UM,
    *BOX,
    *_in_um(BOX),
    AREA,
    Column("area_um2", "µm²", FLOAT, _area_um2, needs_pixel_size=True),
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
    TOUCHES_BORDER,
)
