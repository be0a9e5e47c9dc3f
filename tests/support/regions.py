"""Regions as QuPath writes them."""

import json


def polygon(*rings):
    """A geometry of an outline and its holes, each a list of (x, y) without the first corner again at its end."""
    return {"type": "Polygon", "coordinates": [[list(corner) for corner in (*ring, ring[0])] for ring in rings]}


def feature(geometry, class_name=None, name=None):
    """A feature as QuPath writes an annotation."""
    properties = {"objectType": "annotation", **({"name": name} if name else {})}
    if class_name:
        properties["classification"] = {"name": class_name, "color": [200, 0, 0]}
    return {"type": "Feature", "id": "6e1c", "geometry": geometry, "properties": properties}


def write_geojson(path, *geometries):
    """Write geometries or features as a FeatureCollection; returns ``path``."""
    features = [one if one["type"] == "Feature" else feature(one) for one in geometries]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path
