"""OME-TIFFs of several files: each image is found once, in the file of its first plane, or what it lacks is named."""

import numpy as np
import pytest
import tifffile

from cellseg_batch.engine.geometry import Box
from cellseg_batch.engine.slides.discover import find_images
from cellseg_batch.engine.slides.ome_xml import parse, read_images
from cellseg_batch.engine.slides.slide import Slide, UnreadableImage
from tests.support.slides import coordinates, only, read

SCHEMA = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
PIXELS = coordinates("yx", (24, 32), "uint16")


def uuid(name):
    return f"urn:uuid:{name}"


def image(planes, number=0, name="", attributes=""):
    """An image element of the channels in ``planes``: (file, page) of each; None as file for the file itself."""
    channels = "".join(f'<Channel ID="C:{number}:{c}" Name="c{c}" SamplesPerPixel="1"/>' for c in range(len(planes)))
    data = "".join(
        f'<TiffData FirstC="{c}" IFD="{page}" PlaneCount="1">'
        + (f'<UUID FileName="{file}">{uuid(file)}</UUID>' if file else "")
        + "</TiffData>"
        for c, (file, page) in enumerate(planes)
    )
    return (
        f'<Image ID="Image:{number}" Name="{name}"><Pixels ID="P:{number}" DimensionOrder="XYCZT" Type="uint16" '
        f'SizeX="32" SizeY="24" SizeC="{len(planes)}" SizeZ="1" SizeT="1" {attributes}>{channels}{data}'
        "</Pixels></Image>"
    )


def xml(content, own=None):
    identity = f' UUID="{uuid(own)}"' if own else ""
    return f'<?xml version="1.0" encoding="UTF-8"?><OME xmlns="{SCHEMA}"{identity}>{content}</OME>'


def write(folder, name, description, *values):
    """A file of a page for each value, which is added to `PIXELS`."""
    folder.mkdir(exist_ok=True)
    with tifffile.TiffWriter(folder / name) as tiff:
        for number, value in enumerate(values):
            tiff.write(PIXELS + value, description=None if number else description.encode(), metadata=None)


def first_pixels(slide):
    """The first pixel of each channel."""
    return read(slide, 0, tuple(range(slide.extent("c", 0))), 0, Box(0, 0, 1, 1)).ravel().tolist()


def positions(folder, names=("p0.ome.tif", "p1.ome.tif")):
    content = "".join(image([(name, 0)], number, name) for number, name in enumerate(names))
    for number, name in enumerate(names):
        write(folder, name, xml(content, name), 100 * number)


def channels(folder, names=("b.ome.tif", "a.ome.tif")):
    for number, name in enumerate(names):
        write(folder, name, xml(image([(name, 0) for name in names]), name), 100 * number)


def test_positions_in_files_of_their_own_are_found_once(tmp_path):
    positions(tmp_path / "in")
    slides = find_images(tmp_path / "in")
    assert [slide.name for slide in slides] == ["in/p0.ome.tif", "in/p1.ome.tif"]
    assert [first_pixels(slide) for slide in slides] == [[0], [100]]
    assert first_pixels(only(tmp_path / "in" / "p1.ome.tif")) == [100]


def test_channels_in_files_of_their_own_are_one_image_whichever_file_leads_to_it(tmp_path):
    channels(tmp_path / "in")
    for path in (tmp_path / "in", tmp_path / "in" / "a.ome.tif", tmp_path / "in" / "b.ome.tif"):
        slide = only(path)
        assert (slide.store.name, slide.path, slide.channels) == ("b.ome.tif", "", ("c0", "c1"))
        assert first_pixels(slide) == [0, 100]


def test_a_missing_file_is_named_and_nothing_is_filled_in(tmp_path):
    channels(tmp_path / "in")
    (tmp_path / "in" / "a.ome.tif").unlink()
    assert "no a.ome.tif" in only(tmp_path / "in").reason
    positions(tmp_path / "p")
    (tmp_path / "p" / "p0.ome.tif").unlink()
    there, lost = find_images(tmp_path / "p")
    assert isinstance(there, Slide)
    assert isinstance(lost, UnreadableImage)
    assert lost.path.endswith("p0.ome.tif")


@pytest.mark.parametrize("own", ["old.ome.tif", None])
def test_a_renamed_file_is_read_from_itself(tmp_path, own):
    write(tmp_path, "new.ome.tif", xml(image([("old.ome.tif", 1), ("old.ome.tif", 0)]), own), 0, 100)
    assert first_pixels(only(tmp_path / "new.ome.tif")) == [100, 0]


