"""Fields of screening plates: which well and field an image is, and which of them were asked for."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class PlatePosition:
    """Where an image lies on a plate.

    Attributes:
        plate: where the plate lies.
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
    """The wells and fields of plates that are processed; images that lie on no plate always are.

    Attributes:
        wells: names or patterns such as ``A01`` and ``B*``, in which a column may have leading zeros or not; () is all.
        fields: names; () is all.
    """

    wells: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()

    def takes_well(self, position: PlatePosition) -> bool:
        """Whether the well at ``position`` is wanted."""
        names = {
            position.row + column for column in (position.column, position.column.zfill(2), position.column.lstrip("0"))
        }
        return not self.wells or any(
            fnmatchcase(name.upper(), pattern.upper()) for name in names for pattern in self.wells
        )

    def takes_field(self, field: str) -> bool:
        """Whether fields of this name are wanted."""
        return not self.fields or field in self.fields
