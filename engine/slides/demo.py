"""Write a small ``slides.zarr`` of real microscopy images, from pictures that ship with the package."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from skimage.io import imread
from yaozarrs import v05

from cellseg_batch.engine.errors import UsageError

_CHUNK = 256
_SMALLEST = 128


def demo_pictures() -> dict[str, Path]:
    """Name -> PNG file of the pictures that ship with the package."""
    folder = Path(str(files("cellseg_batch.engine"))) / "assets" / "demo"
    return {path.stem: path for path in sorted(folder.glob("*.png"))}


def write_demo(out: Path) -> list[str]:
    """Write one OME-Zarr 0.5 image for each demo picture below ``out``; returns their names.

    Raises:
        UsageError: ``out`` exists already, or cannot be made.
    """
    if out.exists():
        raise UsageError(str(out), expected="a path that is free", found="something there", remedy="choose another")
    about = json.loads((next(iter(demo_pictures().values())).parent / "about.json").read_text())
    try:
        root = zarr.open_group(str(out), mode="w", zarr_format=3)
    except OSError as error:
        raise UsageError(
            str(out), expected="a folder that can be written", found=str(error), remedy="choose another"
        ) from error
    for name, path in demo_pictures().items():
        picture = imread(path)
        pixels = np.moveaxis(picture, -1, 0) if picture.ndim == 3 else picture[None]
        _write_image(root.create_group(name), name, pixels, about[name]["channels"], about[name])
    return list(demo_pictures())


def _write_image(
    group: zarr.Group, name: str, pixels: NDArray[np.uint8], channels: list[str], about: dict[str, Any]
) -> None:
    level, datasets = 0, []
    while level == 0 or min(pixels.shape[1:]) >= _SMALLEST:
        chunks = (1, min(_CHUNK, pixels.shape[1]), min(_CHUNK, pixels.shape[2]))
        array = group.create_array(
            str(level), shape=pixels.shape, dtype="uint8", chunks=chunks, dimension_names=("c", "y", "x")
        )
        array[...] = pixels
        scale = v05.ScaleTransformation(scale=[1.0, 2.0**level, 2.0**level])
        datasets.append(v05.Dataset(path=str(level), coordinateTransformations=[scale]))
        # An odd last row or column is dropped, not averaged with padding.
        even = pixels[:, : pixels.shape[1] // 2 * 2, : pixels.shape[2] // 2 * 2].astype(np.float32)
        corners = [even[:, y::2, x::2] for y in (0, 1) for x in (0, 1)]
        pixels = np.mean(corners, axis=0).round().astype(np.uint8)
        level += 1
    axes: list[Any] = [v05.ChannelAxis(name="c"), v05.SpaceAxis(name="y"), v05.SpaceAxis(name="x")]
    colours = ["FF0000", "00FF00", "0000FF"] if len(channels) == 3 else ["FFFFFF"]
    window = v05.OmeroWindow(min=0, max=255, start=0, end=255)
    image = v05.Image(
        version="0.5",
        multiscales=[v05.Multiscale(name=name, axes=axes, datasets=datasets)],
        omero=v05.Omero(
            channels=[
                v05.OmeroChannel(label=label, color=colour, window=window)
                for label, colour in zip(channels, colours, strict=True)
            ]
        ),
    )
    group.attrs["ome"] = image.model_dump(mode="json", by_alias=True, exclude_none=True)
    group.attrs["cellseg-batch"] = {key: about[key] for key in ("what", "source", "licence")}
