"""Read pictures and maps of annotated images from their files, with the bits that they have."""

from __future__ import annotations

from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image
from skimage.io import imread

SUFFIXES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")
_PNG = b"\x89PNG\r\n\x1a\n"
# Colour type of a PNG.
_PALETTE = 3
_TIFFS = (b"II*\0", b"MM\0*")


def read_pixels(path: Path) -> NDArray[np.generic]:
    """The pixels of a file, (H, W) or (H, W, C); a PNG of 16 bits keeps them, which Pillow cuts to 8 in colours."""
    with open(path, "rb") as stream:
        header = stream.read(25)
    pixels: NDArray[np.generic]
    if header.startswith(_PNG) and header[24:] == b"\x10":
        pixels = imagecodecs.png_decode(path.read_bytes())
    elif header.startswith(_TIFFS):  # whatever its suffix
        pixels = tifffile.imread(path)
    else:
        pixels = imread(path)
    return pixels


def read_map(path: Path) -> NDArray[np.generic]:
    """The values (H, W) of a map in a file; where it has a palette, which shows them in colours, their indices.

    Raises:
        ValueError: the file has several channels.
    """
    with open(path, "rb") as stream:
        header = stream.read(26)
    if header.startswith(_PNG) and header[25] == _PALETTE:
        with Image.open(path) as picture:
            return np.asarray(picture)
    values = read_pixels(path)
    if values.ndim != 2:
        raise ValueError(f"{path.name} is no single-channel map: shape {values.shape}")
    return values


def files_by_stem(folder: Path) -> dict[str, list[Path]]:
    """Name without suffix -> files of that name in a folder, by name; other files than pictures are passed over."""
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            files.setdefault(path.stem, []).append(path)
    return files
