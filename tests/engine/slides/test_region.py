"""Regions: polygons of GeoJSON and label images, drawn box by box."""

import json

import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cellseg_batch.engine.errors import ReadError
from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.slides.region import open_region
from tests.support.images import blobs, write_ome_zarr
from tests.support.regions import feature, polygon, write_geojson
from tests.support.slides import only

HEIGHT, WIDTH = 120, 150
WHOLE = Box(0, 0, HEIGHT, WIDTH)


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    return only(write_ome_zarr(tmp_path_factory.mktemp("slide") / "scan.zarr", blobs(HEIGHT, WIDTH)))


def drawn(path, slide, level=0, class_name=None):
    with open_region(path, slide, slide.plane_shape(level), class_name) as region:
        return region.inside(Box(0, 0, *slide.plane_shape(level)))


def shapes(*outlines):
    """Whether the centre of each pixel lies in a polygon, by the even-odd rule, pixel by pixel."""
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    inside = np.zeros((HEIGHT, WIDTH), bool)
    for rings in outlines:
        odd = np.zeros_like(inside)
        for ring in rings:
            for (x0, y0), (x1, y1) in zip(ring, ring[1:] + ring[:1], strict=True):
                if x0 != x1:
                    (x0, y0), (x1, y1) = sorted([(x0, y0), (x1, y1)])
                    odd ^= (x0 <= x) & (x < x1) & (y0 + (x - x0) * ((y1 - y0) / (x1 - x0)) <= y)
        inside |= odd
    return inside


corners = st.lists(st.tuples(st.floats(-40, 200), st.floats(-40, 200)), min_size=3, max_size=8, unique=True)


@given(st.lists(st.lists(corners, min_size=1, max_size=2), min_size=1, max_size=3), st.data())
def test_polygons_are_the_pixels_whose_centres_they_hold_in_any_box(tmp_path_factory, slide, outlines, data):
    outlines.append([[(10, 10), (30, 10), (30, 40), (10, 40)]])
    path = tmp_path_factory.mktemp("region") / "region.geojson"
    write_geojson(path, *(polygon(*rings) for rings in outlines))
    expected = shapes(*outlines)
    with open_region(path, slide, (HEIGHT, WIDTH)) as region:
        np.testing.assert_array_equal(region.inside(WHOLE), expected)
        y0, x0 = data.draw(st.integers(0, HEIGHT - 1)), data.draw(st.integers(0, WIDTH - 1))
        box = Box(y0, x0, data.draw(st.integers(y0 + 1, HEIGHT)), data.draw(st.integers(x0 + 1, WIDTH)))
        np.testing.assert_array_equal(region.inside(box), expected[box.slices()])


def test_polygons_with_a_common_edge_share_no_pixel_and_leave_none_out(tmp_path, slide):
    middle = [(70.3, 0), (41.7, 60.9), (83.5, 120)]
    parts = [[(0, 0), *middle, (0, 120)], [*reversed(middle), (150, 0), (150, 120)]]
    left, right = (drawn(write_geojson(tmp_path / f"{n}.json", polygon(part)), slide) for n, part in enumerate(parts))
    assert (left ^ right).all()
    square = drawn(write_geojson(tmp_path / "square.json", polygon([(10, 20), (12, 20), (12, 23), (10, 23)])), slide)
    np.testing.assert_array_equal(np.argwhere(square), [(y, x) for y in (20, 21, 22) for x in (10, 11)])


def test_geojson_is_read_in_every_form_that_qupath_writes(tmp_path, slide):
    square = [(10, 10), (60, 10), (60, 60), (10, 60)]
    hole = [(20, 20), (30, 20), (30, 30), (20, 30)]
    other = [(80, 80), (100, 80), (100, 100), (80, 100)]
    several = {"type": "MultiPolygon", "coordinates": [polygon(square, hole)["coordinates"], [other]]}
    tumour, stroma = feature(several, "Tumour"), feature(polygon([(0, 0), (9, 0), (9, 9)]), "Stroma")
    expected = shapes([square, hole], [other])
    forms = {
        "collection": {"type": "FeatureCollection", "features": [tumour]},
        "list": [tumour],
        "feature": tumour,
        "geometry": several,
        "classes": {"type": "FeatureCollection", "features": [stroma, tumour]},
    }
    hashes = set()
    for name, content in forms.items():
        path = tmp_path / f"{name}.geojson"
        path.write_text(json.dumps(content, indent=len(name)))
        chosen = "Tumour" if name == "classes" else None
        np.testing.assert_array_equal(drawn(path, slide, class_name=chosen), expected, err_msg=name)
        with open_region(path, slide, (HEIGHT, WIDTH), chosen) as region:
            hashes.add(region.sha256)
    assert len(hashes) == 1
    assert drawn(tmp_path / "classes.geojson", slide)[3, 5]  # every class
    half = drawn(tmp_path / "list.geojson", slide, level=1)
    np.testing.assert_array_equal(half, expected[::2, ::2])  # whose edges lie between pixels of both levels


