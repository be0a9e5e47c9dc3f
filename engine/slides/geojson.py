"""Read the polygons of a GeoJSON file (RFC 7946), as QuPath writes what a pathologist drew.

Coordinates are (x, y) in px of the full resolution; pixel 0 reaches from 0 to 1.
"""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.errors import ReadError, brief

Ring = NDArray[np.float64]
"""Corners (n, 2) of a closed line as (y, x), the first one not repeated at the end."""
Polygon = tuple[Ring, ...]
"""An outline, and the outlines of its holes."""

_KINDS = ("FeatureCollection", "Feature", "Polygon", "MultiPolygon")
_MOST_NAMED = 10


def read_polygons(path: Path, class_name: str | None = None) -> list[Polygon]:
    """Read all polygons of a file, in its order.

    The file holds a FeatureCollection, a list of features, a Feature or a geometry; geometries are of the types Polygon
    and MultiPolygon.

    Args:
        path: the file.
        class_name: takes only features whose ``classification`` in QuPath has this name; None takes all.

    Raises:
        ReadError: the file cannot be read, or one of its features cannot be used, which is named.
    """
    try:
        content = msgspec.json.decode(path.read_bytes().removeprefix(BOM_UTF8))
    except (OSError, msgspec.MsgspecError, RecursionError) as error:
        raise ReadError(
            str(path),
            expected="a GeoJSON file",
            found=brief(error),
            remedy="export it again, in QuPath with File, Export objects as GeoJSON",
        ) from error
    features = list(_features(path, content))
    if class_name is not None:
        classes = [_class_of(feature) for _, feature in features]
        if class_name not in classes:
            names = sorted({name for name in classes if name})
            raise ReadError(
                str(path),
                expected=f"a feature of the class {class_name} (`mask_class`)",
                found=f"{len(features)} features of {', '.join(names[:_MOST_NAMED]) or 'no class'}",
                remedy="name one of these as it is written, or leave it out to take all",
            )
        features = [one for one, name in zip(features, classes, strict=True) if name == class_name]
    return [polygon for where, feature in features for polygon in _polygons(path, where, feature)]


def _features(path: Path, content: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name for messages and the content of every feature; a bare geometry is a feature without properties."""
    listed: Any = content if isinstance(content, list) else [content]
    if isinstance(content, dict) and content.get("type") == "FeatureCollection":
        listed = content.get("features")
    if not isinstance(listed, list):
        raise _refused(path, "the file", "a list of features", f"{listed!r:.80}")
    for number, feature in enumerate(listed):
        if not isinstance(feature, dict) or feature.get("type") not in _KINDS[1:]:
            kind = feature.get("type") if isinstance(feature, dict) else feature
            raise _refused(path, f"feature {number}", f"one of {', '.join(_KINDS)}", f"{kind!r:.80}")
        if feature["type"] != "Feature":
            feature = {"geometry": feature}
        yield _where(number, feature), feature


def _where(number: int, feature: dict[str, Any]) -> str:
    properties = feature.get("properties")
    name = properties.get("name") if isinstance(properties, dict) else None
    return f"feature {number}" + (f" ({name!s:.40})" if name else "")


def _class_of(feature: dict[str, Any]) -> str | None:
    """The name of a feature's class in QuPath; None if it has none."""
    properties = feature.get("properties")
    classification = properties.get("classification") if isinstance(properties, dict) else None
    name = classification.get("name") if isinstance(classification, dict) else classification
    return name if isinstance(name, str) else None


def _polygons(path: Path, where: str, feature: dict[str, Any]) -> Iterator[Polygon]:
    geometry = feature.get("geometry")
    kind = geometry.get("type") if isinstance(geometry, dict) else None
    if not isinstance(geometry, dict) or kind not in ("Polygon", "MultiPolygon"):
        found = "none" if geometry is None else str(kind)
        remedy = "leave it out of the export, or choose features by their class with `mask_class`"
        raise _refused(path, where, "a Polygon or MultiPolygon, which encloses pixels", found, remedy)
    plane = geometry.get("plane")
    if isinstance(plane, dict) and (plane.get("z") or plane.get("t")):
        found = f"one of plane z {plane.get('z', 0)}, t {plane.get('t', 0)} alone"
        raise _refused(path, where, "an outline for all planes of an image", found, "draw it in the first plane")
    coordinates = geometry.get("coordinates")
    polygons = [coordinates] if kind == "Polygon" else coordinates
    if not isinstance(polygons, list) or not polygons:
        raise _refused(path, where, "coordinates of polygons", f"{polygons!r:.80}")
    for rings in polygons:
        if not isinstance(rings, list) or not rings:
            raise _refused(path, where, "a list of rings", f"{rings!r:.80}")
        yield tuple(_ring(path, where, ring) for ring in rings)


def _ring(path: Path, where: str, positions: Any) -> Ring:
    try:
        points = np.asarray(positions, np.float64)
        corners = points[:, 1::-1]
    except (TypeError, ValueError, IndexError) as error:
        raise _refused(path, where, "rings of positions such as [x, y]", f"{positions!r:.80}") from error
    if points.ndim != 2 or points.shape[1] < 2:
        raise _refused(path, where, "rings of positions such as [x, y]", f"{positions!r:.80}")
    if not np.isfinite(corners).all():
        raise _refused(path, where, "finite coordinates", "NaN or infinite ones")
    if len(corners) > 1 and (corners[0] == corners[-1]).all():
        corners = corners[:-1]
    if len(corners) < 3:
        raise _refused(path, where, "rings of at least three corners", f"{len(corners)}")
    return corners


def _refused(path: Path, where: str, expected: str, found: str, remedy: str = "export or draw it again") -> ReadError:
    return ReadError(str(path), expected=f"{where}: {expected}", found=found, remedy=remedy)
