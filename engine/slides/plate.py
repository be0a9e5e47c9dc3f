"""Locate images on screening plates, and choose wells and fields."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class PlatePosition:
    """Position of an image on a plate.

    Attributes:
        plate: location of the plate.
        row, column: names of the well's row and column, such as B and 03.
        field: name of the field.
    """

    plate: str
    row: str
    column: str
    field: str

    @property
    def well(self) -> str:
        """The well's name, such as B03."""
        return self.row + self.column


@dataclass(frozen=True)
class FieldChoice:
    """Wells and fields of plates to process; images that lie on no plate are always processed.

    Attributes:
        wells: names or patterns such as ``A01`` and ``B*``, with or without leading zeros in the column; () takes all.
        fields: names of fields; () takes all.
    """

    wells: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()

    def takes_well(self, position: PlatePosition) -> bool:
        """Whether the well at ``position`` is processed."""
        return not self.wells or any(_matches(position, pattern) for pattern in self.wells)

    def takes_field(self, field: str) -> bool:
        """Whether fields of this name are processed."""
        return not self.fields or field in self.fields

    def unmatched(self, positions: Iterable[PlatePosition]) -> list[str]:
        """The names and patterns of wells and fields that take none of ``positions``, in words."""
        taken = list(positions)
        wells = [well for well in self.wells if not any(_matches(position, well) for position in taken)]
        fields = [field for field in self.fields if all(position.field != field for position in taken)]
        return [f"well {well}" for well in wells] + [f"field {field}" for field in fields]


def _matches(position: PlatePosition, pattern: str) -> bool:
    columns = (position.column, position.column.zfill(2), position.column.lstrip("0"))
    return any(fnmatchcase((position.row + column).upper(), pattern.upper()) for column in columns)
