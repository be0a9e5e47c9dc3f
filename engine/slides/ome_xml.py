"""Read OME-XML: the images that it describes, and the TIFF files that hold their planes.

Source: the OME model and OME-TIFF specification of 2016-06 (docs.openmicroscopy.org/ome-model). This module opens no
file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from cellseg_batch.engine.errors import ReadError

SELF = ""
"""Stands for the name of the file that the OME-XML is in."""
_SIZES = ("SizeT", "SizeC", "SizeZ", "SizeY", "SizeX")
_PLACES = ("IFD", "FirstT", "FirstC", "FirstZ", "PlaneCount", "NumPlanes")
# Colour of a channel that has none.
_WHITE = "-1"
# A list of more planes would fill the memory.
_MOST_PLANES = 10_000_000


@dataclass(frozen=True)
class OmeImage:
    """An image that an OME-XML describes.

    Attributes:
        number: number of the image in the OME-XML.
        name: name of the image; "" if it has none.
        files: names of the files that hold its planes, that of the first plane first; `SELF` for the file itself.
        stated: axis -> (size of a pixel, unit), as written.
        channels: names of the channels; () if no channel has a name.
        colours: RRGGBB of each channel; "" for what is no colour.
        root: the OME-XML that describes it.
        pixels: the element of its planes.
    """

    number: int
    name: str
    files: tuple[str, ...]
    stated: dict[str, tuple[object, object]]
    channels: tuple[str, ...]
    colours: tuple[str, ...]
    root: Element = field(repr=False, compare=False)
    pixels: Element = field(repr=False, compare=False)

    def demand_numbers(self, location: str) -> None:
        """Refuse axes, sizes and places of planes that cannot be.

        Raises:
            ReadError: one of them cannot be.
        """
        order = self.pixels.get("DimensionOrder", "")
        if sorted(order) != sorted("XYZCT"):
            raise _damaged(location, "X, Y, Z, C and T in the DimensionOrder of its OME-XML", repr(order))
        channels = [child for child in self.pixels if _is(child, "Channel")]
        numbers = [(name, self.pixels.get(name), 1) for name in _SIZES]
        numbers += [("SamplesPerPixel", child.get("SamplesPerPixel", "1"), 1) for child in channels]
        numbers += [(name, entry.get(name, "0"), 0) for entry in _planes_of(self.pixels) for name in _PLACES]
        for name, text, least in numbers:
            number = _whole(text)
            if number is None or not least <= number <= _MOST_PLANES:
                whole = f"a whole number from {least} to {_MOST_PLANES} as {name} in its OME-XML"
                raise _damaged(location, whole, "none" if text is None else repr(text))
        if self.plane_count > _MOST_PLANES:
            raise _damaged(location, f"at most {_MOST_PLANES} planes in its OME-XML", f"{self.plane_count}")

    @property
    def plane_count(self) -> int:
        """Number of planes, each with all samples of a channel, by sizes that `demand_numbers` accepts."""
        channel = next((child for child in self.pixels if _is(child, "Channel")), self.pixels)
        return math.prod(int(self.pixels.get(name, 1)) for name in _SIZES[:3]) // int(channel.get("SamplesPerPixel", 1))

    def pages(self, count: int) -> set[int]:
        """Those of the file's own ``count`` pages that hold its planes, by numbers that `demand_numbers` accepts."""
        pages: set[int] = set()
        for entry in _planes_of(self.pixels):
            if not any(_is(child, "UUID") for child in entry):
                first, every = int(entry.get("IFD", 0)), 1 if "IFD" in entry.attrib else self.plane_count
                last = first + int(entry.get("PlaneCount", entry.get("NumPlanes", every)))
                pages.update(range(first, min(last, count)))
        return pages


def xml_of(images: Sequence[OmeImage]) -> str:
    """OME-XML that describes these images of one OME-XML alone: no others, no annotations except for sub-axes."""
    root, numbers = images[0].root, {image.number for image in images}
    alone = Element(root.tag, root.attrib)
    every = [child for child in root if _is(child, "Image")]
    alone.extend(child for number, child in enumerate(every) if number in numbers)
    for group in (child for child in root if _is(child, "StructuredAnnotations")):
        kept = [child for child in group if child.get("Namespace", "").endswith("modulo")]
        if kept:
            element = Element(group.tag, group.attrib)
            element.extend(kept)
            alone.append(element)
    return ElementTree.tostring(alone, encoding="unicode")


def read_names(xml: str, location: str) -> list[str]:
    """Name of every image of the OME-XML of ``location``; "" for those without one.

    Raises:
        ReadError: ``xml`` cannot be parsed.
    """
    return [child.get("Name", "") for child in parse(xml, location) if _is(child, "Image")]