def test_a_companion_file_and_the_files_that_refer_to_it_lead_to_the_same_images(tmp_path):
    names = ("0.ome.tif", "1.ome.tif", "2.ome.tif")
    content = image([("0.ome.tif", 0), ("1.ome.tif", 0)]) + image([("2.ome.tif", 0)], 1)
    (tmp_path / "x.companion.ome").write_text(xml(content, "x"))
    reference = f'<BinaryOnly MetadataFile="x.companion.ome" UUID="{uuid("x")}"/>'
    for number, name in enumerate(names):
        write(tmp_path, name, xml(reference, name), 100 * number)
    for path in (tmp_path, tmp_path / "x.companion.ome"):
        slides = find_images(path)
        assert [slide.store.name for slide in slides] == ["0.ome.tif", "2.ome.tif"]
        assert [first_pixels(slide) for slide in slides] == [[0, 100], [200]]
    assert first_pixels(only(tmp_path / "1.ome.tif")) == [0, 100]
    (tmp_path / "x.companion.ome").unlink()
    assert all("x.companion.ome" in broken.reason for broken in find_images(tmp_path))


def test_the_xml_of_an_image_describes_it_alone():
    content = "".join(image([(f"{number}.tif", 0)], number, f"n{number}") for number in range(3)) + '<Plate ID="P"/>'
    alone = parse(read_images(parse(xml(content)), None, "0.tif", lambda _: True)[1].xml())
    assert [child.get("Name") for child in alone] == ["n1"]


def test_xml_that_does_not_fit_the_pages_gives_way_to_them_unless_it_lists_other_files(tmp_path):
    content = image([(None, 0)]).replace('SizeX="32"', 'SizeX="40"')
    write(tmp_path, "a.ome.tif", xml(content), 5)
    slide = only(tmp_path / "a.ome.tif")
    assert slide.notes == ("its OME-XML does not fit its pages, which are read as they are",)
    np.testing.assert_array_equal(read(slide, 0, (0,), 0, Box(0, 0, 24, 32))[0], PIXELS + 5)
    parts = image([("b.ome.tif", 0), ("c.ome.tif", 0)]).replace('SizeX="32"', 'SizeX="40"')
    for name in ("b.ome.tif", "c.ome.tif"):
        write(tmp_path / "in", name, xml(parts, name), 0)
    assert "the pages that its OME-XML describes" in only(tmp_path / "in").reason


def test_planes_that_a_file_lacks_are_named(tmp_path):
    write(tmp_path, "a.ome.tif", xml(image([(None, 0), (None, 1)])), 0)
    assert "all 2 planes that its metadata list, found 1" in only(tmp_path / "a.ome.tif").reason


def test_one_bad_image_costs_no_other(tmp_path):
    content = image([(None, 0)]) + image([("lost.ome.tif", 0), (None, 0)], 1) + image([(None, 1)], 2)
    write(tmp_path, "a.ome.tif", xml(content, "a.ome.tif"), 0, 100)
    first, second, third = find_images(tmp_path / "a.ome.tif")
    assert (first_pixels(first), first_pixels(third)) == ([0], [100])
    assert "no lost.ome.tif" in second.reason
    assert [image.name for image in (first, second, third)] == [f"a.ome.tif/{number}" for number in range(3)]


def test_sizes_in_any_unit_and_absurd_ones(tmp_path):
    nm = 'PhysicalSizeX="500" PhysicalSizeXUnit="nm" PhysicalSizeY="5000" PhysicalSizeYUnit="&#xC5;"'
    zero = 'PhysicalSizeX="0" PhysicalSizeY="-1"'
    write(tmp_path, "a.ome.tif", xml(image([(None, 0)], 0, "", nm) + image([(None, 1)], 1, "", zero)), 0, 1)
    known, unknown = find_images(tmp_path / "a.ome.tif")
    assert known.levels[0].scale == pytest.approx((0.5, 0.5))
    assert unknown.pixel_size_um(0) is None
    assert len(unknown.notes) == 2


def test_damaged_xml_is_named(tmp_path):
    write(tmp_path, "a.ome.tif", xml("<Image></OME>"), 0)
    assert "OME-XML cannot be parsed" in only(tmp_path / "a.ome.tif").reason


def test_label_and_macro_are_left_out_and_said(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as tiff:
        for name, side in (("macro image", 20), ("scan", 60), ("label image", 30)):
            tiff.write(np.zeros((side, side), "uint8"), metadata={"axes": "YX", "Name": name})
    slide = only(tmp_path / "a.ome.tif")
    assert (slide.plane_shape(0), slide.path, slide.series) == ((60, 60), "", 1)
    assert slide.notes == ("left out beside the scan: macro image, label image",)
    assert read(slide, 0, (0,), 0, Box(0, 0, 60, 60)).shape == (1, 60, 60)
