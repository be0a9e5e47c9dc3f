"""Settle the pixel size of an image of any format; a size that cannot be true is unknown, and noted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Sizes outside are mistakes: an atom is 1e-4 µm, and no nucleus fills a pixel of 1 mm.
_LEAST_UM, _MOST_UM = 1e-3, 1e3
# Exponents of the SI prefixes, as symbols (OME-TIFF) and words (OME-Zarr).
_PREFIXES = {
    **{"Y": 24, "Z": 21, "E": 18, "P": 15, "T": 12, "G": 9, "M": 6, "k": 3, "h": 2, "da": 1, "": 0},
    **{"d": -1, "c": -2, "m": -3, "µ": -6, "n": -9, "p": -12, "f": -15, "a": -18, "z": -21, "y": -24},
}
_PREFIX_WORDS = {
    **{"yotta": 24, "zetta": 21, "exa": 18, "peta": 15, "tera": 12, "giga": 9, "mega": 6, "kilo": 3, "hecto": 2},
    **{"deca": 1, "": 0, "deci": -1, "centi": -2, "milli": -3, "micro": -6, "nano": -9, "pico": -12, "femto": -15},
    **{"atto": -18, "zepto": -21, "yocto": -24},
}
_INCH = 25_400.0
# Every unit of length of the schemas of OME-TIFF and OME-Zarr, and the spellings of ImageJ and other programs.
UM_PER_UNIT: Mapping[str, float] = {
    **{f"{prefix}m": float(f"1e{power + 6}") for prefix, power in _PREFIXES.items()},
    **{f"{prefix}{metre}": float(f"1e{p + 6}") for prefix, p in _PREFIX_WORDS.items() for metre in ("meter", "metre")},
    **dict.fromkeys(("μm", "um", "\\u00B5m", "micron", "microns", "micrometers"), 1.0),
    **dict.fromkeys(("Å", "Å", "angstrom"), 1e-4),
    **dict.fromkeys(("thou", "mil"), _INCH / 1000),
    **dict.fromkeys(("pt", "point"), _INCH / 72),
    **dict.fromkeys(("li", "line"), _INCH / 12),
    **dict.fromkeys(("in", "inch", "inches"), _INCH),
    **dict.fromkeys(("ft", "foot"), _INCH * 12),
    **dict.fromkeys(("yd", "yard"), _INCH * 36),
    **dict.fromkeys(("mi", "mile"), _INCH * 63_360),
    "ua": 1.495978707e17,
    "ly": 9.4607304725808e21,
    **dict.fromkeys(("pc", "parsec"), 3.0856775814913673e22),
}
# Units by which programs say that they do not know the size.
_NO_LENGTH = (None, "", "pixel", "pixels", "px", "reference frame")


@dataclass(frozen=True)
class PixelSize:
    """Size of a pixel.

    Attributes:
        um: axis -> µm per px; an axis of unknown size is missing.
        doubts: axis -> remark for the user on its size in the metadata, which cannot be true.
    """

    um: Mapping[str, float]
    doubts: Mapping[str, str]

    @property
    def notes(self) -> tuple[str, ...]:
        """The remarks for the user."""
        return tuple(self.doubts.values())


def settle_pixel_size(stated: Mapping[str, tuple[object, object]]) -> PixelSize:
    """Settle the pixel size from what the metadata of an image state.

    Args:
        stated: axis -> (size, unit), as the metadata have them, whatever their type; a size of None is not stated.

    Returns:
        The sizes from 1 nm to 1 mm. A size of y or x that is not stated is that of the other; if one of these two
        cannot be true, both are unknown.
    """
    um: dict[str, float] = {}
    doubts: dict[str, str] = {}
    for axis, (size, unit) in stated.items():
        if size is None or unit in _NO_LENGTH:
            continue
        length = _in_um(size, unit)
        if length is not None:
            um[axis] = length
        else:
            written = f"{size!s:.40} {unit!s:.40}"
            doubts[axis] = (
                f"pixel size along {axis} unknown: the metadata say {written}, and no length from 1 nm to 1 mm; "
                "`pixel_size` sets it"
            )
    if "y" in doubts or "x" in doubts:
        um = {axis: length for axis, length in um.items() if axis not in "yx"}
    for axis, other in ("yx", "xy"):
        if other in um:
            um.setdefault(axis, um[other])
    return PixelSize(um, doubts)


def _in_um(size: object, unit: object) -> float | None:
    """A length in µm; None if it is no number, of no known unit, or out of bounds."""
    factor = UM_PER_UNIT.get(str(unit).strip())
    try:
        length = float(str(size)) * factor if factor is not None else 0.0
    except ValueError:
        return None
    return length if _LEAST_UM <= length <= _MOST_UM else None