def read_header(root: Element) -> tuple[str | None, str | None]:
    """(UUID of the file, name of the file that holds the OME-XML in its stead); None for what there is none of.

    Raises:
        ValueError: it names a file in another folder.
    """
    reference = next((child for child in root if _is(child, "BinaryOnly")), None)
    return root.get("UUID"), None if reference is None else _beside(reference.get("MetadataFile", ""))


def read_images(root: Element, own_uuid: str | None, own_name: str, exists: Callable[[str], bool]) -> list[OmeImage]:
    """Read every image of an OME-XML.

    Args:
        root: the parsed text; its references to the file itself are removed, others have the file's name as UUID.
        own_uuid: UUID of the TIFF file that is read; None if it has none, or for a companion file.
        own_name: name of the TIFF file that is read.
        exists: whether a file of a name lies beside it.

    Raises:
        ValueError: it names a file in another folder.
    """
    if own_uuid is not None:
        root.set("UUID", own_uuid)
    references = [element for element in root.iter() if _is(element, "UUID")]
    if len({reference.get("FileName") for reference in references if reference.text == own_uuid}) > 1:
        own_uuid = None  # copies share it, so it says nothing
    named = {_beside(reference.get("FileName", own_name)) for reference in references}
    images = [child for child in root if _is(child, "Image")]
    data = [entry for image in images for entry in image.iter() if _is(entry, "TiffData")]
    own = [entry for entry in data if _file_of(entry, own_uuid, own_name) == SELF]
    if len(named) == 1 and not any(map(exists, named)) and not own:
        own = data  # the only file that is named is this one, under the name that it had when it was written
    for entry in own:
        for reference in [child for child in entry if _is(child, "UUID")]:
            entry.remove(reference)
    for reference in references:  # tifffile knows files by their UUIDs, of which several may have the same
        reference.text = reference.get("FileName", reference.text)
    return [_image(root, image, number, own_uuid, own_name) for number, image in enumerate(images)]


def _image(root: Element, image: Element, number: int, own_uuid: str | None, own_name: str) -> OmeImage:
    pixels = next((child for child in image if _is(child, "Pixels")), Element("Pixels"))
    data = sorted(_planes_of(pixels), key=_first_plane)
    channels = [child for child in pixels if _is(child, "Channel")]
    names = tuple(channel.get("Name", "") for channel in channels)
    return OmeImage(
        number=number,
        name=image.get("Name", ""),
        files=tuple(dict.fromkeys(_file_of(entry, own_uuid, own_name) for entry in data)),
        stated={
            axis.lower(): (pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "µm"))
            for axis in "XYZ"
        },
        channels=names if any(names) else (),
        colours=tuple(_colour(channel.get("Color", _WHITE)) for channel in channels),
        root=root,
        pixels=pixels,
    )


def _colour(text: str) -> str:
    """RRGGBB of a colour that is written as a signed number of the bytes red, green, blue and alpha."""
    try:
        return f"{(int(text) & 0xFFFFFFFF) >> 8:06X}"
    except ValueError:
        return ""


def _file_of(data: Element, own_uuid: str | None, own_name: str) -> str:
    """Name of the file that holds the planes of a TiffData element."""
    reference = next((child for child in data if _is(child, "UUID")), None)
    if reference is None or (own_uuid is not None and reference.text == own_uuid):
        return SELF
    name = reference.get("FileName", own_name)
    return SELF if name.lower() == own_name.lower() else name


def _first_plane(data: Element) -> tuple[int, ...]:
    return tuple(_whole(data.get(f"First{axis}")) or 0 for axis in "TZC")


def _planes_of(pixels: Element) -> list[Element]:
    """The elements that say where planes are."""
    return [child for child in pixels if _is(child, "TiffData")]


def _whole(text: str | None) -> int | None:
    """A text as a whole number from 0; None if it is none."""
    return int(text) if text is not None and text.strip().isdecimal() else None


def _is(element: Element, tag: str) -> bool:
    return element.tag.rpartition("}")[2] == tag


def _damaged(location: str, expected: str, found: str, cause: str = "damaged metadata") -> ReadError:
    return ReadError(location, expected=expected, found=found, cause=cause, remedy="copy or export it again")


def parse(xml: str, location: str) -> Element:
    """The root of the OME-XML of ``location``.

    Raises:
        ReadError: ``xml`` cannot be parsed.
    """
    try:
        return ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise _damaged(location, "whole and well-formed OME-XML", str(error), "a file that was cut short") from error


def _beside(name: str) -> str:
    """The name of a file, if it lies in the folder of the file that names it."""
    if set(name) & set("/\\") or name in ("", ".", ".."):
        raise ValueError(
            f"expected an OME-TIFF whose parts lie beside it, found one in {name!r}; put the files into one folder and "
            "write their names without folders into the metadata"
        )
    return name
