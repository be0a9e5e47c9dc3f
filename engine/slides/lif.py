"""Read LIF files of Leica with liffile: each series is an image of one level.

Sources: the documentation of liffile (pypi.org/project/liffile); the XML of LIF files.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from numpy.typing import NDArray

from cellseg_batch.engine.errors import ReadError
from cellseg_batch.engine.slides.image_format import (
    ImageFormat,
    Search,
    image_in_series,
    local_file,
    optional_library,
    reading_by,
)
from cellseg_batch.engine.slides.pixel_size import settle_pixel_size
from cellseg_batch.engine.slides.slide import Level, Slide, UnreadableImage, fits_axes

# Otherwise liffile's remarks would be printed between ours; whoever wants them adds a handler to this logger.
logging.getLogger("liffile").addHandler(logging.NullHandler())

# Tag of a channel that is the blue of a colour.
_BLUE = "3"
# Number of the dimension y.
_ROWS = "2"
# liffile's letters of axes -> ours; S is colours. Others are mosaic tiles, wavelengths, angles, loops.
_AXIS_OF = {"T": "t", "Z": "z", "C": "c", "Y": "y", "X": "x", "S": "c"}


class Lif(ImageFormat):
    """Format of LIF, whose pixels are not compressed, and mapped into memory."""

    name: ClassVar[str] = "lif"
    title: ClassVar[str] = "LIF"
    suffixes: ClassVar[tuple[str, ...]] = (".lif",)

    def find(self, path: Path, name: str, search: Search) -> Iterator[Slide | UnreadableImage]:
        """Find the series of a file, from its metadata.

        Raises:
            ReadError: the library is not installed or cannot read the file, or it holds no image.
        """
        with reading_by("liffile", path), _open(path) as document:
            count = len(document.images)
            for number, image in enumerate(document.images):
                describe = partial(_describe, image, path, number, search)
                yield image_in_series(path, name, number, count, describe)
            if not count:
                raise ReadError(str(path), expected="a series of images", found="none", remedy="export it again")

    def open_level(self, slide: Slide, level: int) -> NDArray[Any]:
        """Map the pixels; the mapping keeps its file by itself."""
        with _open(slide.store) as document:
            image = document.images[slide.series or 0]
            shape = list(image.shape)
            if slide.rgb:  # whose rows may be padded, and colours stored with blue first
                shape[-2] = _bytes_of_a_row(image) // (shape[-1] * image.dtype.itemsize)
            mapped: NDArray[Any] = image.memory_block.read_array(tuple(shape), image.dtype, out="memmap")
            mapped = mapped[..., : image.sizes["X"], :] if slide.rgb else mapped
            return mapped[..., ::-1] if slide.rgb and _channels_of(image)[0].get("ChannelTag") == _BLUE else mapped


def _open(path: Path) -> Any:
    """A file, a ``liffile.LifFile``."""
    return optional_library("liffile", "cellseg-batch[lif]").LifFile(local_file(path))


def _describe(image: Any, path: Path, number: int, search: Search, name: str, inside: str) -> Slide:
    """The slide of a series.

    Raises:
        ReadError: it has axes that are none of a slide, or colours elsewhere than last.
    """
    axes = "".join(_AXIS_OF.get(letter, "?") for letter in image.dims)
    in_colour = "S" in image.dims
    if not fits_axes(axes, len(image.dims)) or (in_colour and not (axes.endswith("yxc") and image.sizes["S"] == 3)):
        raise ReadError(
            str(path),
            expected="axes out of t, c, z, y, x",
            found=f"{', '.join(f'{letter} ({length})' for letter, length in image.sizes.items())} in {image.path}",
            cause="wavelengths, mosaic tiles, lines or planes across",
            remedy="export it from LAS X, with the mosaic merged",
        )
    names = tuple(_dye(channel) or channel.get("LUTName", "") for channel in _channels_of(image))
    steps = {axis: image.coords.get(axis.upper()) for axis in "zyx" if axis in axes}
    stated = {axis: ((at[-1] - at[0]) / (len(at) - 1), "m") for axis, at in steps.items() if at is not None}
    size = settle_pixel_size(stated)
    chunk = {"x": image.sizes["X"]} | ({"c": 3} if in_colour else {})  # a row
    chunks = tuple(chunk.get(axis, 1) for axis in axes)
    level = Level("0", tuple(image.shape), chunks, tuple(size.um.get(axis, 1.0) for axis in axes), (0.0,) * len(axes))
    return Slide(
        name=name,
        store=path,
        path=inside,
        format=Lif.name,
        axes=axes,
        dtype=image.dtype.name,
        levels=(level,),
        units=tuple("micrometer" if axis in size.um else None for axis in axes),
        channels=() if in_colour or not any(names) else names,
        rgb=in_colour,
        series=number,
        notes=search.check_axes(axes, str(path)) + size.notes,
    )


def _channels_of(image: Any) -> list[Any]:
    """XML elements about the channels, or colours, of a series, in the order of its pixels."""
    described: list[Any] = image.xml_element.findall("./Data/Image/ImageDescription/Channels/ChannelDescription")
    return sorted(described, key=lambda channel: int(channel.get("BytesInc", 0)))


def _bytes_of_a_row(image: Any) -> int:
    """Distance of a row of a series from the next."""
    lines = image.xml_element.findall("./Data/Image/ImageDescription/Dimensions/DimensionDescription")
    return next(int(line.get("BytesInc")) for line in lines if line.get("DimID") == _ROWS)


def _dye(channel: Any) -> str:
    """Name of the dye in an XML element about a channel; "" if there is none."""
    for entry in channel.findall("ChannelProperty"):
        if entry.findtext("Key") == "DyeName":
            return entry.findtext("Value") or ""
    return ""