@pytest.mark.parametrize(("content", "named"), [
    ("{", "a GeoJSON file, found DecodeError"),
    ({"type": "FeatureCollection", "features": []}, "at least one polygon, found none"),
    ({"type": "Topology"}, "feature 0: one of FeatureCollection, Feature, Polygon, MultiPolygon, found 'Topology'"),
    ([feature(polygon([(0, 0), (9, 0), (9, 9)])), feature({"type": "Point", "coordinates": [1, 2]}, name="spot")],
     r"feature 1 \(spot\): a Polygon or MultiPolygon, which encloses pixels, found Point"),
    (feature(None), "feature 0: a Polygon or MultiPolygon, which encloses pixels, found none"),
    (polygon([(0, 0), (9, 0)]), "feature 0: rings of at least three corners, found 2"),
    (polygon([(0, 0), (9, None), (4, 4)]), "feature 0: finite coordinates"),
    ({"type": "Polygon", "coordinates": [["x"]]}, "feature 0: rings of positions"),
    ({"type": "MultiPolygon", "coordinates": []}, "feature 0: coordinates of polygons"),
    ({**polygon([(0, 0), (9, 0), (9, 9)]), "plane": {"c": -1, "z": 2, "t": 0}}, "an outline for all planes"),
    (polygon([(500, 500), (600, 500), (600, 600)]),
     "a region in the image of 150 x 120 px, found one from x 500, y 500 to 600, 600, wholly outside"),
])  # fmt: skip
def test_what_is_no_region_is_named_with_its_feature(tmp_path, slide, content, named):
    path = tmp_path / "region.geojson"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ReadError, match=named) as refused:
        open_region(path, slide, (HEIGHT, WIDTH))
    assert str(path) in str(refused.value)


def test_an_unknown_class_names_those_that_there_are(tmp_path, slide):
    triangle = polygon([(0, 0), (9, 0), (9, 9)])
    path = write_geojson(tmp_path / "a.geojson", triangle, feature(triangle, "Tumour"), feature(triangle, "Fat"))
    with pytest.raises(ReadError, match=r"class tumour .* found 3 features of Fat, Tumour"):
        open_region(path, slide, (HEIGHT, WIDTH), "tumour")
    with pytest.raises(ReadError, match="GeoJSON file for the class Fat"):
        open_region(tmp_path / "a.png", slide, (HEIGHT, WIDTH), "Fat")


def test_label_images_of_any_format_and_scale_are_stretched_over_the_slide(tmp_path, slide):
    labels = np.zeros((24, 30), np.uint16)
    labels[3:10, 5:20] = 300
    labels[20:, 28:] = 1
    expected = np.kron(labels > 0, np.ones((5, 5), bool))
    Image.fromarray(labels.astype(np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.stack([labels > 0, *np.zeros((2, 24, 30), bool), labels >= 0], 2) * np.uint8(255)).save(
        tmp_path / "rgba.png"
    )
    tifffile.imwrite(tmp_path / "a.tif", labels)
    zarr.save_array(str(tmp_path / "a.zarr"), labels)
    group = write_ome_zarr(tmp_path / "b.zarr", blobs(HEIGHT, WIDTH))
    write_ome_zarr(group / "labels" / "tissue", labels, axes="yx", levels=1)
    paths = (*(tmp_path / name for name in ("a.png", "rgba.png", "a.tif", "a.zarr")), group / "labels" / "tissue")
    hashes = set()
    for path in paths:
        with open_region(path, slide, (HEIGHT, WIDTH)) as region:
            np.testing.assert_array_equal(region.inside(WHOLE), expected, err_msg=str(path))
            box = Box(13, 7, 60, 149)
            np.testing.assert_array_equal(region.inside(box), expected[box.slices()])
            hashes.add(region.sha256)
    assert len(hashes) == 1
    np.testing.assert_array_equal(drawn(tmp_path / "a.png", slide, level=1), expected[1::2, 1::2])


@pytest.mark.parametrize(("make", "named"), [
    (lambda path: tifffile.imwrite(path / "m.tif", np.ones((40, 30), np.uint8)), "the proportions of its slide"),
    (lambda path: tifffile.imwrite(path / "m.tif", np.ones((5, 40, 50), np.uint8), metadata={"axes": "ZYX"}),
     "one plane, which holds for all planes of its slide, found 5 planes"),
    (lambda path: Image.fromarray(np.ones((40, 50), np.uint8)).save(path / "m.jpg"), "labels as they were drawn"),
    (lambda path: (path / "m.png").write_bytes(b"no picture"), "m.png"),
    (lambda path: (path / "m.txt").write_text("labels"), "at least one image"),
])  # fmt: skip
def test_label_images_that_cannot_be_a_region_are_refused(tmp_path, slide, make, named):
    make(tmp_path)
    (path,) = tmp_path.iterdir()
    with pytest.raises(ReadError, match=named):
        open_region(path, slide, (HEIGHT, WIDTH))
