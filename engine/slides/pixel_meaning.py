"""List what the pixels of an output image can mean."""

from __future__ import annotations

from dataclasses import dataclass

Colour = tuple[int, int, int, int]


@dataclass(frozen=True)
class PixelMeaning:
    """Meaning of the pixels of an output image.

    Attributes:
        name: name in the attributes of the image.
        dtype: numpy name of their type.
        is_label: whether the image is listed among the labels of the segmented image; others are intensity images.
        colours: (value, RGBA) for viewers, which give every other value a colour of its own.
        names: (value, name of the class).
    """

    name: str
    dtype: str
    is_label: bool
    colours: tuple[tuple[int, Colour], ...] = ()
    names: tuple[tuple[int, str], ...] = ()

    @property
    def classes(self) -> tuple[tuple[str, str], ...]:
        """Name and colour (``#rrggbb``) of each class."""
        colours = dict(self.colours)
        return tuple((name, "#" + bytes(colours[value][:3]).hex()) for value, name in self.names)


MASK = PixelMeaning("mask", "uint8", is_label=True, colours=((1, (255, 64, 160, 160)),))
# Name of the meaning of a label image of classes, whose names and colours are the model's.
CLASSES = "classes"
# Ids of objects; the merge widens the type if there are too many objects.
INSTANCES = PixelMeaning("instances", "uint32", is_label=True)
# What is not taken for the glass of a slide.
TISSUE = PixelMeaning("tissue", "uint8", is_label=True, colours=((1, (64, 160, 255, 96)),))
# Ids of the nuclei in whose cell a pixel lies, of the type of the instances.
CELL_IDS = PixelMeaning("cells", "uint32", is_label=True)
# 0 is a probability of 0, 255 of 1.
PROBABILITY = PixelMeaning("probability", "uint8", is_label=False)
